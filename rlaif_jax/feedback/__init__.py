"""Sources of feedback, the records that it is kept in, and the border where it becomes arrays."""
