"""The engine: many requests that decode together in compact slots."""
