"""Judges behind an OpenAI-compatible server: templates, limits, cache and verdicts. Needs the extra `api`."""
