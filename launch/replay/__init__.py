"""Replays steps of a run and compares them with what it recorded."""
