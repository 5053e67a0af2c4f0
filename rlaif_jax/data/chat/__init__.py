"""Conversations for chat models: their templates, and records whose prompts are messages."""
