"""The self-contained report page of a run."""
