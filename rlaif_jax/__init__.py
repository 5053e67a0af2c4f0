"""Reinforcement learning from AI feedback on language models, in JAX."""
