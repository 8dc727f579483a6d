"""One call of a kernel on the tensors of a case, and what its results are held to."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashsim.numerics.compare import compare_fp8
from flashsim.numerics.fp8 import Blocks, emulated_attention, fp8_bounds
from flashsim.numerics.layout import Float
from flashsim.numerics.reference import attention_reference
from flashsim.testing import AttentionCase, Layout, assert_attention_close, assert_gradients_close
from flashsim.testing.arrays import to_float64


@dataclass(frozen=True)
class Trial:
    """One call of a kernel. Its repr makes it again."""

    case: AttentionCase
    layout: Layout = field(default_factory=Layout)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments beside the mask."""


def function_of(kernel: str) -> Callable[..., Any]:
    """The public function of `flashsim_kernels` that is named like its module."""
    found = getattr(importlib.import_module(f"flashsim_kernels.{kernel}"), kernel)
    assert callable(found)
    return found  # type: ignore[no-any-return]


def mask_arguments(mask: str) -> dict[str, Any]:
    """How a kernel is asked for a mask: causal, or a window."""
    kind, _, numbers = mask.partition(":")
    if kind == "window":
        left, _, right = numbers.partition(",")
        return {"window": (int(left), int(right or 0))}
    return {"causal": True} if kind == "causal" else {}


def forward(kernel: str, trial: Trial, device: str, lse: bool = True) -> None:
    """O, and unless the kernel's LSE is only as exact as scores that it stores, that."""
    case = trial.case
    q, k, v = case.torch(device, trial.layout)
    o, found = function_of(kernel)(q, k, v, return_lse=True, **mask_arguments(case.mask), **trial.options)
    assert_attention_close(o, case, lse=found if lse else None)


def gradients(kernel: str, trial: Trial, device: str) -> None:
    """dQ, dK and dV, through torch's autograd."""
    import torch

    case = trial.case
    inputs = [x.detach().requires_grad_() for x in case.torch(device, trial.layout)]
    o = function_of(kernel)(*inputs, **mask_arguments(case.mask), **trial.options)
    found = torch.autograd.grad(o, inputs, case.torch_do(device, trial.layout))
    assert_gradients_close(list(found), case)


def blocks(trial: Trial, device: str) -> None:
    """O and the gradients under a mask of random blocks, the densities of which go from none to all."""
    import torch

    case, size = trial.case, trial.options["mask_block"]
    shape = [-(-n // size) for n in (case.problem.seqlen_q, case.problem.seqlen_k)]
    random = np.random.default_rng(case.seed)
    seen = random.random(shape) < random.choice([0.0, 0.3, 0.7, 1.0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blocks.txt"
        lines = [f"{size} {size}", *(" ".join(str(n) for n in np.flatnonzero(row)) for row in seen)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        masked = replace(case, problem=replace(case.problem, mask=f"blocks:{path}"))
        inputs = [x.detach().requires_grad_() for x in case.torch(device, trial.layout)]
        options = {name: value for name, value in trial.options.items() if name != "mask_block"}
        mask = torch.from_numpy(seen)[None, None].to(device)
        o, lse = function_of("block_sparse")(*inputs, mask, size, return_lse=True, **options)
        assert_attention_close(o, masked, lse=lse)
        found = torch.autograd.grad(o, inputs, case.torch_do(device, trial.layout))
        assert_gradients_close(list(found), masked)


def gluon(kernel: str, trial: Trial, device: str) -> None:
    """O and LSE; without a GPU in an interleaving that follows from the trial."""
    if device == "cuda":
        forward(kernel, trial, device)
        return
    from flashsim.gpu import gluon_cpu

    launched = getattr(importlib.import_module(f"flashsim_kernels.{kernel}"), f"{kernel}_fwd")
    seed = trial.case.seed
    with gluon_cpu.in_place_of_gpu(launched, seed=seed, completion="random" if seed % 2 else "late"):
        forward(kernel, trial, device)


def fp8(trial: Trial, device: str) -> None:
    """What Q, K and V become in e4m3, and then attention of what that stands for."""
    case, options = trial.case, dict(trial.options)
    block, incoherent = options.pop("block"), options.pop("incoherent")
    quantize = importlib.import_module("flashsim_kernels.quantize_fp8").quantize_fp8
    q, k, v = case.torch(device, trial.layout)
    found = [quantize(q, block, incoherent=incoherent), quantize(k, block, incoherent=incoherent)]
    found.append(quantize(v, block, transposed=True))
    tensors = [Blocks(to_float64(codes), to_float64(scales), block) for codes, scales in found]
    for name, x, stored in zip("qkv", case.qkv, tensors, strict=True):
        if name == "v" or not incoherent:
            assert_quantized(name, x, stored)
    if incoherent:
        assert_products_kept(case, *tensors[:2])
    o, lse = importlib.import_module("flashsim_kernels.fa3_fp8").fa3_fp8_quantized(
        *(codes for codes, _ in found),
        *(scales for _, scales in found),
        q_block=block,
        k_block=block,
        scale=case.problem.softmax_scale,
        return_lse=True,
        **mask_arguments(case.mask),
        **options,
    )
    q8, k8, v8, scale = tensors[0].values, tensors[1].values, tensors[2].values, case.problem.softmax_scale
    reference = attention_reference(q8, k8, v8, case.mask, scale)
    twin = emulated_attention(q8, k8, v8, "bf16", case.mask, scale)
    bounds = fp8_bounds(q8, k8, v8, "bf16", case.mask, scale)
    broken = compare_fp8(to_float64(o), to_float64(lse), *reference, twin, bounds).broken
    assert not broken, "\n".join(f"{clause.what}: {clause.value:.3g}, allowed {clause.limit:.3g}" for clause in broken)


def assert_quantized(name: str, given: Float, stored: Blocks) -> None:
    """Each element to nearest: half a unit in the last of e4m3's four digits, or half of 2^-9 of its block's scale."""
    scales = np.repeat(stored.scales, stored.block, axis=1)[:, : given.shape[1], :, None]
    wrong = np.abs(stored.values - given) > np.maximum(np.abs(given) / 16, scales * 2.0**-10) * (1 + 2.0**-10)
    assert not wrong.any(), f"{name} is quantized wrongly in {wrong.sum()} of {wrong.size} elements"


def assert_products_kept(case: AttentionCase, q: Blocks, k: Blocks) -> None:
    """Q K^T of what was transformed and rounded is that of what was given, but for rounding."""
    group = case.problem.heads_per_kv

    def products(q: Float, k: Float) -> Float:
        return np.asarray(np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, group, axis=2)))

    norms = products(*(np.linalg.norm(x.values, axis=3, keepdims=True) for x in (q, k)))
    least = q.values.shape[3] * 2.0**-9 * q.scales.max(initial=0.0) * k.scales.max(initial=0.0) * 448
    wrong = np.abs(products(q.values, k.values) - products(case.q, case.k)) > norms / 7 + least
    assert not wrong.any(), f"Q K^T changes with the transform in {wrong.sum()} of {wrong.size} elements"
