"""Loaders of images beside ours: webdataset, MosaicML Streaming, Hugging Face datasets, torchvision, behind the same few calls.

Each is used as its documentation says: shuffled with a seed, split over ranks by its own means, resumed by its own state if it
has one, and otherwise by skipping what was read.
"""

from __future__ import annotations

import importlib.util
import io
import random
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

Sample = tuple[str, Any]
_BUFFER = 1000  # samples of a shuffle buffer, where a loader has one


@dataclass(frozen=True)
class Setup:
    """What a loader reads.

    Attributes:
        shards: WebDataset shards.
        folder: where other formats of the same images are, and indexes.
        batch: samples of a step over all ranks.
        rank: this rank.
        world: number of ranks.
        seed: of the order.
    """

    shards: tuple[str, ...]
    folder: str
    batch: int
    rank: int = 0
    world: int = 1
    seed: int = 0


class Loader(ABC):
    """A loader.

    Attributes:
        name: for the page.
        package: the module that must be installed.
        how: how it resumes.

    Args:
        setup: what it reads.
        decoded: whether images are decoded, to uint8 ``[height, width, 3]``; otherwise they are bytes.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    how: ClassVar[str]

    def __init__(self, setup: Setup, *, decoded: bool) -> None:
        self.setup, self.decoded = setup, decoded

    @classmethod
    def installed(cls) -> bool:
        """Whether its package is installed."""
        return importlib.util.find_spec(cls.package) is not None

    @abstractmethod
    def __iter__(self) -> Iterator[Sample]:
        """Yields key and image of this rank's samples of an epoch, or of the rest of it after :meth:`load`."""

    @abstractmethod
    def state(self, taken: int) -> Any:
        """Returns the state after ``taken`` samples of this rank, to be written as JSON."""

    @abstractmethod
    def load(self, state: Any) -> None:
        """Lets the next epoch continue there, on any number of ranks."""

    def _image(self, data: bytes) -> Any:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) if self.decoded else data


class Fovea(Loader):
    """Ours."""

    name, package, how = "fovea", "pipeline", "own state, one position"

    def __init__(self, setup: Setup, *, decoded: bool) -> None:
        super().__init__(setup, decoded=decoded)
        from pipeline.data.shard_dataset import ShardDataset

        self._dataset = ShardDataset(
            setup.shards,
            global_batch_size=setup.batch,
            seed=setup.seed,
            decode="rgb8" if decoded else None,
            rank=setup.rank,
            world_size=setup.world,
            index=str(Path(setup.folder) / "index"),
        )

    def __iter__(self) -> Iterator[Sample]:
        return ((sample["__key__"], sample["jpg"]) for sample in self._dataset)

    def state(self, taken: int) -> Any:
        """Returns the state of the data set."""
        return self._dataset.state_dict()

    def load(self, state: Any) -> None:
        """Restores the state of the data set."""
        self._dataset.load_state_dict(state)


class _Skipping(Loader):
    """A loader without a state: the samples before are skipped."""

    _skip = 0

    def state(self, taken: int) -> Any:
        """Returns the samples of all ranks."""
        return taken * self.setup.world

    def load(self, state: Any) -> None:
        """Skips this rank's share of them."""
        self._skip = int(state) // self.setup.world


class WebDataset(_Skipping):
    """webdataset, with a shuffled list of shards and a shuffle buffer."""

    name, package, how = "webdataset", "webdataset", "none: reads and skips"

    def __iter__(self) -> Iterator[Sample]:
        import webdataset as wds

        source = wds.WebDataset(
            list(self.setup.shards),
            shardshuffle=len(self.setup.shards),
            seed=self.setup.seed,
            nodesplitter=wds.split_by_node,
            empty_check=False,
        ).shuffle(_BUFFER, rng=random.Random(self.setup.seed))
        return ((one["__key__"], self._image(one["jpg"])) for one in islice(source, self._skip, None))


class Streaming(Loader):
    """MosaicML Streaming, in its own format."""

    name, package, how = "MosaicML Streaming", "streaming", "own state, needs its format"

    def __init__(self, setup: Setup, *, decoded: bool) -> None:
        super().__init__(setup, decoded=decoded)
        from streaming import StreamingDataset

        self._dataset = StreamingDataset(
            local=str(Path(setup.folder) / "mds"), batch_size=setup.batch // setup.world, shuffle=True, shuffle_seed=setup.seed
        )

    def __iter__(self) -> Iterator[Sample]:
        return ((one["key"], self._image(one["jpg"])) for one in self._dataset)

    def state(self, taken: int) -> Any:
        """Returns its state, as its own DataLoader does."""
        return self._dataset.state_dict(taken * self.setup.world, False)

    def load(self, state: Any) -> None:
        """Restores its state."""
        self._dataset.load_state_dict(state)


class HuggingFace(Loader):
    """Hugging Face datasets, streaming from the tars, with a shuffle buffer."""

    name, package, how = "Hugging Face datasets", "datasets", "own state; its buffer is not part of it"

    def __init__(self, setup: Setup, *, decoded: bool) -> None:
        super().__init__(setup, decoded=decoded)
        import datasets
        from datasets.distributed import split_dataset_by_node

        source = datasets.load_dataset("webdataset", data_files={"train": list(setup.shards)}, split="train", streaming=True)
        source = source.cast_column("jpg", datasets.Image(decode=False)).shuffle(seed=setup.seed, buffer_size=_BUFFER)
        self._dataset = split_dataset_by_node(source, rank=setup.rank, world_size=setup.world) if setup.world > 1 else source

    def __iter__(self) -> Iterator[Sample]:
        return ((one["__key__"], self._image(one["jpg"]["bytes"])) for one in self._dataset)

    def state(self, taken: int) -> Any:
        """Returns its state."""
        return self._dataset.state_dict()

    def load(self, state: Any) -> None:
        """Restores its state."""
        self._dataset.load_state_dict(state)


class Torchvision(_Skipping):
    """torchvision's ImageFolder with torch's DistributedSampler."""

    name, package, how = "torchvision folders", "torchvision", "none: skips numbers, reads nothing"

    def __init__(self, setup: Setup, *, decoded: bool) -> None:
        super().__init__(setup, decoded=decoded)
        from torchvision.datasets import ImageFolder

        self._dataset = ImageFolder(str(Path(setup.folder) / "images"), loader=self._load)

    def __iter__(self) -> Iterator[Sample]:
        from torch.utils.data import DistributedSampler

        s = self.setup
        sampler: Any = DistributedSampler(self._dataset, num_replicas=s.world, rank=s.rank, shuffle=True, seed=s.seed)
        for number in islice(sampler, self._skip, None):
            yield Path(self._dataset.samples[number][0]).stem, self._dataset[number][0]

    def _load(self, path: str) -> Any:
        return self._image(Path(path).read_bytes())


PEERS: dict[str, type[Loader]] = {peer.name: peer for peer in (Fovea, WebDataset, Streaming, HuggingFace, Torchvision)}


def convert(shards: Sequence[str], folder: Path) -> None:
    """Writes the images of some shards as files in a folder for each class, and in MosaicML Streaming's format if installed."""
    writer: Any = None
    if Streaming.installed():
        from streaming import MDSWriter

        writer = MDSWriter(out=str(folder / "mds"), columns={"key": "str", "jpg": "bytes"}, size_limit=1 << 24)
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                if extension != "jpg" or file is None:
                    continue
                data = file.read()
                target = folder / "images" / f"class-{int(key[-1:]) if key[-1:].isdigit() else 0}" / f"{key}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                if writer is not None:
                    writer.write({"key": key, "jpg": data})
    if writer is not None:
        writer.finish()
