"""The kernels there are to audit: how each is called, for which GPUs it exists, and what its inner loops must do.

Needs are counted for one turn of an inner loop: one tile of BLOCK_M x BLOCK_N scores of one CTA.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flashsim.errors import InputError, unknown
from flashsim.gpu.compile import Call, Compiled, Tensor

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
GPUS = {80: "a100-sxm4-80gb", 90: "h100-sxm5"}
"""The device file of each target that has one, for what the simulator charges."""
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
"""Bytes of shared memory that a CTA may have (CUDA C++ Programming Guide, technical specifications per compute
capability). The compiler does not look."""
TMEM_LIMIT = 512
"""Columns of an SM's tensor memory."""
HALF, BF16, FP8 = "float16", "bfloat16", "float8_e4m3fn"
ELEMENT = {HALF: 2, BF16: 2, FP8: 1}
"""Bytes of each of torch's dtypes."""
SHORT = {HALF: "fp16", BF16: "bf16", FP8: "fp8"}


@dataclass(frozen=True)
class Need:
    """What one tile takes, by the algorithm."""

    flop: int
    """Of products."""
    exps: int
    """Of scores."""
    bytes: int | None
    """Of tiles that are loaded anew. Vectors (LSE, row sums) are left out: threads that share a row load it twice."""
    factors: int = 0
    """Exponentials for each row, beside those of scores."""
    beside: int = 0
    """Bytes that the simulator counts beside: vectors, and dQ, which atomics read in L2."""


@dataclass(frozen=True)
class Sizes:
    """Of a launch: tile, head dims, bytes of an element, and the kernel's compile-time arguments."""

    rows: int
    keys: int
    d: int
    d_v: int
    element: int
    looped: bool = True
    """False: the compiler left no loop, and the kernel as a whole is looked at."""
    constants: Mapping[str, Any] = field(default_factory=dict)


def forward(s: Sizes) -> Need:
    """Q K^T and P V, K and V loaded, O rescaled by one factor a row."""
    return Need(2 * s.rows * s.keys * (s.d + s.d_v), s.rows * s.keys, s.keys * (s.d + s.d_v) * s.element, 1)


def forward_through_memory(s: Sizes) -> Need:
    """FlashAttention-1: Q, and O in fp32, come in for every pair of blocks; O and the new term have a factor each."""
    return Need(forward(s).flop, s.rows * s.keys, s.rows * (s.d * s.element + s.d_v * 4), 2, 8 * s.rows)


def gradients_by_keys(s: Sizes) -> Need:
    """S, dP, dV and dK, with Q and dO loaded; and dQ, where it is added up by atomics."""
    added = s.d if s.constants.get("ATOMIC_DQ") else 0
    products = 2 * s.d + 2 * s.d_v + added
    loaded, beside = s.rows * (s.d + s.d_v) * s.element, s.rows * (8 + 4 * added)
    return Need(2 * s.rows * s.keys * products, s.rows * s.keys, loaded, beside=beside)


def gradients_by_rows(s: Sizes) -> Need:
    """S, dP and dQ, with K and V loaded."""
    return Need(2 * s.rows * s.keys * (2 * s.d + s.d_v), s.rows * s.keys, s.keys * (s.d + s.d_v) * s.element)


def product(s: Sizes) -> Need:
    """BLOCK_K steps of a product of two matrices from memory. A short loop, over the head dim, is unrolled: then it is
    all steps, and loads cannot be counted, since of those that fetch ahead the last ones are never executed."""
    if not s.looped:
        return Need(2 * s.rows * s.keys * s.d, 0, None)
    depth = s.constants["BLOCK_K"]
    return Need(2 * s.rows * s.keys * depth, 0, (s.rows + s.keys) * depth * s.element)


def softmax_of_rows(s: Sizes) -> Need:
    """Scores from memory; each row's maximum may have changed."""
    return Need(0, s.rows * s.keys, s.rows * s.keys * s.element, 1)


@dataclass(frozen=True)
class Case:
    """One way to call a kernel."""

    label: str
    call: Call
    head_dim: int
    dtype: str = HALF
    causal: bool = False
    seqlen_q: int = 4096
    seqlen_k: int = 4096
    heads: int = 16
    heads_kv: int = 16
    specialized: bool = False
    """Warp specialization is promised."""
    overlapped: bool = False
    """Exponentials during asynchronous products are promised."""
    simulated: Mapping[str, Any] | None = field(default_factory=dict)
    """Switches of its simulation, beside `impl`; None where it has none, or one with other tiles."""


@dataclass(frozen=True)
class Entry:
    """A kernel: a public function of `flashsim_kernels`, named as its schedule."""

    name: str
    work: Mapping[str, Callable[[Sizes], Need]]
    """What the inner loops of each kernel that is launched need; those that are not named have none to look at."""
    cases: Callable[[Entry, int], tuple[Case, ...]]
    targets: tuple[int, ...] = (80, 90, 100)
    schedule: str | None = None
    """That simulates it; None: none does."""
    charged: Mapping[str, str | None] = field(default_factory=dict)
    """Names of the simulated kernels, where they are others; None: not simulated so."""
    scaled: bool = False
    """Its tiles are not those of the simulation: what is charged is compared for the same work."""
    direction: str = "fwd"
    implementation: str = "triton"

    def cases_for(self, target: int) -> tuple[Case, ...]:
        return self.cases(self, target) if target in self.targets else ()

    def call(self, **arguments: Any) -> Call:
        return Call(f"flashsim_kernels.{self.name}:{self.name}", arguments)


BATCH = 2


def tensors(case: Case) -> dict[str, Tensor]:
    def tensor(seqlen: int, heads: int) -> Tensor:
        return Tensor((BATCH, seqlen, heads, case.head_dim), case.dtype)

    return {
        "q": tensor(case.seqlen_q, case.heads),
        "k": tensor(case.seqlen_k, case.heads_kv),
        "v": tensor(case.seqlen_k, case.heads_kv),
    }


def label(head_dim: int, causal: bool = False, dtype: str = HALF, *more: str) -> str:
    return " ".join((SHORT[dtype], "D", str(head_dim), *(["causal"] if causal else []), *more))


def attention_cases(
    *shapes: tuple[int, bool, str],
    specialized: bool = False,
    overlapped: bool = False,
    tensor_dtype: str | None = None,
) -> Callable[[Entry, int], tuple[Case, ...]]:
    """Cases of (head dim, causal, dtype), with what is promised. `tensor_dtype`: of the arguments, if it is another."""

    def cases(entry: Entry, target: int) -> tuple[Case, ...]:
        found = []
        for head_dim, causal, dtype in shapes:
            label = f"{SHORT[dtype]} D {head_dim}{' causal' if causal else ''}"
            case = Case(label, entry.call(), head_dim, dtype, causal, specialized=specialized, overlapped=overlapped)
            mask = {"causal": True} if causal else {}
            qkv = tensors(replace(case, dtype=tensor_dtype or dtype))
            found.append(replace(case, call=entry.call(**qkv, **mask)))
        return tuple(found)

    return cases


def backward_cases(entry: Entry, target: int) -> tuple[Case, ...]:
    found = []
    for head_dim, *switches in ((64,), (128,), (128, "causal"), (128, "deterministic")):
        case = Case(label(head_dim, False, HALF, *switches), entry.call(), head_dim, causal="causal" in switches)
        qkv = tensors(case)
        lse = Tensor((BATCH, case.heads, case.seqlen_q), "float32")
        results = {"o": qkv["q"], "lse": lse, "do": qkv["q"]}
        call = entry.call(**qkv, **results, **dict.fromkeys(switches, True))
        found.append(replace(case, call=call, simulated=None if "deterministic" in switches else {}))
    return tuple(found)


def fa3_triton_cases(entry: Entry, target: int) -> tuple[Case, ...]:
    """Both of its kinds of asynchrony on Hopper; on Blackwell, where it has them, the compiler's roles."""
    kinds = ("intra_wg_overlap", "warp_specialized") if target == 90 else ("warp_specialized",)
    found = []
    for kind in kinds:
        switches = {name: name == kind for name in ("warp_specialized", "intra_wg_overlap")}
        for head_dim, causal, dtype in FEW:
            case = Case(
                label(head_dim, causal, dtype, kind),
                entry.call(),
                head_dim,
                dtype,
                causal,
                specialized=kind == "warp_specialized",
                overlapped=kind == "intra_wg_overlap",
                simulated={**switches, "persistent": False, "pingpong": False},
            )
            call = entry.call(**tensors(case), **switches, **({"causal": True} if causal else {}))
            found.append(replace(case, call=call))
    return tuple(found)


def block_sparse_cases(entry: Entry, target: int) -> tuple[Case, ...]:
    found = []
    for head_dim, causal, dtype in FEW:
        case = Case(label(head_dim, causal, dtype), entry.call(), head_dim, dtype, causal)
        blocks = case.seqlen_q // 128
        arguments = {**tensors(case), "block_mask": Tensor((1, 1, blocks, blocks), "bool"), "causal": causal}
        found.append(replace(case, call=entry.call(**arguments)))
    return tuple(found)


def split_kv_cases(entry: Entry, target: int) -> tuple[Case, ...]:
    """One query, of which those of a group share a tile of 16 rows; and as many as fill one of 64, as simulated."""
    found = []
    for head_dim, queries in ((64, 1), (128, 1), (128, 16)):
        case = Case(
            label(head_dim, False, HALF, f"seqlen_q {queries}"),
            entry.call(),
            head_dim,
            seqlen_q=queries,
            seqlen_k=16384,
            heads=32,
            heads_kv=8,
            simulated={} if queries > 1 else None,
        )
        found.append(replace(case, call=entry.call(**tensors(case))))
    return tuple(found)


USUAL = ((64, False, HALF), (128, False, HALF), (128, True, HALF), (256, False, HALF), (128, False, BF16))
FEW = ((64, False, HALF), (128, False, HALF), (128, True, HALF))
_ENTRIES = (
    Entry(
        "standard",
        {"standard_scores": product, "standard_softmax": softmax_of_rows, "standard_output": product},
        attention_cases(*FEW),
        schedule="standard",
        charged={"standard_scores": None},  # simulated with a Q that stays for a row of tiles
        scaled=True,
    ),
    Entry(
        "fa1",
        {"fa1_fwd": forward_through_memory},
        attention_cases(*FEW),
        schedule="fa1",
    ),
    Entry("fa2", {"fa2_fwd": forward}, attention_cases(*USUAL), schedule="fa2"),
    Entry(
        "fa2_backward",
        {"fa2_bwd": gradients_by_keys, "fa2_bwd_dq": gradients_by_rows},
        backward_cases,
        schedule="fa2",
        direction="bwd",
    ),
    Entry(
        "fa3_triton",
        {"fa3_triton_fwd": forward, "fa3_triton_fwd_overlap": forward},
        fa3_triton_cases,
        targets=(90, 100),
        schedule="fa3",
        charged={"fa3_triton_fwd": "fa3_fwd", "fa3_triton_fwd_overlap": "fa3_fwd"},
    ),
    Entry(
        "fa3",
        {"fa3_fwd": forward},
        attention_cases(*USUAL, specialized=True, overlapped=True),
        targets=(90,),
        schedule="fa3",
        implementation="gluon",
    ),
    Entry(
        "fa3_fp8",
        {"fa3_fp8_fwd": forward},
        attention_cases((64, False, FP8), (128, False, FP8), (128, True, FP8), tensor_dtype=HALF),
        targets=(90, 100),
    ),
    Entry("block_sparse", {"block_sparse_fwd": forward}, block_sparse_cases),
    Entry("split_kv", {"split_kv_fwd": forward}, split_kv_cases, schedule="split_kv"),
)
KERNELS = {entry.name: entry for entry in _ENTRIES}


def find_kernel(name: str) -> Entry:
    """Raises InputError for a name that KERNELS does not have."""
    if name not in KERNELS:
        raise InputError(unknown("kernel", name, KERNELS))
    return KERNELS[name]


def find_target(name: str) -> int:
    """80 for "sm_80". Raises InputError for a name that TARGETS does not have."""
    if name not in TARGETS:
        raise InputError(unknown("target", name, TARGETS))
    return TARGETS[name]


def sizes(case: Case, kernel: Compiled, looped: bool) -> Sizes:
    """The sizes of a launch of `case`. A kernel whose tile is a descriptor's box has no BLOCK_N of its own."""
    return Sizes(
        rows=kernel.constants["BLOCK_M"],
        keys=kernel.constants["BLOCK_N"] if "BLOCK_N" in kernel.constants else _box(kernel.types["k"])[-2],
        d=case.head_dim,
        d_v=case.head_dim,
        element=ELEMENT[case.dtype],
        looped=looped,
        constants=kernel.constants,
    )


def _box(descriptor: str) -> list[int]:
    """[64, 128] for tensordesc<fp16[64, 128],...>."""
    found = re.search(r"\[([\d, ]+)\]", descriptor)
    assert found, descriptor
    return [int(size) for size in found[1].split(",")]


def expected_mma(target: int, rows: int, dtype: str) -> str:
    """The tensor core instruction that `target` has for a tile of `rows` rows; wgmma and tcgen05 take 64 at least."""
    fp8 = dtype == FP8
    if target >= 100 and target < 120 and rows >= 64:
        return "UTCQMMA" if fp8 else "UTCHMMA"
    if target == 90 and rows >= 64:
        return "QGMMA" if fp8 else "HGMMA"
    return "QMMA" if fp8 else "HMMA"
