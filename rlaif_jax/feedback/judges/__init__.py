"""Judges that run on the devices: language models, reward models, sentiment classifiers."""
