"""Models: loading them, and all that is read of one: sizes, positions, its calibration profile."""
