"""CoCa: contrastive image-text pretraining with a captioning decoder (arXiv 2205.01917)."""
