"""Published feedback of real people and real judges: what this package's readers and models make of it."""
