"""Reproducible benchmarks, each against its baselines in the same run on the same host."""
