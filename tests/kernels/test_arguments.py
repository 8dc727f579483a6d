"""Bad arguments are named before any launch: which, what it was, what is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from flashsim_kernels import arguments  # noqa: E402
from flashsim_kernels import fa2 as module  # noqa: E402
from flashsim_kernels import fa2_backward as backward_module  # noqa: E402
from flashsim_kernels.arguments import ArgumentError  # noqa: E402
from flashsim_kernels.fa2 import fa2  # noqa: E402
from flashsim_kernels.fa2_backward import fa2_backward  # noqa: E402

ROOT = Path(__file__).parents[2]
HALF = torch.float16


class NoLaunch:
    def __getitem__(self, grid: object) -> Any:
        pytest.fail("launched")


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fa2_fwd", NoLaunch())
    for name in ("fa2_bwd_preprocess", "fa2_bwd", "fa2_bwd_dq", "fa2_bwd_convert_dq"):
        monkeypatch.setattr(backward_module, name, NoLaunch())


def shaped(*shape: int, dtype: Any = HALF) -> Any:
    return torch.zeros(shape, dtype=dtype)


def problems(function: Any, *args: Any, **options: Any) -> tuple[str, ...]:
    with pytest.raises(ArgumentError) as raised:
        function(*args, **options)
    assert str(raised.value) == "\n".join(raised.value.problems)
    return raised.value.problems


Q, K = shaped(2, 5, 4, 32), shaped(2, 7, 2, 32)
WRONG = {
    "no tensor": (
        (Q, [1], None),
        {},
        ("k: must be a torch.Tensor, got list", "v: must be a torch.Tensor, got NoneType"),
    ),
    "dtype": (
        (Q.double(), K.double(), K.double()),
        {},
        [f"{x}: dtype torch.float64, allowed are torch.float16, torch.bfloat16, torch.float32" for x in "qkv"],
    ),
    "dtypes that differ": (
        (Q, K, K.float()),
        {},
        ("q, k, v: dtypes torch.float16, torch.float16, torch.float32, must be the same",),
    ),
    "dimensions": (
        (Q[0], K, K),
        {},
        ("q: shape (5, 4, 32), must have 4 dimensions (batch, seqlen, heads, head_dim)",),
    ),
    "batch": ((Q[:1], K, K), {}, ("q, k, v: batch 1, 2, 2, must be the same",)),
    "k and v": ((Q, K, K[:, :3]), {}, ("k, v: (seqlen, heads) (7, 2) and (3, 2), must be the same",)),
    "heads": (
        (Q[:, :, :3], K, K),
        {},
        ("q, k: heads 3 and 2, those of k must divide those of q",),
    ),
    "no heads": (
        (Q, K[:, :, :0], K[:, :, :0]),
        {},
        ("q, k: heads 4 and 0, those of k must divide those of q",),
    ),
    "grid": (
        (Q[:1, :1, :1].expand(65536, 1, 65536, 32), *(K[:1, :1, :1].expand(65536, 1, 1, 32),) * 2),
        {},
        ("q: batch 65536, allowed are up to 65535", "q: heads 65536, allowed are up to 65535"),
    ),
    "head dims": ((Q, K[..., :16], K), {}, ("q, k: head dim 32 and 16, must be the same",)),
    "head dim": (
        (shaped(2, 5, 4, 20), shaped(2, 7, 2, 20), shaped(2, 7, 2, 264)),
        {},
        (
            "q: head dim 20, allowed are the multiples of 8 from 16 to 256",
            "v: head dim 264, allowed are the multiples of 8 from 16 to 256",
        ),
    ),
    "strides": (
        (Q, K, K.transpose(1, 3).contiguous().transpose(1, 3)),
        {},
        ("v: strides (448, 1, 7, 14), the last must be 1 (head_dim contiguous); use .contiguous()",),
    ),
    "meta": (
        (Q.to("meta"), K.to("meta"), K.to("meta")),
        {},
        ("q, k, v: on meta, the interpreter takes tensors on the CPU only",),
    ),
    "devices": (
        (Q, K.to("meta"), K),
        {},
        ("q, k, v: on cpu, meta, cpu, must be on the same device",),
    ),
    "scale": ((Q, K, K), {"scale": float("nan")}, ("scale: got nan, must be a finite number from 0",)),
    "negative scale": ((Q, K, K), {"scale": -0.5}, ("scale: got -0.5, must be a finite number from 0",)),
    "window": (
        (Q, K, K),
        {"window": (-1, 0)},
        ("window: got (-1, 0), must be (left, right), each a whole number from 0 or None for no end",),
    ),
    "one number": (
        (Q, K, K),
        {"window": 3},
        ("window: got 3, must be (left, right), each a whole number from 0 or None for no end",),
    ),
    "tile": (
        (Q, K, K),
        {"BLOCK_M": 48, "BLOCK_N": 8},
        (
            "BLOCK_M: got 48, allowed are the powers of two from 16 to 256",
            "BLOCK_N: got 8, allowed are the powers of two from 16 to 256",
        ),
    ),
    "warps": (
        (Q, K, K),
        {"num_warps": 3, "num_stages": 0},
        (
            "num_warps: got 3, allowed are the powers of two from 1 to 16",
            "num_stages: got 0, allowed are from 1 to 8",
        ),
    ),
}


WITHOUT_META = [name for name in WRONG if name not in ("meta", "devices")]
"""On the meta device an operator is asked for shapes only."""


@pytest.mark.parametrize("name", WITHOUT_META)
def test_forward(name: str) -> None:
    tensors, options, lines = WRONG[name]
    assert problems(fa2, *tensors, **options) == tuple(f"fa2: {line}" for line in lines)


@pytest.mark.parametrize("name", ["meta", "devices"])
def test_where_the_tensors_are(name: str) -> None:
    tensors, _, lines = WRONG[name]
    assert problems(module.launch_fa2, *tensors, None, None, None) == tuple(f"fa2: {line}" for line in lines)


@pytest.mark.parametrize("name", WITHOUT_META)
def test_backward(name: str) -> None:
    tensors, options, lines = WRONG[name]
    o, lse = shaped(2, 5, 4, 32), shaped(2, 4, 5, dtype=torch.float32)
    assert problems(fa2_backward, *tensors, o, lse, o, **options)[: len(lines)] == tuple(
        f"fa2_backward: {line}" for line in lines
    )


def test_results_of_another_forward_pass() -> None:
    o, lse = shaped(2, 5, 4, 32), shaped(2, 4, 5, dtype=torch.float32)
    assert problems(fa2_backward, Q, K, K, o[:1], lse.half(), o.float(), dlse=lse.transpose(1, 2)) == (
        "fa2_backward: o: shape (1, 5, 4, 32), must be (2, 5, 4, 32)",
        "fa2_backward: do: dtype torch.float32, must be torch.float16",
        "fa2_backward: lse: dtype torch.float16, must be torch.float32",
        "fa2_backward: dlse: shape (2, 5, 4), must be (2, 4, 5)",
    )


def test_the_operators_check_for_themselves() -> None:
    operator = torch.ops.flashsim_kernels.fa2
    assert problems(operator, Q[:1], K, K, None, None, None, False, None, None, None, None) == (
        "fa2: q, k, v: batch 1, 2, 2, must be the same",
    )


def test_a_gpu_without_the_needed_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "interpreted", lambda: False)
    monkeypatch.setattr(arguments, "capability", lambda device: 75)
    lines = arguments._device({"q": Q.to("meta")}, 80, None)
    assert lines == ["q, k, v: on a GPU of compute capability sm_75, this kernel needs sm_80 or later"]


def test_cpu_tensors_without_the_interpreter() -> None:
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    code += "import conftest; conftest.use_kernels_of_this_tree(); import os; del os.environ['TRITON_INTERPRET']\n"
    code += "import torch; from flashsim_kernels.fa2 import fa2; q = torch.zeros(1, 4, 1, 16).half(); fa2(q, q, q)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "ArgumentError: fa2: q, k, v: on cpu, must be on a CUDA GPU (on the CPU the interpreter" in done.stderr


def test_a_head_dim_that_the_launch_table_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "launch_parameters", _no_row)
    assert problems(fa2, Q, K, K) == ("fa2: no row",)


def _no_row(*args: object) -> dict[str, int]:
    raise LookupError("no row")


@pytest.mark.parametrize(
    ("number", "name"),
    [(75, "turing"), (80, "ampere"), (86, "ada"), (89, "ada"), (90, "hopper"), (100, "blackwell"), (120, "ada")],
)
def test_the_architecture_of_a_gpu(monkeypatch: pytest.MonkeyPatch, number: int, name: str) -> None:
    """As launch tables call it; those with 99 KiB of shared memory have Ada's rows."""
    monkeypatch.setattr(arguments, "capability", lambda device: number)
    assert arguments.architecture(torch.device("cuda")) == name
