"""The random bits of dropout: known answers, the published counter and key, frequencies, and nothing but the index."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsim.errors import InputError
from flashsim.numerics.philox import SEED, keep, philox4x32

KNOWN = [
    ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Counter and key, and the words: `philox4x32 10` in the kat_vectors file of the Random123 library."""


def word_of(row: int, col: int, batch: int, head: int, seed: int) -> int:
    """One element's word, in Python's integers, a round at a time."""
    counter, key = [col // 4, row, head, batch], [seed % 2**32, seed // 2**32]
    for n in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        k0, k1 = ((k + n * step) % 2**32 for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        counter = [
            right // 2**32 ^ counter[1] ^ k0, right % 2**32, left // 2**32 ^ counter[3] ^ k1, left % 2**32,
        ]  # fmt: skip
    return counter[col % 4]


@pytest.mark.parametrize(("given_", "expected"), KNOWN)
def test_known_answers(given_: str, expected: str) -> None:
    *counter, k0, k1 = (int(word, 16) for word in given_.split())
    assert [f"{int(word):08x}" for word in philox4x32(tuple(counter), (k0, k1))] == expected.split()


def test_known_answers_at_once() -> None:
    """Counters are independent of each other, and broadcast."""
    counters = np.array([[int(word, 16) for word in given_.split()[:4]] for given_, _ in KNOWN])
    alone = [philox4x32(tuple(counter), (5, 6)) for counter in counters]
    np.testing.assert_array_equal(np.transpose(philox4x32(tuple(counters.T), (5, 6))), alone)
    first, second = np.arange(3)[:, None], np.arange(2)
    words = philox4x32((first, second, 7, 8), (5, 6))
    assert all(word.shape == (3, 2) for word in words)
    assert [word[2, 1] for word in words] == list(philox4x32((2, 1, 7, 8), (5, 6)))


INDEX = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))


@given(INDEX, INDEX, INDEX, INDEX, st.integers(0, 2**64 - 1))
def test_an_element_is_kept_if_its_word_is_large_enough(row: int, col: int, batch: int, head: int, seed: int) -> None:
    """At the very threshold: p * 2**32 equal to the word keeps it, the next number above drops it."""
    word = word_of(row, col, batch, head, seed)
    assert keep([row], [col], batch, head, word / 2**32, seed).all()
    assert not keep([row], [col], batch, head, math.nextafter(word / 2**32, 1), seed).any()
    assert keep([row], [col], batch, head, 0.0, seed).all()


def test_the_threshold_at_both_ends() -> None:
    """The smallest p drops words of 0, of which there is none here; above (2**32 - 1) / 2**32 nothing is kept."""
    rows = cols = np.arange(64)
    assert keep(rows, cols, 0, 0, 0).all()
    assert keep(rows, cols, 0, 0, 5e-324).all()
    assert not keep(rows, cols, 0, 0, math.nextafter(1, 0)).any()
    assert not keep(rows, cols, 0, 0, (2**32 - 0.5) / 2**32).any()


@given(st.data())
def test_tiles_do_not_show(data: st.DataObject) -> None:
    """Any rows and columns, in any order, have the bits that they have among all."""
    whole = keep(np.arange(50), np.arange(70), 3, 2, 0.3)
    rows = data.draw(st.lists(st.integers(0, 49), max_size=9))
    cols = data.draw(st.lists(st.integers(0, 69), max_size=9))
    np.testing.assert_array_equal(keep(rows, cols, 3, 2, 0.3), whole[np.ix_(rows, cols)].reshape(len(rows), len(cols)))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.17, 0.5, 0.9])
def test_frequencies(p: float) -> None:
    """Of all, of each row, column and number of word: within 5 standard deviations."""
    kept = np.stack([keep(np.arange(256), np.arange(1024), b, h, p) for b in range(2) for h in range(2)])
    parts = [kept.mean(), *kept.mean(axis=(1, 2)), *kept.mean(axis=(0, 2)), *kept.mean(axis=(0, 1))]
    counts = [kept.size, *[kept[0].size] * 4, *[4 * 1024] * 256, *[4 * 256] * 1024]
    parts += [kept[..., word::4].mean() for word in range(4)]
    counts += [kept.size // 4] * 4
    assert (np.abs(np.array(parts) - (1 - p)) < 5 * np.sqrt(p * (1 - p) / np.array(counts))).all()


def test_neighbors_are_independent() -> None:
    """Bits of other rows, keys, heads, entries and seeds agree as often as chance has it."""
    rows, cols = np.arange(257), np.arange(1028)
    here = keep(rows, cols, 1, 2, 0.5)
    others = [here[1:], here[:, 1:], here[:, 4:], here.T[: len(rows)]]
    others += [keep(rows, cols, *at, 0.5) for at in ((2, 1), (1, 3), (0, 2), (2, 2))]
    seeds = (SEED + 1, SEED ^ 1 << 32, 0, SEED >> 32 | SEED % 2**32 << 32)
    others += [keep(rows, cols, 1, 2, 0.5, seed) for seed in seeds]
    for other in others:
        agree = other == here[: other.shape[0], : other.shape[1]]
        assert abs(agree.mean() - 0.5) < 5 * 0.5 / agree.size**0.5


def test_nothing_to_keep() -> None:
    assert keep([], np.arange(3), 0, 0, 0.5).shape == (0, 3)
    assert keep(np.arange(3), [], 0, 0, 0.5).shape == (3, 0)
    assert keep([], [], 0, 0, 0.0).shape == (0, 0)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        keep([-1], [[0]], 2**32, 0.5, 1.0, -3)  # type: ignore[arg-type]
    assert caught.value.problems == (
        "dropout: got 1.0, must be a number in [0, 1)",
        "dropout_seed: got -3, must be a whole number from 0 to 2**64 - 1",
        "rows: must be whole numbers from 0 to 2**32 - 1",
        "cols: must be whole numbers from 0 to 2**32 - 1",
        "batch: must be a whole number from 0 to 2**32 - 1",
        "head: must be a whole number from 0 to 2**32 - 1",
    )
    for p in (math.nan, -0.1, True, "0.1", None):
        with pytest.raises(InputError, match="dropout: got"):
            keep([0], [0], 0, 0, p)  # type: ignore[arg-type]
