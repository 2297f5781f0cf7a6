"""DINOv2: self-distillation of class and masked patch tokens (arXiv 2304.07193); optional Gram anchoring of DINOv3."""
