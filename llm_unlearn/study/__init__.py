"""Does exact unlearning cost quality? What `recipes/exact_study.py` trains, asks and shows."""
