"""CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343): contrastive image-text pretraining."""
