"""Curation by embeddings: near-duplicates, balanced sampling, retrieval. Results are selections; shards are never rewritten."""
