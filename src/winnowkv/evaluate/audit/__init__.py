"""The audit: how close compressed answers come to the full cache's own, on prompts without labels."""
