"""Launches the microbenchmarks as `flashsim calibrate` does, for a process in which a launch is a compilation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import torch

from flashsim.devices import load_device
from flashsim.gpu import microbenchmarks
from flashsim.gpu.device_file import Facts

GPU = {80: "a100-sxm4-80gb", 90: "h100-sxm5"}
FACTS = Facts("any", "9.0", "", sm_count=132, l2_byte=50 << 20, hbm_byte=80 * 10**9)


class Calls(microbenchmarks.Bench):
    """Runs each microbenchmark once, with 64 turns."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        super().__init__(lambda name: None)
        self.wanted = wanted
        self.names: list[str] = []

    def tensor(self, *shape: int, dtype: str = "int32") -> Any:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    def clk(self, name: str, run: microbenchmarks.Run, num_warps: int) -> None:
        self.ns(name, run, num_warps)

    def ns(self, name: str, run: microbenchmarks.Run, num_warps: int, ctas: int = 1, most: int = 0) -> None:
        from flashsim_kernels.microbenchmarks.clocks import new_readings

        if self.wanted(name):
            self.names.append(name)
            self.launch(run, new_readings(ctas, num_warps, "meta"))

    def launch(self, run: microbenchmarks.Run, readings: Any) -> None:
        run(readings, 64)

    def attempt(self, name: str, run: Callable[[], None]) -> None:
        self.names.append(name)
        with suppress(AssertionError, RuntimeError):  # a CUDA graph, without CUDA
            run()


def launch_all(target: int, names: list[str]) -> None:
    """Those of `names`, in the order of `calls`."""
    calls(target, Calls(lambda name: name in names))


def calls(target: int, bench: Calls) -> Calls:
    base = load_device(GPU[target])
    chain = bench.tensor(1, dtype="int64"), None
    with patch.object(microbenchmarks, "_chain", lambda *_: chain):
        for section, run in microbenchmarks._RUNS.items():
            if section != "launch":
                run(bench, FACTS, base)
    return bench
