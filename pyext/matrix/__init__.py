"""Matrix functions: algorithms, written once over a small table of verbs (verbs.py), and the verbs' backends."""
