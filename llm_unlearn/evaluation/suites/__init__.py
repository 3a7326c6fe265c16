"""Benchmarks: what is asked, and which metrics are made of the answers."""
