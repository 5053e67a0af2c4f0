"""The exact gold scores of the world's tasks, out of reach of labelers."""
