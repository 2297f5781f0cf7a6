"""The shard index: what is known of a data set before it is read."""
