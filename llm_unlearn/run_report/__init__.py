"""One page about a run: what was asked for, what is done, what is left."""
