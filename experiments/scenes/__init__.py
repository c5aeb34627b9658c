"""Synthetic scenes with captions: what the tiny backbones learn to see and to name."""
