"""What the tests of all kernels share."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from flashsim.problem import AttentionProblem
from flashsim.testing import KINDS, AttentionCase, attention_cases, layouts

MASKS = ("full", "causal", "window")
TILES = (16, 32, 64)
HEAD_DIMS = (16, 32, 40, 64, 96, 128)
FULL_PRECISION = 1.1
"""Times this, numbers of fp16 or bf16 have all bits of fp32."""


def examples(dev: int = 12, ci: int = 60, nightly: int = 300) -> settings:
    """Settings with the number of examples for the profile that is used: a kernel takes 30 ms an example here."""
    profile = os.environ.get("HYPOTHESIS_PROFILE", "dev")
    return settings(max_examples={"dev": dev, "ci": ci}.get(profile, nightly))


@st.composite
def tiled_cases(draw: st.DrawFn, max_flops: float = 2e6, **options: Any) -> tuple[AttentionCase, dict[str, int]]:
    """A case and the tile to compute it with, whose edges the lengths lie at."""
    tile = {"BLOCK_M": draw(st.sampled_from(TILES)), "BLOCK_N": draw(st.sampled_from(TILES))}
    options = {"masks": MASKS, "head_dims": HEAD_DIMS, "tile": tuple(tile.values())} | options
    return draw(attention_cases(max_flops=max_flops, **options)), tile


def mask_arguments(mask: str) -> dict[str, Any]:
    """How a kernel is asked for a mask of `flashsim.testing`: causal or window."""
    kind, _, numbers = mask.partition(":")
    if kind == "window":
        left, right = (int(n) for n in numbers.split(","))
        return {"window": (left, right)}
    return {"causal": True} if kind == "causal" else {}


def case_of(kind: str = KINDS[0], seed: int = 0, **sizes: Any) -> AttentionCase:
    """A case with the sizes that are given, and otherwise small ones."""
    small = {"batch": 2, "heads_q": 4, "heads_kv": 2, "seqlen_q": 40, "seqlen_k": 70, "head_dim": 32, "mask": "causal"}
    return AttentionCase(AttentionProblem(**(small | sizes)), kind, seed)


__all__ = ["HEAD_DIMS", "MASKS", "TILES", "case_of", "examples", "layouts", "mask_arguments", "tiled_cases"]
