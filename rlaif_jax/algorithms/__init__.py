"""Training algorithms: pure steps, losses and advantage estimators."""
