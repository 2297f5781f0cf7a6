"""Tools for inspecting shards: verification, statistics, reports."""
