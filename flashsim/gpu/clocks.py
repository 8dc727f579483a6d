"""The state of a GPU while kernels are timed on it: clocks, power, temperature, and what holds the clock down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

SAMPLE_S = 0.01
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Why a clock is lower than it could be (nvml.h, nvmlClocksEventReason...)."""


@dataclass(frozen=True)
class Sample:
    """The state of a GPU at one time."""

    sm_mhz: float
    memory_mhz: float
    power_w: float
    temperature_c: float
    reasons: int
    """Why the clock is not higher, as nvml.h has the bits."""


@dataclass(frozen=True)
class State:
    """The state of a GPU over some time: medians, the highest temperature, and what held the clock down."""

    sm_mhz: float
    memory_mhz: float
    power_w: float
    temperature_c: float
    throttled: dict[str, float]
    """Reason: the part of the samples in which it held the clock down."""
    samples: int


def state_of(samples: Sequence[Sample]) -> State | None:
    """None without samples."""
    if not samples:
        return None
    throttled = {name: sum(bool(s.reasons & bit) for s in samples) / len(samples) for bit, name in REASONS.items()}
    return State(
        sm_mhz=median(s.sm_mhz for s in samples),
        memory_mhz=median(s.memory_mhz for s in samples),
        power_w=median(s.power_w for s in samples),
        temperature_c=max(s.temperature_c for s in samples),
        throttled={name: part for name, part in throttled.items() if part},
        samples=len(samples),
    )


class Sampler:
    """Asks for the GPU's state in a thread, until it is left.

        with Sampler(read) as sampler:
            ...
        state = state_of(sampler.samples)

    `read` is None where nobody can be asked.
    """

    def __init__(self, read: Callable[[], Sample] | None, every_s: float = SAMPLE_S) -> None:
        self.samples: list[Sample] = []
        self._read, self._every_s = read, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while self._read is not None:
            try:
                self.samples.append(self._read())
            except Exception:  # of the library, which may not even be installed: the clock is unknown then
                return
            if self._done.wait(self._every_s):
                return

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def reader_of(uuid: str) -> tuple[Callable[[], Sample] | None, dict[str, Any]]:
    """What reads the state of the GPU with this UUID by nvidia-ml-py, and what that says of it once and for all.

    Without nvidia-ml-py, or where it fails: None, and the reason as `clock_unknown`.
    """
    try:
        import pynvml  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None, {"clock_unknown": "nvidia-ml-py is not installed (pip install nvidia-ml-py)"}
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        reasons = getattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        reasons = reasons or pynvml.nvmlDeviceGetCurrentClocksThrottleReasons

        def read() -> Sample:
            return Sample(
                sm_mhz=pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
                memory_mhz=pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
                power_w=pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
                temperature_c=pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
                reasons=int(reasons(gpu)),
            )

        read()
        about = {
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
            "max_sm_mhz": pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM),
        }
    except pynvml.NVMLError as error:
        return None, {"clock_unknown": f"nvidia-ml-py: {error}"}
    return read, about


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def describe(_: object = None) -> Iterator[dict[str, Any]]:
    """One report: the GPU and the software, or why there is no GPU. Runs in a process of its own."""
    import torch
    import triton

    software = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        yield {"gpu": None, **software}
        return
    properties = torch.cuda.get_device_properties(0)
    _, about = reader_of(f"GPU-{properties.uuid}")
    yield {
        "gpu": torch.cuda.get_device_name(0),
        "capability": 10 * properties.major + properties.minor,
        "memory_byte": properties.total_memory,
        "l2_byte": getattr(properties, "L2_cache_size", None),
        "sms": properties.multi_processor_count,
        "uuid": f"GPU-{properties.uuid}",
        **about,
        **software,
    }
