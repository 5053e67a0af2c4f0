"""Records of feedback in four forms, their store, and readers of published formats."""
