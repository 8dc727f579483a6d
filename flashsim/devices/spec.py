"""A GPU as plain numbers. Each field is one entry of a device file, under the section that its class stands for.

Units are in the names: `_clk` SM clocks, `_ns` and `_us` time; `_byte_per_clk`, `_flop_per_clk`, `_op_per_clk` per SM.
Memory beyond the SM is kept in ns and bytes per ns, since its speed does not follow the SM clock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Final

MAY_BE_ZERO: Final = {"may_be_zero": True}
"""Metadata of a field that is a cost; every other number must be positive."""


@dataclass(frozen=True)
class Citation:
    """Where one number of a device file comes from; `note` names the values that contradict it."""

    value: float
    status: str
    """datasheet, measured, derived (computed from quoted numbers), fitted (the note says to what), or assumed."""
    source: str
    note: str = ""


@dataclass(frozen=True)
class Clock:
    datasheet_mhz: float
    """The clock at which the datasheet's TFLOP/s are reached; often below `max_mhz`."""
    max_mhz: float


@dataclass(frozen=True)
class Power:
    tdp_w: float


@dataclass(frozen=True)
class Sm:
    count: int
    sub_partitions: int
    max_warps: int
    max_ctas: int
    registers: int
    """32-bit registers per SM."""
    max_registers_per_thread: int
    register_granularity_per_warp: int
    """Registers are handed to a warp in multiples of this."""


@dataclass(frozen=True)
class Smem:
    per_sm_byte: int
    per_cta_max_byte: int
    reserved_per_cta_byte: int = field(metadata=MAY_BE_ZERO)
    """Taken by the system from `per_sm_byte` for each resident CTA."""
    byte_per_clk: float
    latency_clk: float = field(metadata=MAY_BE_ZERO)


@dataclass(frozen=True)
class Tensor:
    fp16_flop_per_clk: float
    """Dense, per SM; bf16 alike."""
    fp16_tflops: float
    """The datasheet's dense rate of the chip."""
    mma_sync_clk: float
    """Issue interval of mma.sync m16n8k16 on one sub-partition."""
    mma_sync_latency_clk: float = field(metadata=MAY_BE_ZERO)
    fp8_flop_per_clk: float | None = None
    """None where the part has no FP8."""


@dataclass(frozen=True)
class Wgmma:
    """Issue interval of m64nNk16: max(clk_fixed + clk_per_n N, smem_clk_fixed + smem_clk_per_n N).

    The second term, the operands' shared-memory reads, applies when both operands lie in shared memory.
    """

    clk_fixed: float = field(metadata=MAY_BE_ZERO)
    clk_per_n: float
    smem_clk_fixed: float = field(metadata=MAY_BE_ZERO)
    smem_clk_per_n: float = field(metadata=MAY_BE_ZERO)
    fill_clk: float = field(metadata=MAY_BE_ZERO)
    """From the issue of a group to its first instruction's start on an idle tensor core."""
    drain_clk: float = field(metadata=MAY_BE_ZERO)
    """From the last instruction's end to the wait that sees it."""


@dataclass(frozen=True)
class Tma:
    issue_clk: float = field(metadata=MAY_BE_ZERO)
    l2_latency_ns: float = field(metadata=MAY_BE_ZERO)
    """From issue to a waiter's wake-up, less the time of the bytes at `sm_byte_per_ns`."""
    hbm_latency_ns: float = field(metadata=MAY_BE_ZERO)
    """The same for data that L2 does not hold."""
    sm_byte_per_ns: float
    """Rate at which one SM receives what its TMA loads."""
    mbarrier_clk: float = field(metadata=MAY_BE_ZERO)
    """Arrive on an mbarrier until a waiter sees it."""


@dataclass(frozen=True)
class Pipes:
    """Rates count thread instructions per clock and SM unless a field says otherwise."""

    exp_op_per_clk: float
    pack_op_per_clk: float
    """Conversions of two fp32 values to one fp16x2 or bf16x2."""
    pack_on_exp_pipe: int = field(metadata={"choices": (0, 1)})
    """1: packing shares the exp (MUFU/XU) pipe; 0: it has a pipe of its own."""
    fma_op_per_clk: float
    alu_op_per_clk: float
    """fp32 compare, minimum and maximum."""
    issue_inst_per_clk: float
    """Warp instructions per clock and SM."""
    row_reduce_clk: float = field(metadata=MAY_BE_ZERO)
    """Latency of a row reduction after each thread has reduced what it holds."""


@dataclass(frozen=True)
class Barrier:
    named_clk: float = field(metadata=MAY_BE_ZERO)
    """Hand-over by a named barrier."""
    cta_clk: float = field(metadata=MAY_BE_ZERO)
    """__syncthreads of four warps."""


@dataclass(frozen=True)
class Memory:
    l2_byte: int
    l2_share_byte: int
    """What one SM's working set finds near: one L2 partition, or the whole L2 where it is not divided."""
    l2_byte_per_ns: float
    """Read rate of the whole chip."""
    l2_latency_ns: float = field(metadata=MAY_BE_ZERO)
    """Of a plain load; mean of near and far partitions."""
    hbm_latency_ns: float = field(metadata=MAY_BE_ZERO)
    sm_byte_per_ns: float
    """Rate at which one SM receives plain and cp.async loads from L2."""
    hbm_byte: int
    hbm_byte_per_ns: float
    """Achievable read rate of the whole chip."""
    hbm_peak_byte_per_ns: float
    """The datasheet's rate."""
    jitter_ns: float = field(metadata=MAY_BE_ZERO)
    """Spread of memory latency in the full simulation."""


@dataclass(frozen=True)
class Launch:
    kernel_us: float = field(metadata=MAY_BE_ZERO)
    """From a launch's arrival to the start of its first CTA."""
    cta_interval_ns: float = field(metadata=MAY_BE_ZERO)
    """Between the starts of two CTAs of a launch, wherever on the chip."""
    gap_us: float = field(metadata=MAY_BE_ZERO)
    """Between dependent kernels of one call."""
    cta_clk: float = field(metadata=MAY_BE_ZERO)
    """From a CTA's start to its first load."""


@dataclass(frozen=True)
class Library:
    """What a framework's kernels reach, for standard attention."""

    gemm_flop_per_ns: float
    """Whole chip."""
    stream_efficiency: float = field(metadata={"at_most": 1.0})
    """Fraction of `memory.hbm_peak_byte_per_ns` that elementwise kernels reach."""

    indexed_efficiency: float = field(metadata={"at_most": 1.0})
    """The same of elementwise kernels that find each element's place by divisions, since an operand is broadcast or
    permuted; bytes of a broadcast operand are not counted."""

    def byte_per_ns(self, hbm_peak_byte_per_ns: float, indexed: bool = False, flop_per_byte: float = 0.0) -> float:
        """The HBM rate of an elementwise kernel, or of a product that does `flop_per_byte`.

        Timing assumption: a product moves data as fast as a vectorized elementwise kernel, and not while the tensor
        cores work, so that the two times add: the published rows of PyTorch's attention come out so.
        """
        efficiency = self.indexed_efficiency if indexed else self.stream_efficiency
        return 1 / (1 / (efficiency * hbm_peak_byte_per_ns) + flop_per_byte / self.gemm_flop_per_ns)


SECTIONS: Final[Mapping[str, type[Any]]] = {
    "clock": Clock,
    "power": Power,
    "sm": Sm,
    "smem": Smem,
    "tensor": Tensor,
    "wgmma": Wgmma,
    "tma": Tma,
    "pipes": Pipes,
    "barrier": Barrier,
    "memory": Memory,
    "launch": Launch,
    "library": Library,
}
OPTIONAL_SECTIONS: Final = ("wgmma", "tma")


@dataclass(frozen=True)
class DeviceSpec:
    """One GPU. `dataclasses.replace` on a section gives a what-if device; its hash follows, its citations do not."""

    name: str
    title: str
    architecture: str
    """ampere, ada or hopper."""
    compute_capability: str
    clock: Clock
    power: Power
    sm: Sm
    smem: Smem
    tensor: Tensor
    pipes: Pipes
    barrier: Barrier
    memory: Memory
    launch: Launch
    library: Library
    wgmma: Wgmma | None = None
    tma: Tma | None = None
    citations: Mapping[str, Citation] = field(default_factory=dict, repr=False, compare=False)
    """By `section.key`, for every number of the device's file."""

    def numbers(self) -> dict[str, float]:
        """Every number that the device has, by `section.key`, in the order of the sections."""
        found: dict[str, float] = {}
        for section in SECTIONS:
            part = getattr(self, section)
            if part is None:
                continue
            for entry in fields(part):
                value = getattr(part, entry.name)
                if value is not None:
                    found[f"{section}.{entry.name}"] = value
        return found

    @cached_property
    def device_hash(self) -> str:
        """12 hex digits over what a simulation reads: architecture and numbers, not name, sources or notes."""
        read = {
            "architecture": self.architecture,
            "compute_capability": self.compute_capability,
            **{key: repr(float(value)) for key, value in self.numbers().items()},
        }
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:12]
