"""kernels/fa2.py: exact attention whatever the problem, tile and strides; an operator; a demonstration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernel_tests import FULL_PRECISION, case_of, examples, mask_arguments, tiled_cases  # noqa: E402

from flashsim.testing import LAYOUTS, AttentionCase, Layout, assert_attention_close, layouts  # noqa: E402
from flashsim_kernels import fa2 as module  # noqa: E402
from flashsim_kernels.fa2 import fa2  # noqa: E402

ROOT = Path(__file__).parents[2]
Tiled = tuple[AttentionCase, dict[str, int]]
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32}
SQUARE = {"BLOCK_M": 16, "BLOCK_N": 16}
EDGES = (0, 1, 14, 15, 16, 17)
"""Of a window: tiles begin and end with it, and one key beside."""


def judge(case: AttentionCase, layout: Layout | None = None, **launch: int) -> None:
    q, k, v = case.torch("cpu", layout)
    o, lse = fa2(q, k, v, return_lse=True, **mask_arguments(case.mask), **launch)
    assert o.dtype == q.dtype
    assert_attention_close(o, case, lse=lse)


@examples()
@given(tiled_cases(), layouts())
def test_exact(tiled: Tiled, layout: Layout) -> None:
    case, tile = tiled
    judge(case, layout, **tile)


@examples(dev=4, ci=15, nightly=60)
@given(tiled_cases(head_dims=(192, 256), max_flops=4e6))
def test_wide_heads(tiled: Tiled) -> None:
    case, tile = tiled
    judge(case, **tile)


@examples(dev=8, ci=30, nightly=150)
@given(tiled_cases())
def test_exact_in_fp32(tiled: Tiled) -> None:
    case, tile = tiled
    q, k, v = (x.float() * FULL_PRECISION for x in case.torch())
    o, lse = fa2(q, k, v, return_lse=True, **mask_arguments(case.mask), **tile)
    assert o.dtype == torch.float32
    assert_attention_close(o, q, k, v, dtype="fp32", mask=case.mask, lse=lse)


@examples(dev=6, ci=20, nightly=100)
@given(tiled_cases(masks=("window",), head_dims=(16,)), st.booleans(), st.booleans(), st.booleans())
def test_one_sided_windows(tiled: Tiled, left_open: bool, right_open: bool, causal: bool) -> None:
    case, tile = tiled
    p = case.problem
    left, right = (int(n) for n in case.mask.removeprefix("window:").split(","))
    o = fa2(*case.torch(), window=(None if left_open else left, None if right_open else right), causal=causal, **tile)
    everything = p.seqlen_q + p.seqlen_k
    right = 0 if causal else everything if right_open else right
    mask = f"window:{everything if left_open else left},{right}"
    assert_attention_close(o, *case.torch(), mask=mask)


@pytest.mark.parametrize("mask", ["full", "causal", "window:9,4"])
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 239), (239, 1), (64, 64), (33, 96), (97, 31)])
def test_with_the_tiles_of_the_launch_table(mask: str, seqlens: tuple[int, int]) -> None:
    judge(case_of(mask=mask, seqlen_q=seqlens[0], seqlen_k=seqlens[1]))


@pytest.mark.parametrize("head_dim", [24, 40, 96])
@pytest.mark.parametrize("mask", ["full", "window:9,4"])
def test_padding_beside_head_dims_that_are_no_powers_of_two(head_dim: int, mask: str) -> None:
    case = case_of(seqlen_q=32, seqlen_k=64, head_dim=head_dim, mask=mask)
    judge(case, LAYOUTS["padded rows"], **SQUARE)


@pytest.mark.parametrize("left", EDGES)
def test_every_edge_of_a_window(left: int) -> None:
    for right in EDGES:
        case = case_of(batch=1, heads_q=1, heads_kv=1, seqlen_q=33, seqlen_k=47, mask=f"window:{left},{right}")
        judge(case, **SQUARE)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2, 1e-3])
def test_scale(scale: float) -> None:
    case = case_of()
    o, lse = fa2(*case.torch(), causal=True, scale=scale, return_lse=True, **SMALL)
    assert_attention_close(o, case, lse=lse, scale=scale)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["no batch", "no queries", "no keys"])
def test_nothing_to_compute(sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = sizes
    q, k = torch.ones(batch, seqlen_q, 4, 16, dtype=torch.float16), torch.ones(batch, seqlen_k, 2, 16).half()
    for mask in ({}, {"causal": True}, {"window": (3, 3)}):
        o, lse = fa2(q, k, k, return_lse=True, **mask)
        assert torch.equal(o, torch.zeros_like(q))
        assert torch.equal(lse, torch.full((batch, 4, seqlen_q), float("-inf")))


def test_rows_without_keys() -> None:
    case = case_of(seqlen_q=50, seqlen_k=20)
    o, lse = fa2(*case.torch(), causal=True, return_lse=True, **SMALL)
    assert not o[:, :30].any()
    assert torch.equal(lse[:, :, :30], torch.full((2, 4, 30), float("-inf")))


def test_runs_are_the_same_bits_and_a_batch_entry_or_a_head_is_computed_as_if_alone() -> None:
    q, k, v = case_of(mask="window:20,3").torch()
    window = {"window": (20, 3), "return_lse": True, **SMALL}
    o, lse = fa2(q, k, v, **window)
    again = fa2(q, k, v, **window)
    assert torch.equal(o, again[0])
    assert torch.equal(lse, again[1])
    for b in range(2):
        alone = fa2(q[b : b + 1], k[b : b + 1], v[b : b + 1], **window)
        assert torch.equal(o[b : b + 1], alone[0])
        assert torch.equal(lse[b : b + 1], alone[1])
    for h in range(4):
        kv = slice(h // 2, h // 2 + 1)
        alone = fa2(q[:, :, h : h + 1], k[:, :, kv], v[:, :, kv], **window)
        assert torch.equal(o[:, :, h : h + 1], alone[0])


def test_what_a_row_does_not_see_does_not_matter() -> None:
    q, k, v = case_of(seqlen_q=64, seqlen_k=64).torch()
    o = fa2(q, k, v, causal=True, **SMALL)
    k[:, 48:], v[:, 48:] = 1e4, -1e4
    assert torch.equal(fa2(q, k, v, causal=True, **SMALL)[:, :48], o[:, :48])


def test_the_operator() -> None:
    tensors = [x.requires_grad_() for x in case_of(seqlen_q=9, seqlen_k=12, dtype="bf16").torch()]
    torch.library.opcheck(module.fa2_op, (*tensors, 5, 0, 0.5, True, 16, 16, 4, 2))


def test_compiled_into_a_model() -> None:
    case = case_of()

    def model(q: Any, k: Any, v: Any) -> Any:
        return fa2(q + 0, k, v, causal=True, **SMALL) * 1

    o = torch.compile(model, backend="eager", fullgraph=True)(*case.torch())
    assert torch.equal(o, model(*case.torch()))


def test_lse_is_returned_only_where_it_is_asked_for() -> None:
    assert isinstance(fa2(*case_of().torch()), torch.Tensor)


def test_the_demonstration() -> None:
    errors = [float(line.split()[-1]) for line in run_module().splitlines() if line.startswith("largest error")]
    assert len(errors) == 2
    assert errors[0] < 2e-3
    assert errors[1] < 1e-5


def run_module() -> str:
    """What `python -m flashsim_kernels.fa2` prints, of this tree, where nobody has set TRITON_INTERPRET."""
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    code += "import conftest, os; conftest.use_kernels_of_this_tree(); del os.environ['TRITON_INTERPRET']\n"
    code += "runpy.run_module('flashsim_kernels.fa2', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
