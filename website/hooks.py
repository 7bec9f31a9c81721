"""Hooks of MkDocs: pages that are made from the code, and links that lead out of ``docs``."""
