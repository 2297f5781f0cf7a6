"""What a person asks of shards: verification, statistics, reports."""
