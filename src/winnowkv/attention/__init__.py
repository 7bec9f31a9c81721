"""The attention and mask functions that a routed model calls."""
