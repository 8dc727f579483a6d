"""What `attention_problems` promises to draw is drawn, what it promises not to draw is not, and failures get small."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import find, given, settings

from flashsim.errors import InputError
from flashsim.problem import AttentionProblem
from flashsim.testing import attention_cases, attention_problems
from flashsim.testing.problems import ProblemOptions

TILED: dict[str, Any] = {
    "tile": (64, 32),
    "max_tiles": (3, 6),
    "head_dims": (16, 32, 40, 64),
    "masks": ("full", "causal"),
    "dtypes": ("fp16", "bf16"),
}
MANY = 1000
"""Derandomized: more of the same in a long run would prove nothing more."""
Promise = Callable[[AttentionProblem], bool]


def drawn(number: int = MANY, **options: Any) -> list[AttentionProblem]:
    problems: list[AttentionProblem] = []

    @settings(max_examples=number, derandomize=True, database=None, deadline=None)
    @given(attention_problems(**options))
    def collect(problem: AttentionProblem) -> None:
        problems.append(problem)

    collect()
    return problems


@functools.cache
def of_a_tile() -> list[AttentionProblem]:
    return drawn(**TILED)


@functools.cache
def of_any_tile() -> list[AttentionProblem]:
    return drawn()


def edges(block: int, tiles: int) -> list[int]:
    return [n * block + beside for n in range(1, tiles + 1) for beside in (-1, 0, 1)]


SINGLE = [(1, 1), (1, 3), (2, 1), (1, 239), (239, 1)]
RATIOS = [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2)]
PROMISES: dict[str, Promise] = {
    **{f"seqlen_q {n}": lambda p, n=n: p.seqlen_q == n for n in edges(64, 3)},
    **{f"seqlen_k {n}": lambda p, n=n: p.seqlen_k == n for n in edges(32, 6)},
    **{f"{a} x {b}": lambda p, a=a, b=b: (p.seqlen_q, p.seqlen_k) == (a, b) for a, b in SINGLE},
    **{f"{n} KV heads, {g} each": lambda p, n=n, g=g: (p.heads_kv, p.heads_per_kv) == (n, g) for n, g in RATIOS},
    **{
        f"{mask} {dtype} {head_dim}": lambda p, m=mask, t=dtype, d=head_dim: (p.mask, p.dtype, p.head_dim) == (m, t, d)
        for mask in ("full", "causal")
        for dtype in ("fp16", "bf16")
        for head_dim in (16, 32, 40, 64)
    },
    "primes": lambda p: p.seqlen_q in (61, 67, 97, 127, 131) and p.seqlen_k in (61, 67, 97, 127, 131),
    "no multiple": lambda p: p.seqlen_q % 64 > 1 and p.seqlen_k % 32 > 1,
    "more queries than keys": lambda p: p.seqlen_q > p.seqlen_k > 32 and p.mask == "causal",
    "more keys than queries": lambda p: p.seqlen_k > p.seqlen_q > 32 and p.mask == "causal",
    "as many queries as keys": lambda p: p.seqlen_q == p.seqlen_k > 32,
    "whole tiles": lambda p: p.seqlen_q % 64 == p.seqlen_k % 32 == 0,
    "one query": lambda p: p.seqlen_q == 1 and p.seqlen_k > 64,
    "one key": lambda p: p.seqlen_k == 1 and p.seqlen_q > 64,
    "two batches of three heads": lambda p: p.batch == 2 and p.heads_q == 3,
    "wider V": lambda p: p.head_dim_v > p.head_dim,
    "narrower V": lambda p: p.head_dim_v < p.head_dim,
    "the same V": lambda p: p.head_dim_v == p.head_dim,
}  # fmt: skip


@pytest.mark.parametrize("promise", PROMISES)
def test_with_a_tile(promise: str) -> None:
    assert any(map(PROMISES[promise], of_a_tile()))


@pytest.mark.parametrize("length", [1, 3, 7, 15, 17, 31, 33, 63, 65, 127, 129, 191, 193, 255, 257, 511, 513])
def test_without_a_tile_edges_of_all_tiles_are_drawn(length: int) -> None:
    assert any(problem.seqlen_q == length for problem in of_any_tile())
    assert any(problem.seqlen_k == length for problem in of_any_tile())


def test_limits() -> None:
    for problem in of_a_tile():
        lengths = problem.seqlen_q, problem.seqlen_k
        assert lengths in SINGLE or (lengths[0] <= 193 and lengths[1] <= 193)
    assert max(max(problem.seqlen_q, problem.seqlen_k) for problem in of_any_tile()) == 513
    for problem in of_a_tile() + of_any_tile():
        assert problem.flops <= 2e7
        assert problem.batch <= 2
        assert problem.heads_q <= 4


def test_few_problems_are_trivial() -> None:
    """A quarter has more than a tile on each side, a third ends beside the edge of a KV tile."""
    problems = of_a_tile()
    assert sum(problem.seqlen_q > 64 and problem.seqlen_k > 32 for problem in problems) > len(problems) / 4
    assert sum(problem.seqlen_q > 1 and problem.seqlen_k > 1 for problem in problems) > len(problems) / 2
    assert sum(problem.seqlen_k % 32 in (31, 0, 1) for problem in problems) > len(problems) / 3


NARROWED: dict[str, tuple[dict[str, Any], Promise]] = {
    "gqa": ({"gqa": False}, lambda p: p.heads_q == p.heads_kv),
    "same_head_dim": ({"same_head_dim": True}, lambda p: p.head_dim == p.head_dim_v),
    "same_seqlen": ({"same_seqlen": True}, lambda p: p.seqlen_q == p.seqlen_k),
    "blind_rows": ({"blind_rows": False, "masks": ("causal",)}, lambda p: p.seqlen_q <= p.seqlen_k),
    "max_flops": ({"max_flops": 1e5}, lambda p: p.flops <= 1e5),
    "max_flops, same": ({"max_flops": 1e5, "same_seqlen": True, "same_head_dim": True}, lambda p: p.flops <= 1e5),
    "head_dims": ({"head_dims": (8,)}, lambda p: p.head_dim == p.head_dim_v == 8),
    "masks": ({"masks": ["causal"]}, lambda p: p.mask == "causal"),
    "dtypes": ({"dtypes": ["bf16"]}, lambda p: p.dtype == "bf16"),
    "dropout": ({"dropout": (0.1, 0.5)}, lambda p: p.dropout in (0.1, 0.5)),
    "tile": ({"tile": (16, 8), "max_tiles": (1, 1)}, lambda p: p.seqlen_q in (*range(18), 239)),
}


@pytest.mark.parametrize("option", NARROWED)
def test_an_option_narrows(option: str) -> None:
    options, promise = NARROWED[option]

    @settings(max_examples=50)
    @given(attention_problems(**options))
    def holds(problem: AttentionProblem) -> None:
        assert promise(problem)

    holds()
    assert not all(map(promise, of_any_tile()))


SMALLEST = AttentionProblem(batch=1, heads_q=1, seqlen_q=1, seqlen_k=1, head_dim=16)
SHRINKS: dict[str, tuple[Promise, dict[str, Any]]] = {
    "anything": (lambda p: True, {}),
    "a second KV tile": (lambda p: p.seqlen_k > 32, {"seqlen_k": 33}),
    "a second Q tile": (lambda p: p.seqlen_q > 64, {"seqlen_q": 65}),
    "an odd tail": (lambda p: p.seqlen_k > 32 and p.seqlen_k % 32 != 0, {"seqlen_k": 33}),
    "causal": (lambda p: p.mask == "causal", {"mask": "causal"}),
    "rows without keys": (
        lambda p: p.mask == "causal" and p.seqlen_q > p.seqlen_k, {"mask": "causal", "seqlen_q": 2}
    ),
    "GQA": (lambda p: p.heads_per_kv == 3, {"heads_q": 3, "heads_kv": 1}),
    "two batches": (lambda p: p.batch == 2, {"batch": 2}),
    "a wider V": (lambda p: p.head_dim_v > p.head_dim, {"head_dim_v": 32}),
    "bf16": (lambda p: p.dtype == "bf16", {"dtype": "bf16"}),
}  # fmt: skip


@pytest.mark.parametrize("failure", SHRINKS)
def test_shrinks_to_the_smallest(failure: str) -> None:
    """In one of three searches; rarely one ends at the 239 keys that come whatever else was drawn."""
    promise, differs = SHRINKS[failure]
    fields = {name: getattr(SMALLEST, name) for name in SMALLEST.__dataclass_fields__}
    few = settings(max_examples=500, database=None, deadline=None)
    found = [find(attention_problems(**TILED), promise, random=Random(n), settings=few) for n in range(3)]
    assert AttentionProblem(**(fields | differs)) in found


def test_a_problem_is_drawn_in_less_than_five_milliseconds() -> None:
    """Of processor time, whatever else the machine does."""
    start = time.process_time()
    problems = drawn(100, **TILED)
    assert (time.process_time() - start) / len(problems) < 5e-3


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        attention_problems(
            tile=(64,),  # type: ignore[arg-type]
            max_tiles=(0, 3),
            head_dims=(64, 0),
            masks="full",
            dtypes=("fp61",),
            max_flops=1.0,
        )
    assert caught.value.problems == (
        "tile: got (64,), must be two whole numbers from 1",
        "max_tiles: got (0, 3), must be two whole numbers from 1",
        "head_dims: got 0, must be a whole number from 1 to 512",
        "masks: got 'full', must name at least one, in a list or tuple",
        "dtypes: unknown dtype 'fp61', did you mean 'fp16'? (allowed: fp16, bf16, fp8)",
        "max_flops: got 1.0, must be at least 2048",
    )


def test_cases_take_the_options_of_problems() -> None:
    parameters = inspect.signature(attention_problems).parameters
    assert set(ProblemOptions.__annotations__) == set(parameters)
    with pytest.raises(InputError, match="unknown mask"):
        attention_cases(masks=("casual",))
