"""Evaluation: what a model knows, and scores with intervals. Imports no unlearning method."""
