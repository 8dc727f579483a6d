"""What is timed: the problems, our kernels, and torch's own attention beside them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flashsim.errors import InputError
from flashsim.gpu.clocks import Sampler, reader_of, state_of
from flashsim.gpu.timing import Cuda, Times, is_fatal, measure, reason_of
from flashsim.problem import AttentionProblem

TOKENS, HIDDEN = 16384, 2048
"""batch * seqlen and heads * head_dim, as in the figures of the FlashAttention-2 and -3 papers."""
SEQLENS = (16384, 8192, 4096, 2048, 1024, 512)
QUICK_SEQLENS = (16384, 4096, 1024)
HEAD_DIMS = (128, 64, 256)
MASKS = ("full", "causal")
BF16 = (128, 4096)
"""Head dim and length that are timed in bf16, too."""
FP8 = (128, (16384, 4096))
"""Head dim and lengths that are timed in fp8, without torch's, which has none."""
FP8_BLOCK = 128
"""Rows that have a scale together."""
DECODE = ((1, 8192), (1, 65536), (16, 8192), (64, 8192))
"""(batch, keys) of one query each, 32 heads of 128 that share 8 KV heads (Llama 3 8B)."""
QUICK_DECODE = DECODE[1:3]
FA1_LONGEST = 4096
"""One program a head: at 16384 keys a seventh of an H100 works for a tenth of a second."""
MATH_LONGEST = 8192
"""It keeps scores in fp32: 34 GB at 16384 keys, and copies of them."""
DEVICE = "cuda"

Run = Callable[[], object]


@dataclass(frozen=True)
class Tensors:
    """q, k, v and dO as torch has them, (batch, seqlen, heads, head_dim)."""

    q: Any
    k: Any
    v: Any
    do: Any


@dataclass(frozen=True)
class Variant:
    """One implementation."""

    name: str
    schedule: str
    """Of the rows that are measured; one that no schedule has is skipped by `flashsim accuracy`, with that reason."""
    prepare: Callable[[AttentionProblem, Tensors], Run]
    """What is timed. Raises what it cannot do."""
    options: Mapping[str, str] = field(default_factory=dict)
    kernel: str | None = None
    """Whose time it is, as the catalogue of kernels has it; None: it is not ours."""
    directions: tuple[str, ...] = ("fwd",)
    targets: range = range(80, 130)
    """Compute capabilities, such as 90."""
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    decodes: bool = False
    """Made for one query; else for as many queries as keys."""
    longest: int = 1 << 31

    def schedule_at(self, problem: AttentionProblem) -> str:
        """torch's FlashAttention-2 decodes by other kernels, whose splits it does not tell."""
        return "sdpa_flash" if self.name == "SDPA flash" and problem.seqlen_q < problem.seqlen_k else self.schedule

    def suits(self, problem: AttentionProblem, capability: int) -> bool:
        decoding = problem.seqlen_q < problem.seqlen_k
        return (
            problem.direction in self.directions
            and problem.dtype in self.dtypes
            and capability in self.targets
            and (self.kernel is None or decoding == self.decodes)
            and problem.seqlen_k <= self.longest
        )


def _ours(name: str, **arguments: Any) -> Callable[[AttentionProblem, Tensors], Run]:
    def prepare(problem: AttentionProblem, x: Tensors) -> Run:
        function = getattr(importlib.import_module(f"flashsim_kernels.{name}"), name)
        return _run(lambda q, k, v: function(q, k, v, causal=problem.mask == "causal", **arguments), problem, x)

    return prepare


def _fp8(problem: AttentionProblem, x: Tensors) -> Run:
    """Attention of tensors that are quantized already, without incoherent processing."""
    module = importlib.import_module("flashsim_kernels.fa3_fp8")
    quantize = importlib.import_module("flashsim_kernels.quantize_fp8").quantize_fp8
    q, k, v = quantize(x.q, FP8_BLOCK), quantize(x.k, FP8_BLOCK), quantize(x.v, FP8_BLOCK, transposed=True)
    codes, scales = zip(q, k, v, strict=True)
    return lambda: module.fa3_fp8_quantized(
        *codes, *scales, q_block=FP8_BLOCK, k_block=FP8_BLOCK, causal=problem.mask == "causal"
    )


def _sdpa(backend: str) -> Callable[[AttentionProblem, Tensors], Run]:
    def prepare(problem: AttentionProblem, x: Tensors) -> Run:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        def attention(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return scaled_dot_product_attention(
                    q.transpose(1, 2),
                    k.transpose(1, 2),
                    v.transpose(1, 2),
                    is_causal=problem.mask == "causal",
                    enable_gqa=problem.heads_per_kv > 1,
                ).transpose(1, 2)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                return _run(attention, problem, x)
            except RuntimeError as error:
                # Why a backend is not available comes as warnings.
                reasons = [str(warning.message).partition(" (Triggered")[0] for warning in said]
                raise InputError(reasons or [reason_of(error)]) from None

    return prepare


def _run(attention: Callable[[Any, Any, Any], Any], problem: AttentionProblem, x: Tensors) -> Run:
    import torch

    if problem.direction == "fwd":
        attention(x.q, x.k, x.v)
        return lambda: attention(x.q, x.k, x.v)
    inputs = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    o = attention(*inputs)
    return lambda: torch.autograd.grad(o, inputs, x.do, retain_graph=True)


BOTH = ("fwd", "bwd")
HOPPER = range(90, 91)
TRITON, DETERMINISTIC = {"impl": "triton"}, {"impl": "triton", "deterministic": "true"}
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("fa3", "fa3", _ours("fa3"), {"impl": "gluon"}, "fa3", targets=HOPPER),
        Variant("fa3_triton", "fa3", _ours("fa3_triton"), TRITON, "fa3_triton", targets=range(90, 130)),
        Variant("fa2", "fa2", _ours("fa2"), TRITON, "fa2"),
        Variant("fa2_backward", "fa2", _ours("fa2"), TRITON, "fa2_backward", ("bwd",)),
        Variant(
            "fa2_backward, deterministic",
            "fa2",
            _ours("fa2", deterministic=True),
            DETERMINISTIC,
            "fa2_backward",
            ("bwd",),
        ),
        Variant("fa1", "fa1", _ours("fa1"), TRITON, "fa1", longest=FA1_LONGEST),
        Variant("standard", "standard", _ours("standard"), TRITON, "standard"),
        Variant("split_kv", "split_kv", _ours("split_kv"), TRITON, "split_kv", decodes=True),
        Variant("fa3_fp8", "fa3", _fp8, TRITON, "fa3_fp8", targets=range(90, 110), dtypes=("fp8",)),
        Variant("SDPA cuDNN", "sdpa_cudnn", _sdpa("CUDNN_ATTENTION"), directions=BOTH),
        # torch's own copy of FlashAttention-2 is the published kernel.
        Variant("SDPA flash", "fa2", _sdpa("FLASH_ATTENTION"), directions=BOTH),
        Variant("SDPA math", "sdpa_math", _sdpa("MATH"), directions=BOTH, longest=MATH_LONGEST),
    )
}


def problems(quick: bool = False) -> list[AttentionProblem]:
    """Those that are timed, the most telling ones first."""

    def square(d: int, seqlen: int, mask: str, direction: str, dtype: str = "fp16") -> AttentionProblem:
        return AttentionProblem(
            batch=TOKENS // seqlen,
            heads_q=HIDDEN // d,
            seqlen_q=seqlen,
            head_dim=d,
            mask=mask,
            direction=direction,
            dtype=dtype,
        )

    decode = [
        AttentionProblem(batch=batch, heads_q=32, heads_kv=8, seqlen_q=1, seqlen_k=keys, head_dim=128)
        for batch, keys in (QUICK_DECODE if quick else DECODE)
    ]
    found: list[AttentionProblem] = []
    for direction in BOTH:
        for d in HEAD_DIMS:
            found += [square(d, n, mask, direction) for n in (QUICK_SEQLENS if quick else SEQLENS) for mask in MASKS]
            found += decode if (direction, d) == ("fwd", HEAD_DIMS[0]) else []
        found += [square(*BF16, mask, direction, "bf16") for mask in MASKS]
    return found + [square(FP8[0], seqlen, mask, "fwd", "fp8") for seqlen in FP8[1] for mask in MASKS]


def chosen(problem: AttentionProblem, kernels: Sequence[str], capability: int) -> list[Variant]:
    """The variants of one problem: of our kernels those that are asked for, and whatever they are held against."""
    found = [v for v in VARIANTS.values() if v.suits(problem, capability) and v.kernel in (None, *kernels)]
    return found if any(v.kernel for v in found) else []


def work(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Times problems; runs in a process of its own.

    `request`: problems (fields of each), kernels, capability, uuid, budget_s, and `left_out`, names of variants. Yields
    {problem, trying} before a variant of problem number `problem` runs for the first time, and then {problem, times,
    state}: for each variant its `Times`, and the `State` of the GPU meanwhile.
    """
    import torch

    gpu = Cuda()
    read, _ = reader_of(request["uuid"])
    for number, fields in enumerate(request["problems"]):
        problem = AttentionProblem(**fields)
        times: dict[str, Times] = {}
        runs: dict[str, Run] = {}
        x = _tensors(problem)
        for variant in chosen(problem, request["kernels"], request["capability"]):
            if variant.name in request["left_out"]:
                continue
            yield {"problem": number, "trying": variant.name}
            try:
                runs[variant.name] = variant.prepare(problem, x)
                gpu.synchronize()
            except Exception as error:
                if is_fatal(error):
                    raise
                times[variant.name] = Times(failure=reason_of(error))
        yield {"problem": number, "trying": ""}
        with Sampler(read) as sampler:
            times |= measure(runs, gpu, request["budget_s"])
        state = state_of(sampler.samples)
        del x, runs
        torch.cuda.empty_cache()
        yield {
            "problem": number,
            "times": {name: asdict(value) for name, value in times.items()},
            "state": state and asdict(state),
        }


def _tensors(problem: AttentionProblem) -> Tensors:
    import torch

    dtype = torch.float16 if problem.dtype == "fp16" else torch.bfloat16
    generator = torch.Generator(DEVICE).manual_seed(0)

    def tensor(seqlen: int, heads: int, width: int) -> Any:
        return torch.randn(problem.batch, seqlen, heads, width, dtype=dtype, device=DEVICE, generator=generator)

    return Tensors(
        q=tensor(problem.seqlen_q, problem.heads_q, problem.head_dim),
        k=tensor(problem.seqlen_k, problem.heads_kv, problem.head_dim),
        v=tensor(problem.seqlen_k, problem.heads_kv, problem.head_dim_v),
        do=tensor(problem.seqlen_q, problem.heads_q, problem.head_dim_v),
    )
