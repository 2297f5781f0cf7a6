"""SimVLM: prefix language modelling over images and captions (arXiv 2108.10904)."""
