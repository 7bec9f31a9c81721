"""The benchmark: what compression costs and saves, in seconds and bytes."""
