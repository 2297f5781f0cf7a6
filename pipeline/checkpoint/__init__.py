"""Checkpoints: writing, verification, reading, retention and mirroring."""
