"""Servers of others: vLLM, and how they are asked."""
