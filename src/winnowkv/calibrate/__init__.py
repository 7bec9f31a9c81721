"""Offline calibration: profiles that are measured once per model, and the task classifier's training."""
