"""The benchmark: what compression costs and brings in seconds and bytes."""
