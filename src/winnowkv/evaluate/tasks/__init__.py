"""Benchmark tasks: their rows, prompts, scores and runs."""
