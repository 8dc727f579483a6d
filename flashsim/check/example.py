"""One thing to check: a schedule, a problem, switches, numbers and latencies; and what a run of it must come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np

from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import SimulationError
from flashsim.machine.options import Options
from flashsim.machine.trace import Trace
from flashsim.numerics.functional import judge, run_tensors
from flashsim.numerics.reference import attention_reference
from flashsim.problem import AttentionProblem
from flashsim.result import Functional
from flashsim.schedules import Schedule
from flashsim.simulate import configured, naming_lines_of, run_kernels
from flashsim.testing.cases import AttentionCase

KINDS = ("tensor", "exp", "fma", "alu", "pack", "smem", "tma", "issue", "link", "memory", "latency", "barrier", "fill",
         "drain")  # fmt: skip
"""What durations are asked for: units of an SM, and waits that are no unit's work."""
MODES = ("hardware", "zero", "random", "far beyond")
FAR_BEYOND = 1 << 24
"""Ticks: 65536 cycles, a hundred times the latency of HBM."""


class NotAccepted(SimulationError):
    """A run came to its end with wrong numbers."""


@dataclass(frozen=True)
class Latencies:
    """How long operations take, by their kind; what is not named takes as long as on hardware."""

    modes: tuple[tuple[str, str], ...] = ()
    """(kind, `zero`, `random` up to twenty times what it takes on hardware, or `far beyond`)."""
    seed: int = 0

    def draw(self) -> Callable[[str, int], int]:
        """For one run: the same questions in the same order get the same answers."""
        modes, random = dict(self.modes), Random(self.seed)

        def duration(kind: str, ticks: int) -> int:
            mode = modes.get(kind)
            if mode is None:
                return ticks
            if mode == "zero":
                return 0
            if mode == "far beyond":
                return random.randrange(FAR_BEYOND)
            return random.choice((ticks, random.randrange(2 * ticks + 1), random.randrange(20 * ticks + 1)))

        return duration

    def __str__(self) -> str:
        if not self.modes:
            return "as on hardware"
        words = [f"{kind} {mode}" for kind, mode in self.modes]
        return f"{', '.join(words)} (seed {self.seed})"


@dataclass(frozen=True)
class Example:
    """One example of a check."""

    schedule: type[Schedule] = field(repr=False)
    gpu: str
    sms: int
    """SMs of the GPU that are left: with few of them, a CTA of a small problem has many tiles to work on."""
    options: dict[str, Any]
    attention: AttentionCase
    latencies: Latencies
    rounded: bool = False
    """Round every tile to its dtype, and judge by the rule for low precision."""

    @property
    def problem(self) -> AttentionProblem:
        return self.attention.problem

    @property
    def device(self) -> DeviceSpec:
        device = load_device(self.gpu)
        return replace(device, sm=replace(device.sm, count=self.sms))

    def compute(self, latencies: Latencies, trace: Trace | None = None) -> dict[str, Any]:
        """The tensors after a functional run. Raises SimulationError for a wrong schedule."""
        device, problem = self.device, self.problem
        tensors = run_tensors(problem, *self.attention.qkv)
        settings = Options(draw=latencies.draw(), tensors=tensors, rounded=self.rounded, trace=trace)
        chosen = configured(self.schedule, problem, device, self.options)
        with naming_lines_of(self.schedule), np.errstate(all="ignore"):
            run_kernels(problem, chosen, device, device.clock.datasheet_mhz, settings)
        return tensors

    def run(self) -> dict[str, Any]:
        """The tensors after a run at the latencies of hardware. Raises SimulationError if anything is wrong."""
        tensors = self.compute(Latencies())
        found = judge(self.problem, tensors, self.rounded, self.schedule.stores_scores)
        if not found.accepted:
            raise NotAccepted(f"wrong numbers: {_errors(self.problem, found, tensors)}")
        return tensors

    def check(self) -> None:
        """Run at the latencies of hardware and at the drawn ones; the results must be right, and equal to the bit.

        Raises SimulationError. No schedule may let latencies decide the order in which a row of O is summed.
        """
        there = self.run()
        if self.latencies.modes:
            elsewhere = self.compute(self.latencies)
            for name in ("O", "LSE"):
                if not np.array_equal(there[name], elsewhere[name]):
                    raise NotAccepted(f"{name} depends on latencies: other bits where they are {self.latencies}")


def _errors(problem: AttentionProblem, found: Functional, tensors: dict[str, Any]) -> str:
    """How far off the results are, and where, in words."""
    unwritten = [name for name in ("O", "LSE") if np.isnan(tensors[name]).any()]
    if unwritten:
        return f"{' and '.join(unwritten)} not written, or not a number{_rows(np.isnan(tensors[unwritten[0]]))}"
    o, lse = attention_reference(tensors["Q"], tensors["K"], tensors["V"], problem.mask)
    with np.errstate(invalid="ignore"):
        off = {"O": np.abs(tensors["O"] - o), "LSE": np.abs(tensors["LSE"] - lse.transpose(0, 2, 1))}
    errors = {"O": found.max_abs_error, "LSE": found.lse_max_abs_error}
    # What is off by more than a tenth of the largest error: rounding is left out.
    return " and ".join(
        f"errors up to {error:.2g} in {name}" + (_rows(off[name] > error / 10) if error > 0 else "")
        for name, error in errors.items()
    )


def _rows(wrong: Any) -> str:
    """The rows with a wrong element: batch entries, heads and queries."""
    wrong = wrong.any(axis=tuple(range(3, wrong.ndim)))
    if not wrong.any():
        return ""
    batch, rows, heads = (np.unique(axis) for axis in np.nonzero(wrong))
    return f" ({np.sum(wrong)} of {wrong.size} rows: batch {_span(batch)}, heads {_span(heads)}, queries {_span(rows)})"


def _span(numbers: Any) -> str:
    first, last = int(numbers[0]), int(numbers[-1])
    if first == last:
        return str(first)
    return f"{first} to {last}" if last - first + 1 == len(numbers) else f"{len(numbers)} of {first} to {last}"
