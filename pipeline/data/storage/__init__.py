"""Access to the bytes of shards: on local disks, in object storage, and in the node's cache.

All other modules only need to know which shards a pattern names, the size of a shard, its version, and the bytes of a range.
"""

from pipeline.data.storage.local import forget, forget_deleted, read, stat, write_atomically
from pipeline.data.storage.names import ObjectStat, absolute, base_name, is_remote, local_path
from pipeline.data.storage.patterns import expand
from pipeline.data.storage.remote import ShardChanged, ShardNotFound, StorageUnavailable
from pipeline.data.storage.store import Source, Storage, cache_folder

__all__ = [
    "ObjectStat",
    "ShardChanged",
    "ShardNotFound",
    "Source",
    "Storage",
    "StorageUnavailable",
    "absolute",
    "base_name",
    "cache_folder",
    "expand",
    "forget",
    "forget_deleted",
    "is_remote",
    "local_path",
    "read",
    "stat",
    "write_atomically",
]
