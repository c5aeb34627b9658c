"""Recycling: each way to a new language compared on held-out text."""
