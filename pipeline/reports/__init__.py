"""HTML pages and figures of runs, shards and images."""
