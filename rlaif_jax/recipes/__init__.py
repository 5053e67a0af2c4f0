"""Whole runs and their building blocks: a user's own model by feedback, reward models, fine-tuning."""
