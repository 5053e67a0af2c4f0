"""The tasks of the text world: prompts, demonstrations and principles."""
