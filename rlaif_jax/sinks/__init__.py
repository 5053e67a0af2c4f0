"""Where a run's numbers are shown, each sink in one file."""
