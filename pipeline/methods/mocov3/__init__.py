"""MoCo v3: momentum contrast for vision transformers, without a queue (arXiv 2104.02057)."""
