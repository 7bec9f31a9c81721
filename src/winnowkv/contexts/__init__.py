"""Contexts: documents that are compressed once, stored, and served as the first tokens of many requests by another engine."""
