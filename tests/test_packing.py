"""Packing of query heads into rows: the same attention, the same counts, and walks as counting one by one has them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsim.errors import InputError
from flashsim.masks import SPELLING
from flashsim.numerics.reference import attention_reference
from flashsim.packing import pack, packed, unpack
from flashsim.problem import AttentionProblem, allowed, flops_executed, kv_tiles, num_q_tiles
from flashsim.testing.problems import attention_problems

KINDS = [kind for kind in SPELLING if kind != "blocks"]
SIZES = {"batch": 2, "heads_q": 6, "heads_kv": 2, "seqlen_q": 9, "seqlen_k": 13, "head_dim": 16, "head_dim_v": 8}


def assert_same_attention(p: AttentionProblem) -> None:
    """The reference of the packed problem is the packed reference."""
    rng = np.random.default_rng(p.seqlen_q * p.seqlen_k)
    q = rng.standard_normal((p.batch, p.seqlen_q, p.heads_q, p.head_dim))
    k = rng.standard_normal((p.batch, p.seqlen_k, p.heads_kv, p.head_dim))
    v = rng.standard_normal((p.batch, p.seqlen_k, p.heads_kv, p.head_dim_v))
    group, other = p.heads_per_kv, packed(p)
    o, lse = attention_reference(q, k, v, p.mask)
    packed_o, packed_lse = attention_reference(pack(q, group), k, v, other.mask)
    np.testing.assert_allclose(packed_o, pack(o, group), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(packed_lse.swapaxes(1, 2), pack(lse.swapaxes(1, 2), group), rtol=1e-12, atol=1e-13)
    assert packed_o.shape == (p.batch, other.seqlen_q, other.heads_q, p.head_dim_v)


def assert_walks_by_counting(p: AttentionProblem, BLOCK_M: int, BLOCK_N: int) -> None:
    """The tiles of the packed problem, from what `p` lets each of their rows see."""
    other, group = packed(p), p.heads_per_kv
    columns = np.arange(-(-p.seqlen_k // BLOCK_N) * BLOCK_N)
    for batch in range(p.batch):
        of_query = allowed(p, np.arange(p.seqlen_q), columns, batch)
        of_row = np.array([of_query[row // group] for row in range(other.seqlen_q)])
        assert np.array_equal(allowed(other, np.arange(other.seqlen_q), columns, batch), of_row)
        for m_block in range(num_q_tiles(other, BLOCK_M)):
            tiles = of_row[m_block * BLOCK_M : (m_block + 1) * BLOCK_M].reshape(-1, len(columns) // BLOCK_N, BLOCK_N)
            visited = {n: not tiles[:, n].all() for n in range(tiles.shape[1]) if tiles[:, n].any()}
            assert dict(kv_tiles(other, m_block, BLOCK_M, BLOCK_N, batch)) == visited


def assert_same_counts(p: AttentionProblem) -> None:
    other = packed(p)
    assert other.flops == p.flops
    assert other.allowed_pairs * other.heads_q == p.allowed_pairs * p.heads_q
    assert other.pairs * other.heads_q == p.pairs * p.heads_q
    assert other.tensor_bytes == p.tensor_bytes
    assert other.mask_rule.by_batch == p.mask_rule.by_batch
    assert other.mask_rule.assumed == p.mask_rule.assumed
    assert other.mask_rule.kind == p.mask_rule.kind


@pytest.mark.parametrize("kind", [kind for kind in SPELLING if kind != "blocks"])
@given(data=st.data(), group=st.integers(2, 4), BLOCK_M=st.integers(1, 20), BLOCK_N=st.integers(1, 20))
@settings(max_examples=settings().max_examples // 2)
def test_packing_changes_nothing_but_the_tiles(
    kind: str, data: st.DataObject, group: int, BLOCK_M: int, BLOCK_N: int
) -> None:
    problems = attention_problems(masks=[kind], tile=(8, 8), max_tiles=(3, 4), head_dims=(8, 16), max_flops=2e5)
    p = data.draw(problems)
    p = dataclasses.replace(p, heads_q=group * p.heads_kv)
    assert_same_attention(p)
    assert_same_counts(p)
    assert_walks_by_counting(p, BLOCK_M, BLOCK_N)


@pytest.mark.parametrize(
    "mask",
    ["causal", "blocks:{}", "padding", "padding:13,4", "varlen-causal:9,0", "global:2+window:3,1", "butterfly"],
)
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_six_heads_on_two(mask: str, direction: str, tmp_path: Path) -> None:
    file = tmp_path / "blocks:of two.txt"
    file.write_text("4 5\n0 2\n\n1\n", encoding="utf-8")
    p = AttentionProblem(**SIZES, mask=mask.format(file), direction=direction)  # type: ignore[arg-type]
    other = packed(p)
    assert (other.heads_q, other.heads_kv, other.seqlen_q, other.seqlen_k) == (2, 2, 27, 13)
    assert other.mask == f"packed:3:{p.mask}" == str(other.mask_rule)
    assert_same_attention(p)
    assert_same_counts(p)
    assert_walks_by_counting(p, 4, 3)


def test_causal_halves_stay_exact() -> None:
    """The published convention has half pairs: 9 * 9 / 2 for each head."""
    p = AttentionProblem(**SIZES | {"seqlen_k": 9}, mask="causal")
    assert packed(p).pairs == 3 * p.pairs == 3 * 40.5
    assert packed(p).flops == p.flops == 2 * 2 * 6 * 81 * 24 // 2
    size = 2**24 - 1
    large = AttentionProblem(batch=3, heads_q=8, heads_kv=1, seqlen_q=size, head_dim=1, mask="causal")
    assert packed(large).flops == large.flops == 2 * 3 * 8 * size**2


def test_decode_reads_keys_once_for_all_heads_of_a_group() -> None:
    """What packing is for: with one query, the heads of a group fill rows of a tile that would be empty."""
    p = AttentionProblem(batch=1, heads_q=32, heads_kv=4, seqlen_q=1, seqlen_k=4096, head_dim=128, mask="causal")
    assert flops_executed(p, 64, 128) == 8 * flops_executed(packed(p), 64, 128)


def test_a_packed_problem_is_a_problem() -> None:
    p = packed(AttentionProblem(**SIZES, mask="window:3"))
    assert dataclasses.replace(p) == p
    assert packed(p) is p
    assert dataclasses.replace(p, seqlen_q=30).mask_rule == p.mask_rule
    with pytest.raises(InputError, match="mask: 28 packed rows are not a multiple of 3, the rows of a query"):
        dataclasses.replace(p, seqlen_q=28)
    with pytest.raises(InputError, match="a packed mask cannot be packed"):
        packed(dataclasses.replace(p, heads_q=4))


def test_nothing_to_pack() -> None:
    p = AttentionProblem(**SIZES | {"heads_kv": 6})
    assert packed(p) is p


def test_too_many_rows() -> None:
    with pytest.raises(InputError, match="seqlen_q: got 4294967294, must be a whole number from 1 to 2147483647"):
        packed(AttentionProblem(**SIZES | {"seqlen_q": 2**31 - 1, "heads_kv": 3}))


SHAPES = st.tuples(st.integers(1, 3), st.integers(0, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))


@given(SHAPES, st.booleans())
def test_where_each_row_goes(shape: tuple[int, int, int, int, int], with_dim: bool) -> None:
    """Row r of packed head h is query r // group of head h * group + r % group; and back."""
    batch, seqlen, heads_kv, group, dim = shape
    sizes = (batch, seqlen, heads_kv * group, dim)[: 3 + with_dim]
    tensor = np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)
    found = pack(tensor, group)
    assert found.shape == (batch, seqlen * group, heads_kv, dim)[: 3 + with_dim]
    assert found.dtype == tensor.dtype
    for row in range(seqlen * group):
        for head in range(heads_kv):
            expected = tensor[:, row // group, head * group + row % group]
            assert np.array_equal(found[:, row, head], expected)
    assert np.array_equal(unpack(found, group), tensor)


def test_one_kv_head_is_packed_without_a_copy() -> None:
    q = np.zeros((2, 5, 4, 8), np.float16)
    assert np.shares_memory(pack(q, 4), q)
    assert np.shares_memory(unpack(pack(q, 4), 4), q)
    assert np.shares_memory(pack(q, 1), q)


@pytest.mark.parametrize(
    ("shape", "group", "lines"),
    [
        ((2, 6, 5, 4), 2, ("tensor: heads 5 is not a multiple of group = 2",)),
        ((2, 5, 6), 0, ("group: got 0, must be a whole number from 1",)),
        ((2, 5, 6), True, ("group: got True, must be a whole number from 1",)),
        (
            (6, 6),
            2.0,
            (
                "tensor: must have 4 dimensions (batch, seqlen, heads, head_dim), or the first 3 of them, "
                "got shape (6, 6)",
                "group: got 2.0, must be a whole number from 1",
            ),
        ),
    ],
)
def test_what_cannot_be_packed(shape: tuple[int, ...], group: int, lines: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        pack(np.zeros(shape), group)
    assert caught.value.problems == lines


def test_what_cannot_be_unpacked() -> None:
    with pytest.raises(InputError, match="tensor: seqlen 5 is not a multiple of group = 2"):
        unpack(np.zeros((1, 5, 2, 4)), 2)
