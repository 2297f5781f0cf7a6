"""DINOv2: self-distillation of class and masked patch tokens (arXiv 2304.07193); also DINOv3's Gram anchoring (arXiv 2508.10104)."""
