"""DetailCLIP: CLIP with masked self-distillation and pixel reconstruction (arXiv 2409.06809)."""
