"""MoCo v2: momentum contrast with a queue of keys (arXiv 2003.04297)."""
