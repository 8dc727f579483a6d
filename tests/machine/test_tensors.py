"""What a work tile of queries, or of keys, has of each tensor: rows, head, split, and what is an argument."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsim.machine.grid import tile_at, tile_count
from flashsim.machine.tiles import Coordinates, HbmTile, WorkTile, walk_of
from flashsim.problem import AttentionProblem, allowed
from flashsim.schedules import Grid, Kernel
from flashsim.schedules.tensors import TENSORS, WIDTHS, Tensor

PROBLEM = AttentionProblem(
    batch=2, heads_q=6, heads_kv=2, seqlen_q=150, seqlen_k=230, head_dim=40, head_dim_v=24, dtype="bf16"
)
M, N = 64, 32
OWN = {
    "dK_expanded": Tensor("keys", "head_dim"),
    "O_partial": Tensor("queries", "head_dim_v", "fp32", splits=True),
    "S": Tensor("queries", "keys"),
}


def kernel(grid: Grid, **fields: Any) -> Kernel:
    given: dict[str, Any] = {"name": "k", "roles": (), "shared": lambda cta: None, "BLOCK_M": M, "BLOCK_N": N}
    return Kernel(**given | {"grid": grid, "mma": "mma.sync", "copy": "cp.async", "workspace": OWN} | fields)


def work_tile(kernel: Kernel, block: int, head: int = 0, batch: int = 0, split: int = 0, first: int = 0) -> WorkTile:
    return WorkTile(PROBLEM, kernel, Coordinates(block, head, batch, split), 0, first)


def place(tile: HbmTile) -> tuple[str, int, int, tuple[int, int], tuple[int, int]]:
    return tile.tensor, tile.batch, tile.head, tile.origin, tile.shape


# What is an argument.


@pytest.mark.parametrize(
    ("grid", "free"),
    [
        (
            Grid(),
            {"Q": (), "O": (), "LSE": (), "dO": (), "K": ("block",), "V": ("block",), "dK": ("block",),
             "O_partial": ("split",), "S": ("block",), "dK_expanded": ("block",)},
        ),
        (
            Grid(splits=3),
            {"Q": (), "K": ("block",), "O_partial": ()},
        ),
        (
            Grid(over="keys"),
            {"Q": ("block",), "O": ("block",), "LSE": ("block",), "dO": ("block",), "dQ": ("block",), "K": (),
             "V": (), "dK": (), "S": ("block",), "O_partial": ("split", "block"), "dK_expanded": ()},
        ),
        (
            Grid(over="keys", heads="kv"),
            {"Q": ("head", "block"), "K": (), "dV": (), "dK_expanded": ("head",),
             "O_partial": ("head", "split", "block")},
        ),
        (
            Grid(heads="kv"),
            {"Q": ("head",), "K": ("block",)},
        ),
    ],
    ids=["queries", "splits", "keys", "keys of KV heads", "queries of KV heads"],
)  # fmt: skip
def test_what_a_work_tile_does_not_fix_is_an_argument(grid: Grid, free: dict[str, tuple[str, ...]]) -> None:
    one = kernel(grid)
    assert {name: one.arguments(name) for name in free} == free
    assert {name for name in free if one.streams(name)} == {name for name in free if "block" in free[name]}


def test_what_work_tiles_of_one_head_have_in_common() -> None:
    """K and V of all blocks of queries; Q and dO of all blocks of keys; scores are nobody else's."""
    names = ("Q", "K", "V", "O", "dO", "S", "dK_expanded")
    assert {n for n in names if kernel(Grid()).is_common(n)} == {"K", "V", "dK_expanded"}
    assert {n for n in names if kernel(Grid(over="keys")).is_common(n)} == {"Q", "O", "dO"}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("K", (), r"K of a work tile takes 1 numbers \(block\), got 0"),
        ("K", (0, 1), r"K of a work tile takes 1 numbers \(block\), got 2"),
    ],
)
def test_wrong_numbers_of_arguments_are_named(name: str, given: tuple[int, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        getattr(work_tile(kernel(Grid()), 0), name)(*given)


def test_an_unknown_tensor_is_told_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"unknown tensor 'LES', did you mean 'LSE'\? \(allowed: Q, K, V, .*S\)"):
        _ = work_tile(kernel(Grid()), 0).LES


def test_a_tensor_of_another_kernel_s_workspace_is_unknown() -> None:
    with pytest.raises(AttributeError, match="unknown tensor 'O_partial'"):
        _ = work_tile(kernel(Grid(), workspace={}), 0).O_partial


# Where the parts lie.


def test_a_block_of_queries() -> None:
    """Query head 4 of 6 reads KV head 1 of 2; its KV tiles come from the last block to the first."""
    tile = work_tile(kernel(Grid()), block=2, head=4, batch=1, first=10)
    assert (tile.first, tile.last, tile.count) == (10, 17, 8)
    assert place(tile.Q) == ("Q", 1, 4, (128, 0), (M, 40))
    assert place(tile.O) == ("O", 1, 4, (128, 0), (M, 24))
    assert place(tile.LSE) == ("LSE", 1, 4, (128, 0), (M, 1))
    assert place(tile.K(10)) == ("K", 1, 1, (224, 0), (N, 40))
    assert place(tile.V(17)) == ("V", 1, 1, (0, 0), (N, 24))
    assert place(tile.S(11)) == ("S", 1, 4, (128, 192), (M, N))
    assert tile.origin(11) == (128, 192)
    assert str(tile) == "query block 2 of head 4, batch 1"


def test_a_block_of_keys() -> None:
    tile = work_tile(kernel(Grid(over="keys")), block=7, head=4, batch=1, first=4)
    assert (tile.first, tile.last) == (4, 6)
    assert place(tile.K) == ("K", 1, 1, (224, 0), (N, 40))
    assert place(tile.dV) == ("dV", 1, 1, (224, 0), (N, 24))
    assert place(tile.dK_expanded) == ("dK_expanded", 1, 4, (224, 0), (N, 40))
    assert place(tile.Q(4)) == ("Q", 1, 4, (128, 0), (M, 40))
    assert place(tile.LSE(6)) == ("LSE", 1, 4, (0, 0), (M, 1))
    assert tile.origin(5) == (64, 224)
    assert str(tile) == "key block 7 of head 4, batch 1"


def test_a_block_of_keys_of_a_kv_head_reads_each_of_its_query_heads() -> None:
    tile = work_tile(kernel(Grid(over="keys", heads="kv")), block=0, head=1, batch=1)
    assert [place(tile.dK_expanded(head))[1:3] for head in range(3)] == [(1, 3), (1, 4), (1, 5)]
    assert place(tile.dK)[2] == 1
    assert place(tile.Q(2, tile.last))[2:4] == (5, (0, 0))


@pytest.mark.parametrize("over", ["queries", "keys"])
@pytest.mark.parametrize("j", [9, 10 + 8])
def test_a_tile_of_the_inner_loop_that_is_not_there(over: str, j: int) -> None:
    tile = work_tile(kernel(Grid(over=over)), block=0, first=10)  # type: ignore[arg-type]
    what, last = ("KV", 17) if over == "queries" else ("Q", 12)
    with pytest.raises(IndexError, match=f"{what} tile {j} is none of this work tile's, which are 10 to {last}"):
        (tile.K if over == "queries" else tile.Q)(j)


def test_padded_head_dims_are_read_as_zeros_and_not_moved() -> None:
    tile = work_tile(kernel(Grid(), head_dim=64, head_dim_v=32), block=2).Q
    assert (tile.shape, tile.size_byte) == ((M, 64), 22 * 40 * 2)
    tensors = {"Q": np.random.default_rng(0).standard_normal((2, 150, 6, 40))}
    read = tile.read(tensors)
    assert np.array_equal(read[:22, :40], tensors["Q"][0, 128:, 0])
    assert not read[22:].any()
    assert not read[:, 40:].any()


def test_k_and_v_may_be_kept_in_8_bits() -> None:
    tile = work_tile(kernel(Grid(), kv_dtype="fp8"), block=0)
    full = [part.size_byte / WIDTHS[part.dtype] for part in (tile.Q, tile.K(1), tile.V(1))]
    assert full == [M * 40, N * 40, N * 24]
    assert [part.dtype for part in (tile.Q, tile.K(1), tile.V(1), tile.O)] == ["bf16", "fp8", "fp8", "bf16"]


# Splits.


@given(st.integers(1, 12), st.sampled_from(["full", "causal", "window:40,3", "documents:30+120"]), st.integers(0, 2))
def test_splits_divide_the_kv_tiles_of_a_block_between_them(splits: int, mask: str, block: int) -> None:
    """All of them once, in order, each split with as many as the first but for the last ones; partial where the mask
    cuts through a tile."""
    problem = replace(PROBLEM, mask=mask, seqlen_k=150)
    whole = walk_of(kernel(Grid()), problem, Coordinates(block, 0, 0))
    parts = [walk_of(kernel(Grid(splits=splits)), problem, Coordinates(block, 0, 0, n)) for n in range(splits)]
    assert [pair for part in parts for pair in part] == list(whole)
    sizes = [part.count for part in parts]
    each = -(-whole.count // splits)
    assert sizes == [max(0, min(each, whole.count - n * each)) for n in range(splits)]
    rows = np.arange(block * M, min(block * M + M, 150))
    for part in parts:
        for n, partial in part:
            assert partial == (not allowed(problem, rows, np.arange(n * N, n * N + N)).all())


def test_parts_of_splits_are_tensors_of_their_own() -> None:
    first, second = (work_tile(kernel(Grid(splits=2)), 0, split=split).O_partial for split in (0, 1))
    assert (first.split, second.split, first.key == second.key) == (0, 1, False)
    tensors = {"O_partial": np.zeros((2, 2, 150, 6, 24))}
    second.write(tensors, np.ones((M, 24)))
    assert (tensors["O_partial"][0].sum(), tensors["O_partial"][1].sum()) == (0, M * 24)
    combining = work_tile(kernel(Grid()), 0)
    assert [combining.O_partial(n).split for n in (0, 1)] == [0, 1]


def test_the_grid_gives_out_every_split_of_a_block_before_the_next_block() -> None:
    one = kernel(Grid(splits=2))
    at = tile_at(one, PROBLEM)
    assert tile_count(one, PROBLEM) == 3 * 6 * 2 * 2
    assert [at(n) for n in (0, 1, 2, 6, 36)] == [(0, 0, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)]
    assert len({at(n) for n in range(72)}) == 72


@pytest.mark.parametrize(
    ("grid", "count"), [(Grid(over="keys"), 8 * 6 * 2), (Grid(over="keys", heads="kv"), 8 * 2 * 2), (Grid(), 3 * 6 * 2)]
)
def test_how_many_work_tiles_there_are(grid: Grid, count: int) -> None:
    assert tile_count(kernel(grid), PROBLEM) == count


# Sizes.


def test_sizes_in_device_memory() -> None:
    sizes = {name: tensor.size_byte(PROBLEM) for name, tensor in TENSORS.items()}
    assert {name: sizes[name] for name in ("Q", "K", "V", "O", "LSE")} == {
        name.upper(): size for name, size in PROBLEM.tensor_bytes.items()
    }
    assert OWN["O_partial"].size_byte(PROBLEM, splits=5) == 5 * 2 * 150 * 6 * 24 * 4
    assert OWN["S"].size_byte(PROBLEM, splits=5) == 2 * 150 * 6 * 230 * 2


def test_after_fp8_the_output_is_in_16_bits() -> None:
    narrow = AttentionProblem(batch=1, heads_q=1, seqlen_q=8, head_dim=16, dtype="fp8")
    assert {name: TENSORS[name].dtype_of(narrow) for name in ("Q", "O", "dO", "LSE")} == {
        "Q": "fp8", "O": "bf16", "dO": "bf16", "LSE": "fp32"
    }  # fmt: skip
