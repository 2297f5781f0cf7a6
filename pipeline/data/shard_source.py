"""First stage of a webdataset pipeline, in the place of its shard list, its splitters, its tar reader and its shuffle buffer."""

from __future__ import annotations

from pipeline.data.shard_dataset import ShardDataset


class ShardSource(ShardDataset):
    """The samples of a :class:`pipeline.data.ShardDataset` as the source of a ``webdataset.DataPipeline``.

    Takes the same arguments. Members are bytes, and stages such as ``wds.decode()`` and ``wds.batched(n)`` follow.
    With several workers, ``n`` must be :attr:`batch_size`; count steps and :meth:`seek` to resume.

    Example:
        >>> import webdataset as wds
        >>> from pipeline.data import ShardSource
        >>> source = ShardSource(SHARDS, global_batch_size=4, seed=1)
        >>> pipeline = wds.DataPipeline(source, wds.decode("rgb8"), wds.to_tuple("jpg", "cls"))
        >>> image, label = next(iter(pipeline))
        >>> image.shape
        (32, 32, 3)
    """
