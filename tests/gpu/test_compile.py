"""Compilation without a GPU of what a function would launch on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashsim.gpu import compile as offline
from flashsim.gpu.compile import Call, Compiled, Failure, Tensor, compile_call

SAMPLES = str(Path(__file__).with_name("audit_samples.py"))
X = Tensor((1024, 128))
QKV = {"q": X, "k": X, "v": X}


def compiled(name: str, target: int = 90, **arguments: Any) -> tuple[Compiled, ...]:
    found = compile_call(Call(f"{SAMPLES}:{name}", arguments or QKV), target)
    assert isinstance(found, tuple), found
    return found


def failed(name: str, **arguments: Any) -> Failure:
    found = compile_call(Call(name if ":" in name else f"{SAMPLES}:{name}", {**QKV, **arguments}), 90)
    assert isinstance(found, Failure)
    return found


def test_every_launch_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # not for the compiler
    pointers, descriptors = compiled("two_kernels")
    assert pointers.kernel == "attention_kernel"
    assert pointers.grid == (8,)
    assert pointers.constants == {"D": 128, "UPCAST": False, "BLOCK_M": 128, "BLOCK_N": 64}
    assert pointers.types["Q"] == "*fp16"
    assert (pointers.num_warps, pointers.total_warps, pointers.num_stages) == (8, 8, 2)
    assert pointers.shared == 3 * 32768
    assert 100 < pointers.registers <= 255
    assert pointers.stack == pointers.tmem == 0
    assert "ttg.num-warps" in pointers.ttgir
    assert ".target sm_90a" in pointers.ptx
    assert pointers.cubin.startswith(b"\x7fELF")
    (role,) = pointers.roles
    assert (role.warps, role.features) == (8, {"mma", "exp"})
    # On the host and on the device.
    assert descriptors.types["desc_q"].startswith("tensordesc<fp16[128, 128]")
    (loop,) = descriptors.code.loops
    assert loop.counts["UTMALDG"] == 2
    assert descriptors.code.expected_bytes(loop) == 2 * 128 * 128 * 2


def test_a_custom_operator_is_its_function() -> None:
    (kernel,) = compiled("by_operator", target=80)
    assert kernel.target == 80
    assert kernel.code.loops[0].counts["HMMA"] == 128 * 64 * 128 * 2 // (16 * 8 * 16) // 8


def test_gluon() -> None:
    (kernel,) = compiled("by_gluon", a=Tensor((64, 64)), b=Tensor((64, 128)))
    assert not kernel.code.loops
    whole = kernel.code.whole()
    assert whole.counts["HGMMA"] == 64 // 16
    assert kernel.code.expected_bytes(whole) == (64 * 64 + 64 * 128) * 2
    assert (kernel.roles[0].warps, kernel.roles[0].features) == (4, {"mma", "tma"})


def test_nothing_is_launched() -> None:
    assert compiled("nothing") == ()


def test_what_the_compiler_says_is_kept() -> None:
    failure = failed("attention", BLOCK_N=100)
    assert failure.kind == "CompilationError"
    assert "power of 2" in failure.message
    assert str(failure).startswith("CompilationError: ")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("ends", "SystemExit", "enough"),
        ("crashes", "exit code -6", "assertion failed in the compiler"),
        ("absent", "AttributeError", "absent"),
        ("nowhere/at_all.py:kernel", "FileNotFoundError", "nowhere/at_all.py"),
        ("flashsim_kernels.absent:absent", "ModuleNotFoundError", "flashsim_kernels.absent"),
    ],
)
def test_a_failure_is_an_answer(name: str, kind: str, message: str) -> None:
    failure = failed(name)
    assert failure.kind == kind
    assert message in failure.message


def test_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "TIMEOUT", 0.5)
    assert failed("hangs").kind == "Timeout"


def test_kernels_are_those_of_this_process() -> None:
    import flashsim_kernels

    assert flashsim_kernels.__file__ is not None
    folders = offline._folders("flashsim_kernels")
    assert folders == {"flashsim_kernels": str(Path(flashsim_kernels.__file__).parent)}
