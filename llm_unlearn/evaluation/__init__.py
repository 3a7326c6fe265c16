"""Evaluation: what a model knows. Imports neither exact nor approximate methods."""
