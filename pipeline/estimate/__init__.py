"""Estimates memory, FLOPs and communication of a configuration before it runs."""
