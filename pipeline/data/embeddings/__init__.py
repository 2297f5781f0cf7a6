"""Embeddings of a data set's samples, on disk: one Parquet file per shard, described by ``embeddings.json``."""
