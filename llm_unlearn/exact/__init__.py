"""Exact unlearning: sequences, blocks, nodes, the run directory, deletion and verification."""
