"""Which elements of P dropout keeps: counter-based random bits that every kernel can make where it needs them.

Philox4x32-10 of "Parallel random numbers: as easy as 1, 2, 3" (Salmon, Moraes, Dror, Shaw, SC 2011), the function that
Triton has as `tl.philox` and that PyTorch draws with on GPUs. It turns a counter of four 32-bit words and a key of two
into four random words, and keeps no state: tiles, their order and the pass make no difference.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashsim.errors import InputError

Words = NDArray[np.uint64]
"""Numbers below 2**32; the wider type holds their products."""

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
"""What is added to the key after each round."""
LOW, HIGH = np.uint64(0xFFFFFFFF), np.uint64(32)

SEED = 0x243F6A8885A308D3
"""Of functions that are given none: the first 64 bits of pi's fraction. It fits a signed 64-bit argument."""


def philox4x32(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> tuple[Words, ...]:
    """The four words of each counter, arrays of the shape that the counter's parts broadcast to.

    Counter and key are whole numbers below 2**32, which is not checked.
    """
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        a, b = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> HIGH) ^ c1 ^ np.uint64(k0), b & LOW, (a >> HIGH) ^ c3 ^ np.uint64(k1), a & LOW
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_problems(p: object, seed: object) -> list[str]:
    """A line for a probability that is not in [0, 1), and one for a seed that has not 64 bits."""
    problems = []
    if isinstance(p, bool) or not isinstance(p, int | float | np.integer | np.floating) or not 0 <= p < 1:
        problems.append(f"dropout: got {p!r}, must be a number in [0, 1)")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        problems.append(f"dropout_seed: got {seed!r}, must be a whole number from 0 to 2**64 - 1")
    return problems


def _index(name: str, given: ArrayLike, dims: int, problems: list[str]) -> NDArray[np.int64]:
    array = np.asarray(given)
    if not array.size:
        array = array.astype(np.int64)
    if array.ndim != dims or array.dtype.kind not in "iu" or np.any(array < 0) or np.any(array >= 2**32):
        problems.append(f"{name}: must be {'whole numbers' if dims else 'a whole number'} from 0 to 2**32 - 1")
        return np.zeros(0, np.int64)
    return array.astype(np.int64)


def keep(
    rows: ArrayLike,  # (rows,)
    cols: ArrayLike,  # (cols,)
    batch: int,
    head: int,
    p: float,
    seed: int = SEED,
) -> NDArray[np.bool_]:
    """Boolean (len(rows), len(cols)): is element (row, col) of P kept, for a query head of a batch entry?

    It is if its word is >= p * 2**32, which is compared exactly, or in integers: >= ceil(p * 2**32). p = 0 keeps
    everything. Rows and columns count from the first query and key of the sequence, heads are query heads. The word is
    number col % 4 of Philox4x32-10 with

        counter = (col // 4, row, head, batch)        key = (seed mod 2**32, seed // 2**32)

    so that one call serves four neighboring keys. Kept elements are multiplied by 1 / (1 - p). Raises InputError for p
    outside of [0, 1), a seed outside of [0, 2**64) and indices outside of [0, 2**32).
    """
    problems = dropout_problems(p, seed)
    row, col = _index("rows", rows, 1, problems), _index("cols", cols, 1, problems)
    where = [_index(name, given, 0, problems) for name, given in (("batch", batch), ("head", head))]
    if problems:
        raise InputError(problems)
    if p == 0:
        return np.ones((len(row), len(col)), bool)
    groups, group = np.unique(col // 4, return_inverse=True)
    counter = (groups, row[:, None], where[1], where[0])
    least = np.uint64(math.ceil(float(p) * 2.0**32))
    words = philox4x32(counter, (int(seed) & 0xFFFFFFFF, int(seed) >> 32))
    kept = np.stack([word >= least for word in words], axis=2).reshape(len(row), 4 * len(groups))
    return kept[:, 4 * group + col % 4]
