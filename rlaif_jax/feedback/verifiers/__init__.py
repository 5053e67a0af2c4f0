"""Rewards that users bring: Python functions, and verifiers that compare an answer with its record."""
