"""Offline calibration: what is measured once of a model, or trained once for all."""
