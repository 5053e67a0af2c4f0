"""The built-in world: models, judges, rewards and simulated people for its experiments."""
