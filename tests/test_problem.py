"""Sizes, counts and the walk over KV tiles, each against counting one by one."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashsim.errors import InputError
from flashsim.masks import KVWalk
from flashsim.problem import AttentionProblem, allowed, flops_executed, kv_tiles, num_q_tiles

LENGTHS = st.integers(1, 40)
BLOCKS = st.integers(1, 17)
MASK_NAMES = st.sampled_from(["full", "causal"])
"""The others are in test_masks.py."""


def problem(seqlen_q: int, seqlen_k: int | None = None, mask: str = "full") -> AttentionProblem:
    return AttentionProblem(batch=1, heads_q=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=1, mask=mask)


def sees(p: AttentionProblem, row: int, col: int) -> bool:
    """The masks' definition, one pair at a time; rows beyond the last one see what it sees."""
    row = min(row, p.seqlen_q - 1)
    return col < p.seqlen_k and (p.mask == "full" or col <= row + p.seqlen_k - p.seqlen_q)


def problems_of(**fields: object) -> tuple[str, ...]:
    given_fields = {"batch": 1, "heads_q": 8, "seqlen_q": 16, "head_dim": 64} | fields
    with pytest.raises(InputError) as caught:
        AttentionProblem(**given_fields)  # type: ignore[arg-type]
    return caught.value.problems


def test_defaults_follow_the_query_side() -> None:
    p = AttentionProblem(batch=2, heads_q=6, seqlen_q=10, head_dim=64)
    assert (p.heads_kv, p.seqlen_k, p.head_dim_v) == (6, 10, 64)
    assert (p.dtype, p.mask, p.direction, p.dropout) == ("fp16", "full", "fwd", 0.0)
    assert (p.heads_per_kv, p.softmax_scale, p.element_bytes) == (1, 0.125, 2)


def test_is_a_value() -> None:
    p = AttentionProblem(batch=2, heads_q=6, heads_kv=2, seqlen_q=10, head_dim=64, mask="causal", dtype="bf16")
    assert AttentionProblem(**dataclasses.asdict(p)) == p
    assert pickle.loads(pickle.dumps(p)) == p
    assert len({p, dataclasses.replace(p), dataclasses.replace(p, seqlen_q=11)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.batch = 3  # type: ignore[misc]


def test_numpy_integers_become_int() -> None:
    p = AttentionProblem(batch=np.int64(2), heads_q=4, seqlen_q=np.uint8(7), head_dim=8)  # type: ignore[arg-type]
    assert type(p.batch) is int
    assert type(p.seqlen_k) is int
    assert p == AttentionProblem(batch=2, heads_q=4, seqlen_q=7, head_dim=8)


def test_published_flops() -> None:
    """FlashAttention-3's benchmark: 16384 tokens, hidden size 2048; 4 * seqlen FLOP each, half if causal."""
    p = AttentionProblem(batch=2, heads_q=16, seqlen_q=8192, head_dim=128)
    assert p.flops == 16384 * 2048 * 4 * 8192
    assert 2 * dataclasses.replace(p, mask="causal").flops == p.flops


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "mask", "pairs", "allowed_pairs"),
    [
        (3, 5, "full", 15, 15),
        (4, 4, "causal", 8, 10),
        (3, 3, "causal", 4.5, 6),
        (2, 5, "causal", 8, 9),  # 2 * (3 + 5) / 2; rows see 4 and 5 keys
        (5, 2, "causal", 5, 3),  # 5 * (0 + 2) / 2; rows see 0, 0, 0, 1 and 2 keys
        (1, 1, "causal", 0.5, 1),
    ],
)
def test_pairs_by_hand(seqlen_q: int, seqlen_k: int, mask: str, pairs: float, allowed_pairs: int) -> None:
    p = AttentionProblem(
        batch=3, heads_q=4, heads_kv=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=6, head_dim_v=5, mask=mask
    )
    assert p.pairs == pairs
    assert p.allowed_pairs == allowed_pairs
    assert p.flops == 2 * 3 * 4 * pairs * 11


def test_flops_are_exact_beyond_float64() -> None:
    size = 2**31 - 1
    p = AttentionProblem(batch=size, heads_q=size, seqlen_q=size, head_dim=1, mask="causal")
    assert p.flops == 2 * size**4


def test_bytes_by_hand() -> None:
    p = AttentionProblem(
        batch=2, heads_q=6, heads_kv=3, seqlen_q=5, seqlen_k=7, head_dim=16, head_dim_v=8, dtype="bf16"
    )
    assert p.tensor_bytes == {"q": 1920, "k": 1344, "v": 672, "o": 960, "lse": 240}
    assert p.min_hbm_bytes == p.memory_bytes == 1920 + 1344 + 672 + 960 + 240


@given(LENGTHS, LENGTHS, MASK_NAMES)
@settings(max_examples=60, deadline=None)
def test_allowed_follows_the_definition(seqlen_q: int, seqlen_k: int, mask: str) -> None:
    p = problem(seqlen_q, seqlen_k, mask)
    expected = [[sees(p, row, col) for col in range(seqlen_k + 3)] for row in range(seqlen_q + 3)]
    visible = allowed(p, np.arange(seqlen_q + 3), np.arange(seqlen_k + 3))
    assert visible.dtype == np.bool_
    assert visible.tolist() == expected
    assert p.allowed_pairs == visible[:seqlen_q].sum()
    assert allowed(p, np.array([seqlen_q - 1]), np.array([seqlen_k - 1, 0])).tolist() == [[True, True]]


@given(LENGTHS, LENGTHS, BLOCKS, BLOCKS, MASK_NAMES)
@settings(max_examples=150, deadline=None)
def test_walk_visits_what_counting_says(seqlen_q: int, seqlen_k: int, BLOCK_M: int, BLOCK_N: int, mask: str) -> None:
    """Every tile with an allowed pair and no other, last to first, partial exactly where some pair is masked."""
    p = problem(seqlen_q, seqlen_k, mask)
    visited = 0
    for m_block in range(num_q_tiles(p, BLOCK_M)):
        rows = range(m_block * BLOCK_M, min((m_block + 1) * BLOCK_M, seqlen_q))
        expected = []
        for n_block in reversed(range(-(-seqlen_k // BLOCK_N) + 1)):
            pairs = [sees(p, row, n_block * BLOCK_N + c) for row in rows for c in range(BLOCK_N)]
            if any(pairs):
                expected.append((n_block, not all(pairs)))
        walk = kv_tiles(p, m_block, BLOCK_M, BLOCK_N)
        assert list(walk) == expected
        assert len(walk) == walk.count == len(expected)
        assert [(walk.block(i), walk.is_partial(i)) for i in range(len(walk))] == expected
        assert walk.partial == sum(partial for _, partial in expected), "partial tiles come first"
        visited += len(expected)
    assert flops_executed(p, BLOCK_M, BLOCK_N) == visited * 2 * BLOCK_M * BLOCK_N * 2


def test_rows_that_see_nothing_visit_no_tile() -> None:
    p = problem(256, 100, "causal")
    assert kv_tiles(p, 0, 64, 32) == KVWalk((), 0)
    assert list(kv_tiles(p, 2, 64, 32)) == [
        (1, True),
        (0, True),
    ]  # row 191 is the last of the tile and sees keys 0 .. 35


def test_walk_of_a_published_shape() -> None:
    """FA3's causal tile for head dim 128, 128 x 128, in the middle of 8448 keys: only the diagonal tile is masked."""
    p = problem(8448, None, "causal")
    assert kv_tiles(p, 30, 128, 128) == KVWalk(range(30, -1, -1), 1)
    assert kv_tiles(problem(8448), 30, 128, 176) == KVWalk(range(47, -1, -1), 0)
    assert flops_executed(p, 128, 128) == 66 * 67 // 2 * 2 * 128 * 128 * 2


@pytest.mark.parametrize("m_block", [-1, 2])
def test_walk_refuses_a_tile_that_does_not_exist(m_block: int) -> None:
    with pytest.raises(ValueError, match=f"m_block {m_block} with BLOCK_M 64 is outside of seqlen_q 128"):
        kv_tiles(problem(128), m_block, 64, 64)


def test_all_problems_are_reported_at_once() -> None:
    assert problems_of(
        batch=0, heads_q=True, seqlen_q=math.nan, head_dim=513, heads_kv="3", dtype="fp61", mask="casual", dropout=1.5
    ) == (
        "batch: got 0, must be a whole number from 1 to 2147483647",
        "heads_q: got True, must be a whole number from 1 to 2147483647",
        "seqlen_q: got nan, must be a whole number from 1 to 2147483647",
        "head_dim: got 513, must be a whole number from 1 to 512",
        "heads_kv: got '3', must be a whole number from 1 to 2147483647",
        "dtype: unknown dtype 'fp61', did you mean 'fp16'? (allowed: fp16, bf16, fp8)",
        "mask: unknown mask 'casual', did you mean 'causal'? (allowed: full, causal, window, prefix, chunked, "
        "documents, global, blocks, butterfly, padding, varlen, varlen-causal)",
        "dropout: got 1.5, must be a number in [0, 1)",
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads_kv", 3, "heads_kv: got 3, must divide heads_q = 8"),
        ("heads_kv", 16, "heads_kv: got 16, must divide heads_q = 8"),
        ("seqlen_k", 0, "seqlen_k: got 0, must be a whole number from 1 to 2147483647"),
        ("seqlen_k", 2**31, "seqlen_k: got 2147483648, must be a whole number from 1 to 2147483647"),
        ("head_dim_v", 64.0, "head_dim_v: got 64.0, must be a whole number from 1 to 512"),
        pytest.param(
            "batch", 10**5000, "batch: got a very large int, must be a whole number from 1 to 2147483647", id="huge"
        ),
        ("dtype", None, "dtype: must be text, got NoneType (allowed: fp16, bf16, fp8)"),
        ("direction", "fw", "direction: unknown direction 'fw', did you mean 'fwd'? (allowed: fwd, bwd, fwd+bwd)"),
        ("mask", "window", "mask: 'window': a number is missing; it is written window:LEFT[,RIGHT]"),
        ("dropout", False, "dropout: got False, must be a number in [0, 1)"),
        ("dropout", math.nan, "dropout: got nan, must be a number in [0, 1)"),
        ("dropout", "0", "dropout: got '0', must be a number in [0, 1)"),
    ],
)
def test_messages(field: str, value: object, message: str) -> None:
    assert problems_of(**{field: value}) == (message,)


def test_fp8_has_no_backward_pass() -> None:
    assert problems_of(dtype="fp8", direction="fwd+bwd") == ("direction: got 'fwd+bwd', fp8 has fwd only",)


def test_flops_and_tensors_of_each_direction() -> None:
    """2 B Hq P (D + Dv) forward, 2 B Hq P (3 D + 2 Dv) backward."""
    sizes = {
        "batch": 2,
        "heads_q": 4,
        "heads_kv": 2,
        "seqlen_q": 100,
        "seqlen_k": 300,
        "head_dim": 64,
        "head_dim_v": 32,
    }
    forward, backward, both = (AttentionProblem(**sizes, direction=d) for d in ("fwd", "bwd", "fwd+bwd"))  # type: ignore[arg-type]
    pairs = 2 * 4 * 100 * 300
    assert forward.flops == 2 * pairs * (64 + 32)
    assert backward.flops == 2 * pairs * (3 * 64 + 2 * 32)
    assert both.flops == forward.flops + backward.flops
    q, k, v, o, lse = (
        2 * 4 * 100 * 64 * 2,
        2 * 2 * 300 * 64 * 2,
        2 * 2 * 300 * 32 * 2,
        2 * 4 * 100 * 32 * 2,
        2 * 4 * 100 * 4,
    )
    assert forward.tensor_bytes == {"q": q, "k": k, "v": v, "o": o, "lse": lse}
    assert backward.tensor_bytes == forward.tensor_bytes | {"do": o, "dq": q, "dk": k, "dv": v}
    assert forward.min_hbm_bytes == q + k + v + o + lse
    assert both.min_hbm_bytes == forward.min_hbm_bytes + 2 * (q + k + v + o) + lse
    assert AttentionProblem(**sizes, dtype="fp8").tensor_bytes == {
        "q": q // 2,
        "k": k // 2,
        "v": v // 2,
        "o": o,
        "lse": lse,
    }


def test_a_default_does_not_repeat_the_mistake_it_copies() -> None:
    assert problems_of(heads_q=-1, seqlen_q=0, head_dim=0) == (
        "heads_q: got -1, must be a whole number from 1 to 2147483647",
        "seqlen_q: got 0, must be a whole number from 1 to 2147483647",
        "head_dim: got 0, must be a whole number from 1 to 512",
    )


@example(np.bool_(True))
@example(10**5000)
@given(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=5), st.integers(max_value=0), st.lists(LENGTHS))
)
@settings(max_examples=50, deadline=None)
def test_anything_but_a_positive_integer_is_refused(value: object) -> None:
    (message,) = problems_of(batch=value)
    assert message.startswith("batch: got ")


def test_flops_of_padded_sequences_are_summed_over_the_batch() -> None:
    p = AttentionProblem(batch=2, heads_q=3, seqlen_q=10, seqlen_k=8, head_dim=16, head_dim_v=8, mask="padding:3,8")
    assert (p.pairs, p.allowed_pairs) == (55, 55)
    assert p.flops == 2 * 3 * 110 * (16 + 8)
    assert kv_tiles(p, 0, 4, 4, batch=0).count == 1
    assert kv_tiles(p, 0, 4, 4, batch=1).count == 2
    assert flops_executed(p, 4, 4) == 3 * 3 * (1 + 2) * 2 * 4 * 4 * (16 + 8)


@pytest.mark.parametrize(
    ("mask", "pairs", "tiles"), [("varlen:3,0,8", 9 + 64, 1 + 4), ("varlen-causal:3,0,8", 6 + 36, 1 + 3)]
)
def test_flops_of_sequences_of_different_lengths_are_summed_over_the_batch(mask: str, pairs: int, tiles: int) -> None:
    """Those of the allowed pairs; a Q tile past the end of its sequence visits nothing."""
    p = AttentionProblem(batch=3, heads_q=4, heads_kv=2, seqlen_q=10, seqlen_k=8, head_dim=16, head_dim_v=8, mask=mask)
    assert p.pairs == p.allowed_pairs == pairs / 3
    assert p.flops == 2 * 4 * pairs * (16 + 8)
    assert flops_executed(p, 4, 4) == 4 * tiles * 2 * 4 * 4 * (16 + 8)


def test_a_mask_that_does_not_go_with_the_sizes() -> None:
    assert problems_of(mask="documents:3+4") == (
        "mask: the documents have 7 tokens, not as many as there are queries (16) and keys (16)",
    )


def test_importing_the_problem_does_not_import_numpy() -> None:
    code = "import sys, flashsim.problem; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
