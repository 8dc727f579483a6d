"""Masks: the walk over KV tiles and the number of pairs follow from `allowed`, which is checked against definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsim.errors import InputError
from flashsim.masks import SPELLING, Mask, parse_mask
from flashsim.masks.blocks import BlockList
from flashsim.masks.packed import Packed
from flashsim.masks.walk import KVWalk
from flashsim.problem import AttentionProblem
from flashsim.testing.masks import KINDS_WITH_NUMBERS, LARGEST, mask_text

BY_BATCH = ("padding", "varlen", "varlen-causal")


@st.composite
def masks_and_sizes(draw: st.DrawFn, kind: str) -> tuple[Mask, int, int, int]:
    """(mask, seqlen_q, seqlen_k, batch entry); the mask may be packed."""
    mask, seqlen_q, seqlen_k, batch = draw(plain_masks_and_sizes(kind))
    group = draw(st.sampled_from([1, 1, 2, 3, 8]))
    return (mask, seqlen_q, seqlen_k, batch) if group == 1 else (Packed(group, mask), seqlen_q * group, seqlen_k, batch)


@st.composite
def plain_masks_and_sizes(draw: st.DrawFn, kind: str) -> tuple[Mask, int, int, int]:
    seqlen_q, seqlen_k = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    numbers = st.integers(0, 80)
    if kind == "documents":
        lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
        return parse_mask("documents:" + "+".join(map(str, lengths))), sum(lengths), sum(lengths), 0
    if kind == "blocks":
        block_q, block_k = draw(st.integers(1, 20)), draw(st.integers(1, 20))
        columns = st.frozensets(st.integers(0, -(-seqlen_k // block_k) - 1))
        rows = [draw(columns) for _ in range(-(-seqlen_q // block_q))]
        return BlockList("drawn", block_q, block_k, tuple(rows)), seqlen_q, seqlen_k, 0
    both = min(seqlen_q, seqlen_k)
    lengths = f"{draw(st.integers(0, both))},{both}"
    text = {
        "window": f"window:{draw(numbers)},{draw(numbers)}",
        "prefix": f"prefix:{draw(numbers)}",
        "chunked": f"chunked:{1 + draw(numbers)}",
        "global": f"global:{draw(numbers)}+window:{draw(numbers)},{draw(numbers)}",
        "butterfly": f"butterfly:{1 + draw(numbers)}",
        "padding": draw(st.sampled_from(["padding", f"padding:{min(3, seqlen_k)},{seqlen_k}"])),
        "varlen": f"varlen:{lengths}",
        "varlen-causal": f"varlen-causal:{lengths}",
    }.get(kind, kind)
    return parse_mask(text), seqlen_q, seqlen_k, draw(st.sampled_from([0, 1])) if kind in BY_BATCH else 0


@pytest.mark.parametrize("kind", SPELLING)
@given(data=st.data(), BLOCK_M=st.integers(1, 40), BLOCK_N=st.integers(1, 40))
@settings(max_examples=settings().max_examples // 2)
def test_the_walk_visits_what_is_allowed(kind: str, data: st.DataObject, BLOCK_M: int, BLOCK_N: int) -> None:
    mask, seqlen_q, seqlen_k, batch = data.draw(masks_and_sizes(kind))
    columns = -(-seqlen_k // BLOCK_N) * BLOCK_N
    for first in range(0, seqlen_q, BLOCK_M):
        rows = range(first, min(first + BLOCK_M, seqlen_q))
        visible = mask.allowed(np.array(rows), np.arange(columns), seqlen_q, seqlen_k, batch)
        tiles = visible.reshape(len(rows), -1, BLOCK_N)
        visited = {n: not tiles[:, n].all() for n in range(tiles.shape[1]) if tiles[:, n].any()}
        walk = mask.walk(rows, BLOCK_N, seqlen_q, seqlen_k, batch)
        assert dict(walk) == visited
        assert walk.count == len(visited)
        assert list(walk.blocks[: walk.partial]) == sorted(walk.blocks[: walk.partial], reverse=True)


@pytest.mark.parametrize("kind", SPELLING)
@given(data=st.data())
@settings(max_examples=settings().max_examples // 2)
def test_allowed_pairs_are_counted(kind: str, data: st.DataObject) -> None:
    mask, seqlen_q, seqlen_k, batch = data.draw(masks_and_sizes(kind))
    visible = mask.allowed(np.arange(seqlen_q), np.arange(seqlen_k + 5), seqlen_q, seqlen_k, batch)
    assert mask.allowed_pairs(seqlen_q, seqlen_k, batch) == np.sum(visible)
    assert not visible[:, seqlen_k:].any()
    assert mask.by_batch == (mask.kind in BY_BATCH)
    if mask.kind not in ("full", "causal"):
        assert mask.twice_counted_pairs(seqlen_q, seqlen_k, batch) == 2 * np.sum(visible)


Rule = Callable[[int, int, int, int], bool]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("full", lambda i, c, q, k: True),
        ("causal", lambda i, c, q, k: c - k <= i - q),
        ("window:3", lambda i, c, q, k: 0 <= (i - q) - (c - k) <= 3),
        ("window:3,2", lambda i, c, q, k: -2 <= (i - q) - (c - k) <= 3),
        ("prefix:4", lambda i, c, q, k: c < 4 or c - k <= i - q),
        ("chunked:5", lambda i, c, q, k: i // 5 == c // 5),
        ("global:2+window:1,1", lambda i, c, q, k: c < 2 or i < 2 or abs((i - q) - (c - k)) <= 1),
    ],
)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(17, 17), (9, 17), (17, 9)])
def test_what_a_mask_means(text: str, rule: Rule, seqlen_q: int, seqlen_k: int) -> None:
    visible = parse_mask(text).allowed(np.arange(seqlen_q), np.arange(seqlen_k), seqlen_q, seqlen_k)
    expected = [[rule(i, c, seqlen_q, seqlen_k) for c in range(seqlen_k)] for i in range(seqlen_q)]
    assert visible.tolist() == expected


def test_documents_see_themselves() -> None:
    visible = parse_mask("documents:2+3").allowed(np.arange(5), np.arange(5), 5, 5)
    assert visible.tolist() == [[(i < 2) == (c < 2) for c in range(5)] for i in range(5)]


def test_padding_is_a_length_for_each_sequence() -> None:
    given_lengths, drawn = parse_mask("padding:3,5"), parse_mask("padding")
    for batch, length in enumerate((3, 5)):
        assert (
            given_lengths.allowed(np.arange(2), np.arange(6), 2, 6, batch).tolist()
            == [[c < length for c in range(6)]] * 2
        )
    lengths = [drawn.allowed_pairs(1, 512, batch) for batch in range(2000)]
    assert set(lengths) == set(range(492, 512))
    assert [drawn.allowed_pairs(1, 5, batch) for batch in range(100)] == [
        drawn.allowed_pairs(1, 5, b) for b in range(100)
    ]
    assert set(range(5)) == {drawn.allowed_pairs(1, 5, batch) for batch in range(100)}


@pytest.mark.parametrize(("text", "causal"), [("varlen:3,0,6", False), ("varlen-causal:3,0,6", True)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(6, 6), (9, 7), (7, 9)])
def test_varlen_sequences_see_their_own_part(text: str, causal: bool, seqlen_q: int, seqlen_k: int) -> None:
    mask = parse_mask(text)
    assert mask.complaints(3, seqlen_q, seqlen_k) == []
    for batch, length in enumerate((3, 0, 6)):
        visible = mask.allowed(np.arange(seqlen_q), np.arange(seqlen_k), seqlen_q, seqlen_k, batch)
        assert visible.tolist() == [
            [i < length and c < length and (c <= i or not causal) for c in range(seqlen_k)] for i in range(seqlen_q)
        ]


def test_queries_past_the_end_of_a_sequence_visit_nothing() -> None:
    """And a tile with rows on both sides of the end masks everything that it visits."""
    for text, last in (("varlen:100,0", (3, 2, 1, 0)), ("varlen-causal:100,0", (3, 2, 1, 0))):
        mask = parse_mask(text)
        assert mask.walk(range(128, 192), 32, 256, 256, 0) == KVWalk((), 0)
        assert mask.walk(range(100, 101), 32, 256, 256, 0) == KVWalk((), 0)
        assert mask.walk(range(64), 32, 256, 256, 1) == KVWalk((), 0)
        assert list(mask.walk(range(64, 128), 32, 256, 256, 0)) == [(block, True) for block in last]
    assert list(parse_mask("varlen:100,0").walk(range(64), 32, 256, 256, 0)) == [
        (3, True),
        *((b, False) for b in (2, 1, 0)),
    ]
    assert list(parse_mask("varlen-causal:100,0").walk(range(64), 32, 256, 256, 0)) == [(1, True), (0, True)]


def test_butterfly_blocks() -> None:
    """Distances 0, 1, 2, 4, ...: the factors of a butterfly matrix; then sums of two."""
    mask = parse_mask("butterfly:64")
    seen = mask.allowed(np.array([5 * 16]), np.arange(256), 256, 256)[0].reshape(16, 16)
    assert [block for block in range(16) if seen[block].all()] == [1, 4, 5, 7]
    assert not seen.all(axis=1).sum() - 4


def test_published_butterfly_rows_have_one_density() -> None:
    """The number of keys a query is the default, whatever the length."""
    mask = parse_mask("butterfly")
    for seqlen in (512, 1024, 4096, 16384):
        assert mask.allowed_pairs(seqlen, seqlen) / seqlen == pytest.approx(330, rel=0.03)


@pytest.mark.parametrize(
    ("tiles", "walk"),
    [
        ({}, KVWalk((), 0)),
        ({3: True, 2: False, 1: False, 0: True}, KVWalk((3, 2, 1, 0), 1, 1)),
        ({3: True, 2: True}, KVWalk((3, 2), 2)),
        ({4: False, 2: True, 1: False}, KVWalk((2, 4, 1), 1)),
    ],
)
def test_partial_tiles_come_first_or_last(tiles: dict[int, bool], walk: KVWalk) -> None:
    found = KVWalk.of(tiles)
    assert (tuple(found.blocks), found.partial, found.partial_end) == (
        tuple(walk.blocks),
        walk.partial,
        walk.partial_end,
    )


def test_what_a_text_leaves_open_is_said() -> None:
    assert parse_mask("butterfly").assumed == "330 keys a query, inferred from published times"
    assert parse_mask("padding").assumed == "key lengths drawn from [seqlen_k - 20, seqlen_k), always the same"
    for text in ("butterfly:330", "padding:3", "causal", "window:1"):
        assert parse_mask(text).assumed is None


# Text.


@pytest.mark.parametrize(
    "text",
    ["full", "causal", "butterfly", "window:7,0", "window:7,3", "prefix:5", "chunked:64", "documents:3+4",
     "butterfly:330", "padding", "padding:3,0", "global:4+window:8,1", "varlen:0", "varlen:3,0", "varlen-causal:3,40",
     "packed:4:window:7,3", "packed:2:varlen-causal:3,0", "packed:2:padding", "packed:8:documents:3+4"],
)  # fmt: skip
def test_a_mask_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_mask(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("casual", "mask: unknown mask 'casual', did you mean 'causal'?"),
        ("causal:3", "mask: 'causal:3': nothing follows the name; it is written causal"),
        ("window", "mask: 'window': a number is missing; it is written window:LEFT[,RIGHT]"),
        ("window:1,2,3", "mask: 'window:1,2,3': there are too many numbers"),
        ("window:-1", "mask: 'window:-1': '-1' is not a whole number from 0 to 2147483647"),
        ("window:1e3", "'1e3' is not a whole number"),
        ("window:99999999999999999999", "is not a whole number"),
        ("chunked:0", "'0' is not a whole number from 1"),
        ("documents:3+", "'' is not a whole number from 1"),
        ("global:3", "mask: 'global:3': the window is missing; it is written global:N+window:LEFT[,RIGHT]"),
        ("blocks", "mask: 'blocks': the file is missing; it is written blocks:FILE"),
        ("blocks:nowhere.txt", "mask: nowhere.txt cannot be read"),
        ("varlen", "mask: 'varlen': a number is missing; it is written varlen:LEN,..."),
        ("varlen-causal:3,-1", "'-1' is not a whole number from 0 to 2147483647; it is written varlen-causal:LEN,..."),
        ("packed", "mask: 'packed': a number is missing; it is written packed:GROUP:MASK"),
        ("packed:0:full", "'0' is not a whole number from 1"),
        ("packed:2", "mask: 'packed:2': the mask is missing; it is written packed:GROUP:MASK"),
        ("packed:2:", "mask: 'packed:2:': the mask is missing"),
        ("packed:2:packed:2:full", "a packed mask cannot be packed; it is written packed:GROUP:MASK"),
        ("packed:2:casual", "mask: unknown mask 'casual', did you mean 'causal'?"),
        ("packed:2:window", "mask: 'window': a number is missing; it is written window:LEFT[,RIGHT]"),
        (None, "mask: must be text, got NoneType"),
    ],
)
def test_a_text_that_is_no_mask(text: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_mask(text)
    assert str(caught.value).startswith("mask: ")
    assert message in str(caught.value)


def test_a_block_list(tmp_path: Path) -> None:
    path = tmp_path / "blocks.txt"
    path.write_text("# sizes\n32 64\n0\n\n0 2 # the last\n", encoding="utf-8")
    mask = parse_mask(f"blocks:{path}")
    visible = mask.allowed(np.array([0, 32, 64]), np.array([0, 64, 128]), 96, 130)
    assert visible.tolist() == [[True, False, False], [False, False, False], [True, False, True]]
    assert mask.complaints(1, 96, 130) == []
    assert mask.complaints(1, 97, 128) == [
        f"{path} has 3 rows of 32 queries, and 97 queries need 4",
        f"{path} lists block 2 of 64 keys, there are 128 keys",
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", ["{} is empty; its first line must be: block_q block_k"]),
        ("16\n", ["{}:1: must be the two sizes of a block, from 1"]),
        ("0 16\n", ["{}:1: must be the two sizes of a block, from 1"]),
        ("16 16\n2 1\n3 x -1\n", ["{}:2: the blocks must be rising: 2 1", "{}:3: 'x' is not a whole number",
                                 "{}:3: '-1' is not a whole number"]),
        ("16 16\n1 1\n", ["{}:2: the blocks must be rising: 1 1"]),
    ],
)  # fmt: skip
def test_a_block_list_with_mistakes(text: str, lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "blocks.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        parse_mask(f"blocks:{path}")
    assert list(caught.value.problems) == [f"mask: {line.format(path)}" for line in lines]


def test_what_does_not_fit_the_problem() -> None:
    assert parse_mask("documents:3+4").complaints(1, 7, 7) == []
    assert parse_mask("documents:3+4").complaints(1, 8, 8) == [
        "the documents have 7 tokens, not as many as there are queries (8) and keys (8)"
    ]
    assert parse_mask("padding:3,9").complaints(3, 8, 8) == [
        "padding has 2 lengths, the batch has 3 entries",
        "padding has a length of 9, there are 8 keys",
    ]
    assert parse_mask("varlen:3,8").complaints(2, 8, 8) == []
    assert parse_mask("varlen:3,9").complaints(3, 9, 8) == [
        "varlen has 2 lengths, the batch has 3 entries",
        "varlen has a length of 9, there are 9 queries and 8 keys",
    ]
    assert parse_mask("varlen:3,8,0").complaints(2, 8, 8) == ["varlen has 3 lengths, the batch has 2 entries"]
    assert parse_mask("varlen-causal:3,9").complaints(2, 8, 9) == [
        "varlen-causal has a length of 9, there are 8 queries and 9 keys"
    ]


def test_what_does_not_fit_a_packed_problem() -> None:
    assert parse_mask("packed:2:documents:3+4").complaints(1, 14, 7) == []
    assert parse_mask("packed:2:documents:3+4").complaints(1, 14, 14) == [
        "the documents have 7 tokens, not as many as there are queries (7) and keys (14)"
    ]
    assert parse_mask("packed:4:varlen:3").complaints(1, 14, 7) == [
        "14 packed rows are not a multiple of 4, the rows of a query"
    ]


def test_packed_is_no_kind_that_a_user_is_shown() -> None:
    assert not any("packed" in text for text in (*SPELLING, *SPELLING.values()))
    with pytest.raises(InputError) as caught:
        parse_mask("pack")
    assert "packed" not in str(caught.value)


@given(
    st.lists(st.integers(0, LARGEST), min_size=3, max_size=3),
    st.integers(1, 5),
    st.integers(1, 300),
    st.integers(1, 300),
)
@settings(max_examples=settings().max_examples // 2)
def test_every_kind_with_numbers_can_be_drawn(numbers: list[int], batch: int, seqlen_q: int, seqlen_k: int) -> None:
    assert {"varlen", "varlen-causal"} <= set(KINDS_WITH_NUMBERS)
    for kind in KINDS_WITH_NUMBERS:
        rows = seqlen_k if kind == "documents" else seqlen_q
        text = mask_text(kind, numbers, batch, rows, seqlen_k)
        problem = AttentionProblem(batch=batch, heads_q=1, seqlen_q=rows, seqlen_k=seqlen_k, head_dim=8, mask=text)
        assert problem.mask_rule.kind == kind


def test_drawn_varlen_masks_shrink_to_whole_sequences() -> None:
    assert mask_text("varlen", (0, 0, 0), 2, 7, 5) == "varlen:5,5"
    assert mask_text("varlen-causal", (1, 6, 4), 4, 7, 5) == "varlen-causal:4,5,1,4"
