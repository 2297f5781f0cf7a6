"""`fovea adapt`: describes pretrained weights, chooses settings to train them on new images, and writes these as a config."""
