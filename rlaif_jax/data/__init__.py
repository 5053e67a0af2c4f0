"""Prompts, preference pairs, tokenizers and the synthetic world: the host side of the flow."""
