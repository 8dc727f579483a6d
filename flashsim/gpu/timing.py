"""Times of kernels on a GPU, by CUDA events.

Variants of one problem are measured round by round, each once a round, and each round begins with another one: what the
clock does meanwhile, it does to all of them. A measurement is two launches, of which the first finds an L2 full of
something else and the second what the first left there. A round is held back until the host has issued all of it, so
that nothing waits for the host; a round that it was late for is measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

ROUNDS = 5, 100
"""Least and most."""
HOLD_S = 0.002
"""For the first round; a round is held for as long as the host took for the last, and half of it more."""
LATE_ROUNDS = 20
"""So many in a row, and the host cannot keep up: they count."""
CLEAR_BYTE = 256 << 20
"""At least; and twice the L2."""
FATAL = (
    "CUDA error",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "illegal instruction",
    "device-side assert",
)


class Event(Protocol):
    """A point in the GPU's queue."""

    def record(self) -> None: ...

    def passed(self) -> bool:
        """Whether the GPU has come there."""

    def us_since(self, earlier: Event) -> float: ...


class Gpu(Protocol):
    """What a measurement asks of a GPU."""

    def event(self) -> Event: ...

    def clear_l2(self) -> None: ...

    def hold(self, seconds: float) -> None:
        """Keep the GPU from what is issued after this, for about so long."""

    def synchronize(self) -> None: ...


@dataclass
class Times:
    """Of one variant: microseconds of each measurement, or why there are none."""

    cold_us: list[float] = field(default_factory=list)
    """With an L2 full of something else."""
    warm_us: list[float] = field(default_factory=list)
    """Right after the same."""
    late: bool = False
    """The host could not keep up: these are times of the host."""
    failure: str | None = None

    @property
    def time_us(self) -> float:
        return median(self.cold_us)

    @property
    def warm_time_us(self) -> float:
        return median(self.warm_us)

    @property
    def spread(self) -> float:
        """Of the times with a cold L2, the range without the lowest and highest tenth, as a part of the median."""
        times = sorted(self.cold_us)
        outside = len(times) // 10
        return (times[-1 - outside] - times[outside]) / self.time_us


def measure(variants: Mapping[str, Callable[[], object]], gpu: Gpu, budget_s: float) -> dict[str, Times]:
    """Time the variants for about `budget_s` seconds on the GPU together, each for about as long as the others.

    A variant that raises is left out from there on, with the exception's text as its failure; an exception that says
    that the GPU's context is gone (`is_fatal`) is raised.
    """
    found = {name: Times() for name in variants}
    estimates: dict[str, float] = {}
    for name, run in variants.items():
        with _failing(found[name]):
            run()  # compiles
            gpu.synchronize()
            run()
            estimates[name] = max(1.0, _pair(run, gpu)[1]())
    if not estimates:
        return found
    share_us = budget_s * 1e6 / len(estimates)
    counts = {name: min(max(ROUNDS[0], round(share_us / (2 * us))), ROUNDS[1]) for name, us in estimates.items()}
    rounds, hold_s, late = max(counts.values()), HOLD_S, 0
    number = 0
    while number < rounds:
        names = [n for n in _rotated(list(counts), number) if _takes_part(number, counts[n], rounds)]
        names = [n for n in names if found[n].failure is None]
        began = time.perf_counter()
        gpu.hold(hold_s)
        issued: list[tuple[str, Event, Callable[[], float], Callable[[], float]]] = []
        for name in names:
            with _failing(found[name]):
                issued.append((name, *_pair(variants[name], gpu)))
        took = time.perf_counter() - began
        in_time = not issued or not issued[0][1].passed()
        gpu.synchronize()
        hold_s = max(HOLD_S, 1.5 * took) if in_time else max(2 * hold_s, 1.5 * took)
        late = 0 if in_time else late + 1
        if in_time or late > LATE_ROUNDS:
            for name, _, cold, warm in issued:
                found[name].cold_us.append(cold())
                found[name].warm_us.append(warm())
                found[name].late |= not in_time
            number += 1
    return found


def _pair(run: Callable[[], object], gpu: Gpu) -> tuple[Event, Callable[[], float], Callable[[], float]]:
    """Issues a measurement: where it begins, and what it came to once the GPU is there."""
    start, middle, end = gpu.event(), gpu.event(), gpu.event()
    gpu.clear_l2()
    start.record()
    run()
    middle.record()
    run()
    end.record()
    return start, lambda: middle.us_since(start), lambda: end.us_since(middle)


def _rotated(names: list[str], by: int) -> list[str]:
    first = by % len(names)
    return names[first:] + names[:first]


def _takes_part(number: int, count: int, rounds: int) -> bool:
    """In `count` of the rounds, evenly spread."""
    return (number + 1) * count // rounds > number * count // rounds


class _failing:  # noqa: N801 - used as a statement
    """Notes an exception as the failure of a variant."""

    def __init__(self, times: Times) -> None:
        self.times = times

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception) or is_fatal(error):
            return False
        self.times.failure = reason_of(error)
        return True


def is_fatal(error: BaseException) -> bool:
    """Whether nothing can run in this process any more: a fault in a kernel ends the context."""
    return type(error).__name__ == "AcceleratorError" or any(text in str(error) for text in FATAL)


def reason_of(error: BaseException) -> str:
    """Its kind and first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = max(CLEAR_BYTE, 2 * getattr(properties, "L2_cache_size", 0))
        self._buffer = torch.empty(size // 4, dtype=torch.int32, device="cuda")
        self._clk_per_s = self._rate()

    def _rate(self) -> float:
        """Cycles a second of the clock that `hold` counts."""
        start, end = self.event(), self.event()
        self._torch.cuda._sleep(1_000_000)
        start.record()
        self._torch.cuda._sleep(20_000_000)
        end.record()
        self.synchronize()
        return 20_000_000 / (end.us_since(start) * 1e-6)

    def event(self) -> _CudaEvent:
        return _CudaEvent(self._torch.cuda.Event(enable_timing=True))

    def clear_l2(self) -> None:
        self._buffer.zero_()

    def hold(self, seconds: float) -> None:
        self._torch.cuda._sleep(int(seconds * self._clk_per_s))

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()


class _CudaEvent:
    def __init__(self, event: Any) -> None:
        self._event = event

    def record(self) -> None:
        self._event.record()

    def passed(self) -> bool:
        return bool(self._event.query())

    def us_since(self, earlier: Any) -> float:
        # Which has been waited for, and so has what lies between.
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) * 1e3
