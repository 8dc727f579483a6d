"""The corrections of Triton's interpreter: needed, sufficient, and noticed when they no longer fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as upstream  # noqa: E402

from flashsim.errors import InputError  # noqa: E402
from flashsim.gpu import interpreter as corrections  # noqa: E402

ROOT = Path(__file__).parents[2]
corrections.correct_interpreter()

WRONG_TO_3_9 = {
    "bf16 arithmetic",
    "bf16 dot",
    "bf16 sum and scan",
    "fp32 to bf16",
    "fp16 to bf16",
    "fp32 to e4m3",
    "fp32 to e5m2",
}
"""What Triton 3.6.0 and 3.9.0 compute wrongly."""


def run(code: str, interpret: str | None = "1") -> str:
    """What a new process prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.skipif(version() > (3, 9), reason="a later Triton may have mended some of it")
def test_without_the_corrections_the_documented_errors_are_there() -> None:
    code = "from flashsim.gpu.interpreter import wrong_probes; print(*wrong_probes(), sep='\\n')"
    assert set(run(code).splitlines()) >= WRONG_TO_3_9


def test_with_the_corrections_nothing_is_wrong() -> None:
    assert corrections.wrong_probes() == {}
    corrections.self_test()


def test_correcting_twice_is_correcting_once() -> None:
    before = upstream.InterpreterBuilder.binary_op
    corrections.correct_interpreter()
    assert upstream.InterpreterBuilder.binary_op is before


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in corrections.USED.items() for name in names if "." not in name]
)
def test_a_name_that_has_moved_is_named(monkeypatch: pytest.MonkeyPatch, owner: str, name: str) -> None:
    # Replacing what is already replaced would pile up: nothing may be replaced where a name is missing.
    monkeypatch.setattr(corrections, "_corrected", False)
    monkeypatch.setattr(corrections, "_replace", lambda: pytest.fail("replaced all the same"))
    holder = getattr(upstream, owner) if owner else upstream
    while name not in vars(holder):  # to_tensor is inherited
        holder = holder.__base__
    monkeypatch.delattr(holder, name)
    full = ".".join(part for part in ("triton.runtime.interpreter", owner, name) if part)
    with pytest.raises(corrections.InterpreterMismatch, match=triton.__version__) as raised:
        corrections.correct_interpreter()
    assert f"- {full} has moved" in str(raised.value)


@pytest.mark.parametrize("name", ["binary_op", "cast_impl", "create_dot"])
def test_a_name_that_means_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(upstream.InterpreterBuilder, name, lambda self, *args, **kwargs: args[0])
    with pytest.raises(corrections.InterpreterMismatch, match=triton.__version__):
        corrections.self_test()


@pytest.mark.parametrize(
    ("names", "of"),
    [
        (("binary_op", "unary_op"), "bf16 arithmetic"),
        (("create_dot",), "bf16 dot"),
    ],
)
def test_without_one_correction_its_probe_is_wrong(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], of: str
) -> None:
    for name in names:
        corrected = getattr(upstream.InterpreterBuilder, name)
        original = dict(zip(corrected.__code__.co_freevars, corrected.__closure__, strict=True))[name].cell_contents
        monkeypatch.setattr(upstream.InterpreterBuilder, name, original)
    assert of in corrections.wrong_probes()


@pytest.mark.parametrize(
    "code",
    [
        "from flashsim.gpu import interpreter",
        "import triton, os; os.environ['TRITON_INTERPRET'] = '1'; from flashsim.gpu import interpreter",
    ],
    ids=["not set", "set after triton was imported"],
)
def test_where_kernels_are_compiled_it_says_what_to_set(code: str) -> None:
    code += "\ntry:\n    interpreter.correct_interpreter()\nexcept interpreter.InputError as error:\n    print(error)"
    printed = run(code, interpret=None)
    assert "Set TRITON_INTERPRET=1" in printed
    assert "before anything imports triton" in printed


def test_input_error_is_what_flashsim_raises_for_its_users() -> None:
    assert issubclass(corrections.InputError, InputError)


@triton.jit
def more_arithmetic(X: Any, I: Any, Out: Any, N: tl.constexpr) -> None:  # noqa: E741
    n = tl.arange(0, N)
    x, i = tl.load(X + n), tl.load(I + n)
    tl.store(Out + n, i.to(tl.bfloat16))
    tl.store(Out + N + n, x.to(tl.int32).to(tl.bfloat16))
    tl.store(Out + 2 * N + n, tl.abs(x))
    tl.store(Out + 3 * N + n, tl.maximum(x, 0.25))
    tl.store(Out + 4 * N + n, x / 3)
    tl.store(Out + 5 * N + n, tl.full((N,), 1.7, tl.bfloat16))
    tl.store(Out + 6 * N + n, tl.fma(x, x, x))
    tl.store(Out + 7 * N + n, tl.zeros((N,), tl.bfloat16) + x)


def test_what_else_kernels_do_with_bf16() -> None:
    n = 64
    x = (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 3).to(torch.bfloat16)
    i = torch.arange(n, dtype=torch.int32) * 37 - 100
    out = torch.full((8 * n,), float("nan"), dtype=torch.bfloat16)
    more_arithmetic[(1,)](x, i, out, n)
    wide = x.float()
    expected = [
        i.to(x.dtype),
        x.to(torch.int32).to(x.dtype),
        x.abs(),
        x.clamp(min=0.25),
        (wide / 3).to(x.dtype),
        torch.full_like(x, 1.7),
        (wide * wide + wide).to(x.dtype),
        x,
    ]
    assert torch.equal(out, torch.cat(expected))


@triton.jit
def transposed(X: Any, Out: Any, M: tl.constexpr, N: tl.constexpr) -> None:
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(X + m[:, None] * N + n[None, :])
    tl.store(Out + n[:, None] * M + m[None, :], tl.trans(x).to(tl.float32))


def test_values_that_are_not_contiguous() -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    out = torch.zeros(32, 16)
    transposed[(1,)](x, out, 16, 32)
    assert torch.equal(out, x.float().T)
