"""Acceptance rules that others use, to be held against flashsim's on the same results.

Each takes what a kernel gave, the float64 reference and unfused attention in the same dtype, as lists of tensors: O, or
dQ, dK and dV. None of them looks at the LSE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from twin_cases import Outputs, Prepared

Array = NDArray[np.float64]
Rule = Callable[[Sequence[Array], Sequence[Array], Sequence[Array], str], bool]


def allclose(atol: float, rtol: float) -> Rule:
    """|x - ref| <= atol + rtol |ref| everywhere; NaN equals nothing."""

    def rule(given: Sequence[Array], reference: Sequence[Array], eager: Sequence[Array], part: str) -> bool:
        return all(bool(np.allclose(x, ref, rtol, atol)) for x, ref in zip(given, reference, strict=True))

    return rule


def mse_below_1(given: Sequence[Array], reference: Sequence[Array], eager: Sequence[Array], part: str) -> bool:
    return all(bool(np.mean((x - ref) ** 2) < 1) for x, ref in zip(given, reference, strict=True))


def times_eager(given: Sequence[Array], reference: Sequence[Array], eager: Sequence[Array], part: str) -> bool:
    """The largest error is at most twice that of eager attention, 3 times for gradients, plus 1e-5."""
    ratio = 3 if part == "backward" else 2
    return all(
        bool(np.max(np.abs(x - ref), initial=0) <= ratio * np.max(np.abs(low - ref), initial=0) + 1e-5)
        for x, ref, low in zip(given, reference, eager, strict=True)
    )


RULES: dict[str, tuple[str, Rule]] = {
    "2x eager": (
        "flash-attn, `tests/test_flash_attn.py`: 2 (gradients 3) times eager's largest error + 1e-5",
        times_eager,
    ),
    "1e-3": ("allclose, atol = rtol = 1e-3; FlashInfer for fp16", allclose(1e-3, 1e-3)),
    "1e-2": ("allclose, atol = rtol = 1e-2; KernelBench", allclose(1e-2, 1e-2)),
    "1e-2 abs": ("allclose, atol = 1e-2, rtol = 0; Triton tutorial 06", allclose(1e-2, 0)),
    "rtol 0.5": ("allclose, atol = 1e-3, rtol = 0.5; tritonbench decoding", allclose(1e-3, 0.5)),
    "2 + 20 %": ("allclose, atol = 2, rtol = 0.2; tritonbench fp8", allclose(2.0, 0.2)),
    "MSE < 1": ("mean squared error below 1; FlashInfer fp8", mse_below_1),
}
"""Short name: where it comes from, and the rule."""


def verdicts(prepared: Prepared, outputs: Outputs) -> dict[str, bool]:
    """What each rule says of a result, ours under "flashsim"; True is accepted."""
    part = prepared.case.part
    tensors = outputs if part == "backward" else outputs[:1]
    reference = prepared.reference[: len(tensors)]
    found = {"flashsim": prepared.judge(outputs).accepted}
    with np.errstate(all="ignore"):
        for name, (_, rule) in RULES.items():
            found[name] = rule(tensors, reference, prepared.eager, part)
    return found
