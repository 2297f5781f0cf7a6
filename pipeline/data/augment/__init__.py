"""Augmentation: random parameters, masks, image decoding, the DALI graph."""
