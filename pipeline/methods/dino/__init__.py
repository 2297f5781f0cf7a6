"""DINO: self-distillation of class tokens with multi-crop (arXiv 2104.14294)."""
