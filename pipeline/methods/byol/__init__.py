"""BYOL: self-supervised learning by predicting an EMA teacher's features (arXiv 2006.07733)."""
