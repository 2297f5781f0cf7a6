"""Shard index: metadata of a data set, collected before training."""
