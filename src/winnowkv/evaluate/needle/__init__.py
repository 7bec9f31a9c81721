"""The needle test: facts hidden in long texts."""
