"""Selections: which samples of an index are used, and how often."""
