"""Unit vectors of a folder of embeddings, read shard by shard, and work on them by threads with results that do not depend on
how many there are: every product is computed by one thread, in pieces that the data alone determine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.embeddings.reader import Embeddings
from pipeline.data.order.random import uniforms
from pipeline.errors import DataError

ROWS = 8192  # vectors of a product
_PRODUCTS, _FEWEST_ROWS = 1 << 25, 256  # products that a thread holds, unless so few vectors have more
_DRAW = 0x5E1EC7  # identifies the random draw
_SHORTEST, _LONGEST = 1e-30, 1e30  # lengths
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Vectors:
    """Embeddings of one vector per sample, scaled to length 1.

    A sample's *position* counts the embedded samples of all shards, in order.

    Attributes:
        embeddings: the folder.
        ends: position after the last sample of each shard, int64 ``[shards]``.
    """

    embeddings: Embeddings
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, embeddings: Embeddings) -> Vectors:
        """Checks that a folder has one vector per sample.

        Raises:
            DataError: it has patches, or nothing, or its files have other sizes than described.
        """
        where = str(embeddings.directory)
        if embeddings.spec.patches:
            raise DataError(
                "embeddings of patches cannot be compared as images", where=where, hint="Use `fovea embed --pool cls` or mean"
            )
        embeddings.check_sizes()
        ends = np.cumsum(embeddings.rows)
        if not len(ends) or not ends[-1]:
            raise DataError("the folder has no embeddings", where=where, hint="Use a folder of shards with samples")
        return cls(embeddings, ends)

    @property
    def total(self) -> int:
        """Number of embedded samples."""
        return int(self.ends[-1])

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self.embeddings.dim

    def first(self, shard: int) -> int:
        """Position of a shard's first sample."""
        return int(self.ends[shard - 1]) if shard else 0

    def read(self, shard: int) -> NDArray[np.float32]:
        """Returns the unit vectors of a shard, ``[n, dim]``; a vector of zeros stays one."""
        return unit(self.embeddings.read(shard)["embedding"])

    def blocks(self, rows: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yields the position of the first of consecutive samples, and their unit vectors ``[rows, dim]``, whatever the shards.

        The last block may have fewer. An array is valid until the next one is asked for.

        Args:
            rows: samples of a block.
        """
        block = np.empty((min(rows, self.total), self.dim), dtype=np.float32)
        first = filled = 0
        for shard in range(len(self.ends)):
            for piece in self.embeddings.batches(shard):
                values = unit(piece["embedding"])
                while len(values):
                    part = values[: len(block) - filled]
                    block[filled : filled + len(part)] = part
                    filled, values = filled + len(part), values[len(part) :]
                    if filled == len(block):
                        yield first, block
                        first, filled = first + filled, 0
        if filled:
            yield first, block[:filled]

    def column(self, name: str) -> NDArray[Any]:
        """Returns a column of all samples, by position."""
        return np.concatenate([self.embeddings.read(shard, (name,))[name] for shard in range(len(self.ends))])

    def numbers(self) -> NDArray[np.uint64]:
        """Returns the number of each sample, ``shard << 32 | row``, by position."""
        parts = [
            (np.uint64(shard) << np.uint64(32)) | self.embeddings.read(shard, ("row",))["row"].astype(np.uint64)
            for shard in range(len(self.ends))
        ]
        return np.concatenate(parts)

    def sample(self, count: int, seed: int) -> NDArray[np.float32]:
        """Returns about ``count`` vectors, chosen by a hash of their position and the seed: all, if there are no more.

        Args:
            count: how many.
            seed: of the choice.
        """
        share = count / self.total
        parts = []
        for shard in range(len(self.ends)):
            vectors = self.read(shard)
            if share < 1:
                positions = np.arange(self.first(shard), self.first(shard) + len(vectors), dtype=np.uint64)
                vectors = vectors[draws(positions, seed) < share]
            parts.append(vectors)
        return np.concatenate(parts)


def draws(positions: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """Returns one uniform number for each sample, ``[n]``; the same for a position and a seed."""
    return uniforms(positions, 1, seed, _DRAW)[:, 0]


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Returns vectors scaled to length 1, float32."""
    values = np.asarray(vectors, dtype=np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))
    extreme = (lengths > 0) & ((lengths < _SHORTEST) | (lengths > _LONGEST))  # whose length float32 cannot hold, or not well
    out = values / np.where((lengths > 0) & ~extreme, lengths, 1).astype(np.float32)[:, None]
    out[extreme] = values[extreme].astype(np.float64) / lengths[extreme, None]
    return out


def products(left: NDArray[np.float32], right: torch.Tensor) -> torch.Tensor:
    """Returns the products of some rows with the columns of a matrix, computed in pieces that the rows alone determine.

    Args:
        left: ``[n, dim]``.
        right: ``[dim, m]``.

    Returns:
        ``[n, m]``.
    """
    out = torch.empty(len(left), right.shape[1])
    for begin in range(0, len(left), ROWS):
        torch.mm(torch.from_numpy(np.ascontiguousarray(left[begin : begin + ROWS])), right, out=out[begin : begin + ROWS])
    return out


def best_products(left: NDArray[np.float32], right: torch.Tensor, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest products of each row with the columns of a matrix and their columns, without holding all products.

    Args:
        left: ``[n, dim]``.
        right: ``[dim, m]``.
        count: how many, the largest first.

    Returns:
        Products and columns, ``[n, count]`` each.
    """
    values, columns = torch.empty(len(left), count), torch.empty(len(left), count, dtype=torch.int64)
    rows = min(ROWS, max(_FEWEST_ROWS, _PRODUCTS // max(1, right.shape[1])))
    for begin in range(0, len(left), rows):
        part = slice(begin, begin + rows)
        own = products(left[part], right)
        best = own.max(dim=1, keepdim=True) if count == 1 else own.topk(count, dim=1)
        values[part], columns[part] = best.values, best.indices
    return values, columns


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Lets each thread compute its products alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(task: Callable[[_Task], _Result], tasks: Iterable[_Task], workers: int) -> Iterator[_Result]:
    """Yields the results of tasks in their order, computed by several threads, few ahead of those that are taken."""
    with one_thread_each(), ThreadPoolExecutor(workers, thread_name_prefix="fovea-curate") as pool:
        flying: list[Future[_Result]] = []
        try:
            for one in tasks:
                flying.append(pool.submit(task, one))
                if len(flying) > workers:
                    yield flying.pop(0).result()
            while flying:
                yield flying.pop(0).result()
        finally:
            for future in flying:
                future.cancel()
