"""Packing: folders, tables and tars of images to shards."""
