"""Published feedback of real people and judges, as this package's readers and models see it."""
