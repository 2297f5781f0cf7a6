"""SimCLR: contrastive learning of two augmented views (arXiv 2002.05709)."""
