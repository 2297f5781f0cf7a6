"""Training methods, one folder each with its settings and its losses."""
