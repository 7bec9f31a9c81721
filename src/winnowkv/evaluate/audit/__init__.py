"""The audit: compressed answers beside those of the full cache, on prompts without labels."""
