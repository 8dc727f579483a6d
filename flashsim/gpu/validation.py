"""What `validate` is asked for, and what it finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from flashsim.devices import DeviceSpec
from flashsim.gpu.exactness import Subject
from flashsim.gpu.measurements import Measurement
from flashsim.problem import AttentionProblem

FIGURES = (("fa3", "SDPA cuDNN"), ("fa3_triton", "SDPA cuDNN"), ("fa2", "SDPA flash"), ("fa2_backward", "SDPA flash"))
"""Ours and torch's, whose speeds are compared."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    kernels: tuple[str, ...] = ()
    """All of them, if none is named."""
    gpu: str = "auto"
    """The device that predictions are made for: auto, a name or a file."""
    examples: int | None = None
    output: str | None = None
    timelines: str | None = None
    quick: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Exactness:
    """One kernel, tried."""

    kernel: str
    place: str
    """cuda, interpreter or stand-in."""
    examples: int
    failure: dict[str, Any] | None
    """{kind, message, problem, trial} of the smallest problem found on which it fails."""

    @property
    def passed(self) -> bool:
        return self.failure is None


@dataclass(frozen=True)
class Prediction:
    """Beside a measurement: the simulated time, or why there is none."""

    time_us: float | None
    refused: str | None = None


@dataclass
class Validation:
    """What was found, filled in as it comes."""

    request: Request
    subjects: list[Subject]
    spec: DeviceSpec | None
    """That predictions are made for."""
    machine: dict[str, Any] = field(default_factory=dict)
    """`clocks.describe` of the GPU and the software."""
    exactness: list[Exactness] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    predictions: dict[str, Prediction] = field(default_factory=dict)
    """By the id of a measurement."""
    audits: list[Any] = field(default_factory=list)
    timelines: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def on_gpu(self) -> bool:
        return bool(self.machine.get("gpu"))

    @property
    def passed(self) -> bool:
        """Whether all that was run is right. How fast a kernel is decides nothing."""
        return self.complete and all(one.passed for one in [*self.exactness, *self.audits])

    @property
    def figures(self) -> list[dict[str, Any]]:
        """How fast our kernels are, as a part of torch's speed at the same problem in the same run."""
        times = {(m.variant, m.problem): m.times.time_us for m in self.measurements}
        return [
            {"ours": ours, "other": other, "problem": problem, "speed": times[other, problem] / time}
            for ours, other in FIGURES
            for (name, problem), time in times.items()
            if name == ours and (other, problem) in times
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys, as `--json` prints it."""
        return {
            "passed": self.passed,
            "complete": self.complete,
            "machine": self.machine,
            "gpu": self.spec.name if self.spec else None,
            "exactness": [{**asdict(one), "passed": one.passed} for one in self.exactness],
            "measurements": [{**m.to_json(), **self._beside(m)} for m in self.measurements],
            "figures": [{**figure, "problem": fields(figure["problem"])} for figure in self.figures],
            "audits": [{"kernel": a.kernel, "target": a.target, "exists": a.exists, "passed": a.passed,
                        "problems": [line for case in a.cases for line in case.problems]} for a in self.audits],
            "timelines": self.timelines,
            "not_run": self.not_run,
        }  # fmt: skip

    def _beside(self, measurement: Measurement) -> dict[str, Any]:
        found = self.predictions.get(measurement.id)
        return {
            "predicted_us": found and found.time_us,
            "error": found.time_us / measurement.times.time_us - 1 if found and found.time_us else None,
            "refused": found and found.refused,
        }


def fields(problem: AttentionProblem) -> dict[str, Any]:
    """As JSON has them."""
    return {name: getattr(problem, name) for name in problem.__dataclass_fields__}


def words(problem: AttentionProblem) -> str:
    """Such as `fwd fp16 D 128 S 4096 causal`."""
    p = problem
    queries = "" if p.seqlen_q == p.seqlen_k else f" Q {p.seqlen_q}"
    return f"{p.direction} {p.dtype} D {p.head_dim} B {p.batch}{queries} S {p.seqlen_k} {p.mask}"
