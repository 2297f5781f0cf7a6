"""LeJEPA: prediction between views, with features kept normal (arXiv 2511.08544)."""
