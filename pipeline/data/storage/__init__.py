"""The only place that touches the bytes of shards: on disks, in object storage, and in the node's cache of it.

Everything above asks four questions: which shards does a pattern name, how big is one, which version of it lies there, and
what stands between two of its bytes.
"""

from pipeline.data.storage.local import forget, forget_deleted, read, stat, write_whole
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
    "write_whole",
]
