"""From encoded images to views: random choices, masks, decoding, the DALI graph."""
