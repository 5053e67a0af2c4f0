"""Judges behind an OpenAI-compatible server: templates, limits, cache. Needs the extra `api`."""
