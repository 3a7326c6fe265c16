"""All methods, exact unlearning and retraining on one suite; `recipes/benchmark.py` is thin over it."""
