"""Checkpoints: written, verified, read, kept, mirrored."""
