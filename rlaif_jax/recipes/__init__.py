"""Building blocks of experiments: the world's models and judges, and a run before and after."""
