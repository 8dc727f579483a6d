"""torch tensors: as results, as inputs and with strides. flashsim never imports torch; these tests do, where it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashsim.errors import InputError
from flashsim.numerics.reference import attention_reference
from flashsim.problem import AttentionProblem
from flashsim.testing import (
    LAYOUTS,
    AttentionCase,
    Layout,
    assert_attention_close,
    nan_padded,
    with_layout,
)
from flashsim.testing.arrays import dtype_of, to_float64

ROOT = Path(__file__).parents[2]
DTYPES = pytest.mark.parametrize("dtype", ["fp16", "bf16"])


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


def case_of(dtype: str, **fields: Any) -> AttentionCase:
    sizes = {"batch": 2, "heads_q": 4, "heads_kv": 2, "seqlen_q": 5, "seqlen_k": 7, "head_dim": 16}
    return AttentionCase(AttentionProblem(dtype=dtype, mask="causal", **sizes), **fields)  # type: ignore[arg-type]


def test_the_package_needs_neither_torch_nor_pytest() -> None:
    code = "import sys, flashsim.testing; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "hypothesis" in done.stdout.split()
    assert {"torch", "pytest", "simpy", "jax"} & set(done.stdout.split()) == set()


def test_tensors_are_made_only_where_torch_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(InputError, match="torch: must be imported before"):
        case_of("fp16").torch()


@DTYPES
def test_tensors_of_a_case(dtype: str, torch: Any) -> None:
    case = case_of(dtype)
    for tensor, x in zip((*case.torch(), case.torch_do()), (*case.qkv, case.do), strict=True):
        assert tensor.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        assert tensor.is_contiguous()
        assert dtype_of(tensor) == dtype
        np.testing.assert_array_equal(to_float64(tensor), x)
        tensor.zero_()
    assert case.q.any()


@DTYPES
def test_results(dtype: str, torch: Any) -> None:
    case = case_of(dtype)
    o_ref, lse_ref = attention_reference(*case.qkv, "causal")
    o = torch.from_numpy(o_ref).to(getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[dtype])).requires_grad_()
    lse = torch.from_numpy(lse_ref).float()
    assert_attention_close(o, case, lse=lse)
    assert_attention_close(o, *case.torch(), mask="causal", lse=lse)
    with pytest.raises(AssertionError, match="O: largest error"):
        assert_attention_close(o + 0.1, case)
    with pytest.raises(AssertionError, match="seqlen and heads are exchanged"):
        assert_attention_close(o.transpose(1, 2), case)
    with pytest.raises(AssertionError, match=r"no array of numbers: got a tensor of torch\.complex64"):
        assert_attention_close(o.to(torch.complex64), case)
    strided = with_layout(o, LAYOUTS["padded rows"])
    assert_attention_close(strided, case)


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_are_those_of_numpy(name: str, torch: Any) -> None:
    case = case_of("bf16", shared_kv=True)
    layout = LAYOUTS[name]
    for tensor, array in zip(case.torch(layout=layout), case.numpy(layout), strict=True):
        assert tuple(2 * n for n in tensor.stride()) == array.strides
        np.testing.assert_array_equal(to_float64(tensor), array.astype(float))
        memory = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // 2,), (1,), 0)
        distinct = tensor[:1] if tensor.stride()[0] == 0 else tensor
        assert int((~memory.isnan()).sum()) == distinct.numel()


def test_an_unaligned_tensor(torch: Any) -> None:
    k = case_of("fp16").torch(layout=LAYOUTS["unaligned"])[1]
    assert k.data_ptr() % 16 == 2


def test_broadcast_batches_must_be_equal(torch: Any) -> None:
    with pytest.raises(InputError, match="its batches differ"):
        case_of("fp16").torch(layout=LAYOUTS["broadcast"])


def test_nan_padded(torch: Any) -> None:
    k = case_of("bf16").torch()[1].requires_grad_()
    buffer, view = nan_padded(k, 3)
    assert tuple(buffer.shape) == (2, 10, 2, 16)
    assert bool(buffer[:, 7:].isnan().all())
    assert bool((view == k).all())
    assert view.data_ptr() == buffer.data_ptr()


def test_why_a_tensor_gets_its_strides_from_as_strided(torch: Any) -> None:
    """What the documentation says of the alternatives."""
    layout = Layout(row_padding=8)
    array = with_layout(case_of("fp16").k.astype(np.float16), layout)
    tensor = torch.from_numpy(array)
    assert tensor.stride() == layout.strided(array.shape).stride
    assert tensor.to(torch.float32).is_contiguous()
    assert tensor.clone().is_contiguous()
    with pytest.raises(TypeError, match="bfloat16"):
        torch.from_numpy(case_of("bf16").numpy()[0])


@pytest.mark.gpu
@DTYPES
def test_on_a_gpu(dtype: str, torch: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    case = case_of(dtype)
    q, k, v = case.torch("cuda", LAYOUTS["padded sequences"])
    assert (q.is_cuda, k.is_cuda, v.is_cuda) == (True, True, True)
    assert k.stride() == LAYOUTS["padded sequences"].strided(tuple(k.shape)).stride
    o = torch.from_numpy(attention_reference(*case.qkv, "causal")[0]).cuda().to(q.dtype)
    assert_attention_close(o, q, k, v, mask="causal")
