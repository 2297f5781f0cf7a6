"""Distillation of DINOv2 students from a larger frozen teacher (arXiv 2304.07193, section 5)."""
