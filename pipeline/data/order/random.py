"""Counter-based random numbers: the same key always gives the same numbers, in any process and order.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorized over samples. There is no state,
so nothing has to be saved to resume, and neither batch size nor world size can change a draw.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 6
PERMUTED = 1 << 21  # numbers that are permuted to choose some of them: 70 bytes each


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32.

    Args:
        counter: ``[n, 4]`` uint32, one block per row.
        key: two 32-bit words.

    Returns:
        ``[n, 4]`` uint32.
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def mix(*values: int) -> tuple[int, int]:
    """Hashes any number of non-negative integers to two 32-bit key words (splitmix64)."""
    state = 0
    for word in values:
        state = (state ^ (int(word) & 0xFFFFFFFFFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
        state = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0xFFFFFFFF, state >> 32


def uniforms(ids: NDArray[np.uint64], count: int, *key: int, epochs: NDArray[np.int64] | int = 0) -> NDArray[np.float64]:
    """Draws uniform numbers in [0, 1) that depend only on a sample's id and the key.

    Args:
        ids: ``[n]`` uint64 sample ids.
        count: numbers per sample.
        key: integers that identify the draw, such as ``(seed, stream)``.
        epochs: the epoch of each sample, ``[n]`` or one for all; a batch may span two epochs.

    Returns:
        ``[n, count]`` float64 with 32 random bits each.
    """
    blocks = -(-count // 4)
    ids = np.asarray(ids, dtype=np.uint64)
    counter = np.zeros((len(ids), blocks, 4), dtype=np.uint32)
    counter[:, :, 0] = np.arange(blocks, dtype=np.uint32)
    counter[:, :, 1] = (ids & _LOW).astype(np.uint32)[:, None]
    counter[:, :, 2] = (ids >> _SHIFT).astype(np.uint32)[:, None]
    counter[:, :, 3] = np.asarray(epochs, dtype=np.uint32).reshape(-1, 1)
    values = philox(counter.reshape(-1, 4), mix(*key)).reshape(len(ids), blocks * 4)
    return values[:, :count].astype(np.float64) * 2.0**-32


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """Returns a permutation of ``range(n)`` that depends only on the key; stable across numpy versions."""
    blocks = -(-n // 2)
    counter = np.zeros((blocks, 4), dtype=np.uint32)
    index = np.arange(blocks, dtype=np.uint64)
    counter[:, 0] = (index & _LOW).astype(np.uint32)
    counter[:, 1] = (index >> _SHIFT).astype(np.uint32)
    values = philox(counter, mix(*key)).astype(np.uint64)
    draws = (values[:, 0::2] << _SHIFT | values[:, 1::2]).reshape(-1)[:n]
    return np.argsort(draws, kind="stable").astype(np.int64)


def choose(n: int, count: int, *key: int) -> NDArray[np.int64]:
    """Draws distinct numbers below ``n``; memory and time grow with the numbers drawn, not with ``n``.

    Up to :data:`PERMUTED` numbers these are the first of :func:`permutation`. Beyond, they are the images of ``0, 1, …`` under a
    keyed bijection: a Feistel network over the next power of four, applied again to what falls outside (Black and Rogaway,
    "Ciphers with arbitrary finite domains", CT-RSA 2002).

    Args:
        n: the numbers are below this.
        count: how many; all of them if there are fewer.
        key: integers that identify the draw.

    Returns:
        ``[min(count, n)]`` int64, ascending.
    """
    if count >= n:
        return np.arange(n, dtype=np.int64)
    if n <= PERMUTED:
        return np.sort(permutation(n, *key)[:count])
    values = np.arange(count, dtype=np.uint64)
    outside = np.ones(count, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], ((n - 1).bit_length() + 1) // 2, mix(*key))
        outside = values >= np.uint64(n)
    return np.sort(values.astype(np.int64))


def _feistel(values: NDArray[np.uint64], bits: int, key: tuple[int, int]) -> NDArray[np.uint64]:
    """A bijection of numbers of ``2 * bits`` bits."""
    half, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    left, right = values >> half, values & mask
    counter = np.zeros((len(values), 4), dtype=np.uint32)
    for number in range(_ROUNDS):
        counter[:, 0], counter[:, 1], counter[:, 2] = right & _LOW, right >> _SHIFT, number
        draws = philox(counter, key).astype(np.uint64)
        left, right = right, left ^ ((draws[:, 0] << _SHIFT | draws[:, 1]) & mask)
    return left << half | right
