"""What a simulation answers. A value: it holds no reference to the machine that produced it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

UNITS = ("tensor", "exp", "fma", "alu", "smem", "tma", "issue", "l2", "hbm")


@dataclass(frozen=True)
class Utilization:
    """Busy fraction of one unit, in Nsight Compute's words: of the cycles in which an SM had a resident CTA
    (`active`) and of all cycles of the operation (`elapsed`, launch, ramp and tail included)."""

    active: float
    elapsed: float


@dataclass(frozen=True)
class KernelTime:
    """One kernel of the operation; `time_us` includes its launch."""

    name: str
    time_us: float
    ticks: int


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of one tensor that moved between HBM and L2."""

    read: int
    written: int


@dataclass(frozen=True)
class HbmBytes:
    """Bytes moved between HBM and L2, in all and by tensor."""

    read: int
    written: int
    tensors: dict[str, TensorBytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Functional:
    """What the numbers of a functional run came to, against float64 naive attention.

    `hazards` is empty in a run that finished: a hazard ends the simulation with an exception.
    """

    max_abs_error: float
    mean_abs_error: float
    lse_max_abs_error: float
    accepted: bool
    hazards: tuple[str, ...] = ()
    gradient_max_abs_error: dict[str, float] | None = None
    """Of dq, dk and dv, after a backward pass."""


@dataclass(frozen=True)
class Result:
    """One simulated attention operation. Times in microseconds, ratios as fractions, FLOP/s in units of 1e12."""

    schedule: str
    gpu: str
    time_us: float
    tflops: float
    clock_mhz: float
    clock_source: str
    peak_fraction: float
    """Of the peak at the run's clock."""
    datasheet_fraction: float
    """Of the datasheet's peak."""
    flops: int
    flops_executed: int
    """With tile padding and the masked part of partial tiles."""
    hbm_bytes: HbmBytes
    peak_memory_bytes: int
    """Of HBM: inputs, outputs, and what the schedule keeps beside them."""
    utilization: dict[str, Utilization]
    bound_by: str
    """A unit's name, `latency` (no unit is busy three quarters of the time) or `launch`."""
    kernels: tuple[KernelTime, ...]
    tile: dict[str, int]
    options: dict[str, Any]
    ctas_per_sm: int
    events: int
    """Events the engine processed: the cost of the answer."""
    ticks: int
    problem: dict[str, Any]
    flashsim_version: str
    device_hash: str
    functional: Functional | None = None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys, as `--json` prints it."""
        return dataclasses.asdict(self)
