"""Records: from files, the Hub or the embedded world, to stable ids and slices."""
