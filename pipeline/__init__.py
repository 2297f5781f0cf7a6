"""fovea's library: from tar shards to a tested backbone. Usable from a notebook, without a cluster and without ``launch``."""
