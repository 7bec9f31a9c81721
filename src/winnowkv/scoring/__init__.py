"""Importance scores, selection and allocation: pure functions on tensors."""
