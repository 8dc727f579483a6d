"""One thing to check: a schedule, a problem, switches, numbers and latencies; and what a run of it must come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, NamedTuple

import numpy as np

from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import SimulationError
from flashsim.machine.options import Options
from flashsim.machine.trace import Trace
from flashsim.numerics.functional import judge, run_tensors
from flashsim.numerics.gradients import attention_gradients_reference
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
OUTPUTS = ("O", "LSE", "dQ", "dK", "dV")
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


class Outcome(NamedTuple):
    """What a run came to."""

    tensors: dict[str, Any]
    order_matters: bool
    """Something was summed in an order that depends on time."""


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

    def compute(self, latencies: Latencies, trace: Trace | None = None) -> Outcome:
        """A functional run. Raises SimulationError for a wrong schedule."""
        device, problem = self.device, self.problem
        do = self.attention.do if "bwd" in problem.passes else None
        tensors = run_tensors(problem, *self.attention.qkv, do)
        settings = Options(draw=latencies.draw(), tensors=tensors, rounded=self.rounded, trace=trace)
        chosen = configured(self.schedule, problem, device, self.options)
        with naming_lines_of(self.schedule), np.errstate(all="ignore"):
            runs = run_kernels(problem, chosen, device, device.clock.datasheet_mhz, settings)
        return Outcome(tensors, any(run.order_matters for run in runs))

    def run(self) -> Outcome:
        """A run at the latencies of hardware. Raises SimulationError if anything is wrong."""
        outcome = self.compute(Latencies())
        found = judge(self.problem, outcome.tensors, self.rounded, self.schedule.stores_scores)
        if not found.accepted:
            raise NotAccepted(f"wrong numbers: {_errors(self.problem, found, outcome.tensors)}")
        if outcome.order_matters and self.options.get("deterministic"):
            raise NotAccepted("it is to be deterministic, and something is summed in an order that depends on time")
        return outcome

    def check(self) -> None:
        """Run at the latencies of hardware and at the drawn ones; the results must be right, and equal to the bit.

        Raises SimulationError. No schedule may let latencies decide the order in which a row of O is summed; gradients
        may be summed by atomic additions, which come as they come.
        """
        there = self.run()
        if self.latencies.modes:
            elsewhere = self.compute(self.latencies)
            for name in ("O", "LSE") if there.order_matters else OUTPUTS:
                if name in there.tensors and not np.array_equal(there.tensors[name], elsewhere.tensors[name]):
                    raise NotAccepted(f"{name} depends on latencies: other bits where they are {self.latencies}")


def _errors(problem: AttentionProblem, found: Functional, tensors: dict[str, Any]) -> str:
    """How far off the results are, and where, in words."""
    outputs = [name for name in OUTPUTS if name in tensors]
    unwritten = [name for name in outputs if np.isnan(tensors[name]).any()]
    if unwritten:
        where = _rows(unwritten[0], np.isnan(tensors[unwritten[0]]))
        return f"{' and '.join(unwritten)} not written, or not a number{where}"
    q, k, v = (tensors[name] for name in ("Q", "K", "V"))
    o, lse = attention_reference(q, k, v, problem.mask, dropout=problem.dropout)
    right, errors = {"O": o, "LSE": lse.transpose(0, 2, 1)}, {"O": found.max_abs_error, "LSE": found.lse_max_abs_error}
    if found.gradient_max_abs_error is not None:
        gradients = attention_gradients_reference(q, k, v, tensors["dO"], problem.mask, dropout=problem.dropout)
        right |= dict(zip(("dQ", "dK", "dV"), gradients, strict=True))
        errors |= dict(zip(("dQ", "dK", "dV"), found.gradient_max_abs_error.values(), strict=True))
    with np.errstate(invalid="ignore"):
        off = {name: np.abs(tensors[name] - right[name]) for name in outputs}
    # What is off by more than a tenth of the largest error: rounding is left out.
    return " and ".join(
        f"errors up to {error:.2g} in {name}" + (_rows(name, off[name] > error / 10) if error > 0 else "")
        for name, error in errors.items()
    )


def _rows(name: str, wrong: Any) -> str:
    """The rows with a wrong element: batch entries, heads, and queries or keys."""
    wrong = wrong.any(axis=tuple(range(3, wrong.ndim)))
    if not wrong.any():
        return ""
    batch, rows, heads = (np.unique(axis) for axis in np.nonzero(wrong))
    what = "keys" if name in ("dK", "dV") else "queries"
    return f" ({np.sum(wrong)} of {wrong.size} rows: batch {_span(batch)}, heads {_span(heads)}, {what} {_span(rows)})"


def _span(numbers: Any) -> str:
    first, last = int(numbers[0]), int(numbers[-1])
    if first == last:
        return str(first)
    return f"{first} to {last}" if last - first + 1 == len(numbers) else f"{len(numbers)} of {first} to {last}"
