"""Weights from and for elsewhere: ``init_from``, public layouts, pretrained models, export."""
