"""Memorization scores of runs and models, the reference to validate them, and unlearning by them (RUM)."""
