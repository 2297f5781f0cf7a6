"""Packs directories, tables and tars of images into shards."""
