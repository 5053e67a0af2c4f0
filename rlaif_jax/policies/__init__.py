"""Kinds of output of a policy: how answers are sampled, scored and turned into text."""
