"""Runs code that nobody has read: the answer in one process, its tests in another, both confined."""
