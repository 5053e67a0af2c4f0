"""Tasks for people, the queue of the annotation page, and the source that waits for their answers."""
