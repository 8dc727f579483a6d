"""The arithmetic of measurements, on a GPU that is made up: a clock, a queue, and launches that take a known time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flashsim.gpu import timing
from flashsim.gpu.timing import Times, is_fatal, measure, reason_of


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = self.gpu.now

    def passed(self) -> bool:
        return self.gpu.late > 0

    def us_since(self, earlier: Any) -> float:
        return self.at - earlier.at


class FakeGpu:
    """Time in microseconds; it stands still between launches. The host is late for the first `late` rounds."""

    def __init__(self, late: int = 0) -> None:
        self.now, self.late = 0.0, late
        self.log: list[str] = []
        self.holds: list[float] = []
        self.cold = True

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def clear_l2(self) -> None:
        self.now += 60
        self.cold = True

    def hold(self, seconds: float) -> None:
        self.holds.append(seconds)
        self.log.append("|")

    def synchronize(self) -> None:
        if self.holds:
            self.late -= self.late > 0

    def kernel(self, name: str, cold_us: float, warm_us: float) -> Callable[[], None]:
        def launch() -> None:
            self.now += cold_us if self.cold else warm_us
            self.cold = False
            self.log.append(name)

        return launch


def rounds(gpu: FakeGpu) -> list[str]:
    """The launches of each round, after those that warm up."""
    return "".join(gpu.log).split("|")[1:]


def test_cold_and_warm() -> None:
    gpu = FakeGpu()
    found = measure({"a": gpu.kernel("a", 100, 70), "b": gpu.kernel("b", 50, 50)}, gpu, budget_s=0.001)
    assert found["a"].time_us == 100
    assert found["a"].warm_time_us == 70
    assert found["b"].time_us == found["b"].warm_time_us == 50
    assert not found["a"].late
    assert len(found["a"].cold_us) == timing.ROUNDS[0]


def test_rounds_begin_with_another_one_each_time() -> None:
    gpu = FakeGpu()
    measure({name: gpu.kernel(name, 100, 100) for name in "abc"}, gpu, budget_s=0.001)
    assert rounds(gpu) == ["aabbcc", "bbccaa", "ccaabb", "aabbcc", "bbccaa"]


def test_each_gets_its_share_of_the_time_and_takes_part_evenly() -> None:
    gpu = FakeGpu()
    found = measure({"a": gpu.kernel("a", 100, 100), "b": gpu.kernel("b", 1000, 1000)}, gpu, budget_s=0.02)
    assert (len(found["a"].cold_us), len(found["b"].cold_us)) == (50, 5)
    assert [number for number, launched in enumerate(rounds(gpu)) if "b" in launched] == [9, 19, 29, 39, 49]


def test_most_rounds() -> None:
    gpu = FakeGpu()
    found = measure({"a": gpu.kernel("a", 1, 1)}, gpu, budget_s=1000)
    assert len(found["a"].cold_us) == timing.ROUNDS[1]


def test_a_round_that_the_host_was_late_for_is_measured_again_after_a_longer_hold() -> None:
    gpu = FakeGpu(late=3)
    found = measure({"a": gpu.kernel("a", 100, 100)}, gpu, budget_s=0.001)
    assert len(found["a"].cold_us) == timing.ROUNDS[0]
    assert len(gpu.holds) == timing.ROUNDS[0] + 3
    assert gpu.holds[1] >= 2 * gpu.holds[0]
    assert gpu.holds[3] >= 8 * gpu.holds[0]
    assert not found["a"].late


def test_a_host_that_is_always_late_is_reported() -> None:
    gpu = FakeGpu(late=10**6)
    found = measure({"a": gpu.kernel("a", 100, 100)}, gpu, budget_s=0.001)
    assert found["a"].late
    assert len(found["a"].cold_us) == timing.ROUNDS[0]


def test_one_that_fails_is_left_out() -> None:
    gpu = FakeGpu()

    def fails() -> None:
        raise ValueError("no such thing\nand more")

    found = measure({"bad": fails, "a": gpu.kernel("a", 100, 100)}, gpu, budget_s=0.001)
    assert found["bad"].failure == "ValueError: no such thing"
    assert not found["bad"].cold_us
    assert found["a"].time_us == 100


def test_one_that_fails_later_is_left_out_from_there_on() -> None:
    gpu, calls = FakeGpu(), []

    def fails_later() -> None:
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("out of memory")

    found = measure({"bad": fails_later, "a": gpu.kernel("a", 100, 100)}, gpu, budget_s=0.001)
    assert found["bad"].failure == "RuntimeError: out of memory"
    assert len(calls) == 7
    assert len(found["a"].cold_us) == timing.ROUNDS[0]


def test_nothing_to_measure() -> None:
    assert measure({}, FakeGpu(), 1.0) == {}


def test_a_broken_context_ends_everything() -> None:
    def faults() -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure({"bad": faults}, FakeGpu(), 1.0)


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), True),
        (type("AcceleratorError", (RuntimeError,), {})("whatever"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (ValueError("q: dtype"), False),
    ],
)
def test_what_is_fatal(error: Exception, fatal: bool) -> None:
    assert is_fatal(error) == fatal


def test_spread_leaves_out_a_tenth_on_each_side() -> None:
    assert Times(cold_us=[100.0] * 18 + [1.0, 900.0]).spread == 0
    assert Times(cold_us=[90.0, 100.0, 110.0]).spread == pytest.approx(0.2)


def test_reasons_in_one_line() -> None:
    assert reason_of(RuntimeError("\n  a  \nb")) == "RuntimeError: a"
    assert reason_of(KeyError()) == "KeyError"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """A copy of 256 MiB takes about what it must, with a cold L2 and with a warm one."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU")
    x = torch.empty(64 << 20, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    found = measure({"copy": lambda: y.copy_(x)}, timing.Cuda(), 0.2)["copy"]
    assert not found.late
    assert 2 * 256 * 2**20 / 8e6 < found.time_us < 2 * 256 * 2**20 / 2e5
