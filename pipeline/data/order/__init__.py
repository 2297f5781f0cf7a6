"""Deterministic sample order: a pure function of the step."""
