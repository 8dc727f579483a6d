"""Clocks, power and temperature, from an nvidia-ml-py that is made up."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from flashsim.gpu.clocks import Sample, Sampler, describe, reader_of, state_of


def samples(*clocks: float, reasons: int = 0) -> list[Sample]:
    return [Sample(clock, 3201, 600 + n, 50 + n, reasons) for n, clock in enumerate(clocks)]


def test_the_state_is_that_of_the_median_sample() -> None:
    state = state_of([*samples(1980, 1500, 1600), *samples(1600, reasons=0x4 | 0x1)])
    assert state is not None
    assert (state.sm_mhz, state.memory_mhz, state.power_w, state.temperature_c) == (1600, 3201, 600.5, 52)
    assert state.throttled == {"power cap": 0.25}
    assert state.samples == 4
    assert state_of([]) is None


def test_the_sampler_asks_until_it_is_left() -> None:
    with Sampler(lambda: samples(1500)[0], every_s=0.001) as sampler:
        time.sleep(0.05)
    taken = len(sampler.samples)
    assert taken > 1
    time.sleep(0.01)
    assert len(sampler.samples) == taken


def test_a_sampler_without_a_reader_or_with_one_that_fails_has_no_samples() -> None:
    def fails() -> Sample:
        raise OSError("NVML is gone")

    for read in (None, fails):
        with Sampler(read, every_s=0.001) as sampler:
            pass
        assert sampler.samples == []


def test_without_nvidia_ml_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    read, about = reader_of("GPU-1")
    assert read is None
    assert about == {"clock_unknown": "nvidia-ml-py is not installed (pip install nvidia-ml-py)"}


class FakeNvml(SimpleNamespace):
    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = "sm", "memory", "gpu"

    def __init__(self, **given: Any) -> None:
        super().__init__(
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
            nvmlDeviceGetClockInfo=lambda gpu, kind: {"sm": 1755, "memory": 3201}[kind],
            nvmlDeviceGetPowerUsage=lambda gpu: 512_345,
            nvmlDeviceGetTemperature=lambda gpu, kind: 61,
            nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: 4,
            nvmlSystemGetDriverVersion=lambda: b"580.1",
            nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700_000,
            nvmlDeviceGetMaxClockInfo=lambda gpu, kind: 1980,
        )
        vars(self).update(given)


def test_what_nvml_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    read, about = reader_of("GPU-1")
    assert about == {"driver": "580.1", "power_limit_w": 700, "max_sm_mhz": 1980}
    assert read is not None
    assert read() == Sample(1755, 3201, 512.345, 61, 4)


def test_the_newer_name_of_throttle_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: 8))
    read, _ = reader_of("GPU-1")
    assert read is not None
    assert read().reasons == 8


def test_nvml_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> None:
        raise FakeNvml.NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(nvmlInit=refuses))
    assert reader_of("GPU-1") == (None, {"clock_unknown": "nvidia-ml-py: Driver Not Loaded"})


def test_a_machine_without_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = describe()
    assert found == {
        "gpu": None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
