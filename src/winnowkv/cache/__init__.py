"""The compact cache and the way of a prompt into it."""
