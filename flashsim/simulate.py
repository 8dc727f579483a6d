"""Where a schedule meets a machine: `simulate(problem, schedule, gpu) -> Result`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import InputError
from flashsim.machine.fast import FastSimulation
from flashsim.machine.gpu import FullSimulation, KernelRun
from flashsim.machine.options import Options
from flashsim.problem import AttentionProblem, flops_executed
from flashsim.result import UNITS, Functional, HbmBytes, KernelTime, Result, Utilization
from flashsim.schedules import Kernel, Schedule, load_schedule
from flashsim.units import us_of_ticks

if TYPE_CHECKING:
    from flashsim.machine.sm import Draw

BOUND_AT = 0.75
"""A unit that is busy for this part of the active cycles, and busier than all others, is what binds."""
MAX_FUNCTIONAL_FLOPS = 20e9
"""A functional run computes every tile in float64; more than this takes minutes and is refused."""


def simulate(
    problem: AttentionProblem,
    schedule: str | type[Schedule] = "fa3",
    gpu: str | Path | DeviceSpec = "h100-sxm5",
    *,
    clock_mhz: float | None = None,
    options: Mapping[str, Any] | None = None,
    functional: bool | Literal["dtype"] = False,
    full: bool = False,
    seed: int = 0,
    draw: Draw | None = None,
) -> Result:
    """Predict the time and the utilization of one attention operation; with `functional`, compute it as well.

    `schedule` and `gpu` are names, files, or what they load to; `options` sets switches, as text or values. `clock_mhz`
    is the SM clock, by default the one that the datasheet's TFLOP/s assume. `full` simulates every SM and CTA with
    one L2 and one HBM; otherwise what is alike is simulated once. `functional` computes in float64 on random inputs
    made from `seed`, `functional="dtype"` rounds every tile to its dtype; it always simulates everything. `draw`
    replaces durations, for tests.

    Raises InputError with everything that is wrong with the request, Infeasible where a kernel does not fit, and
    Deadlock, Race or Hazard for a schedule that is wrong.
    """
    device = gpu if isinstance(gpu, DeviceSpec) else load_device(str(gpu))
    kind = load_schedule(schedule) if isinstance(schedule, str) else schedule
    clock, source = _clock(device, clock_mhz)
    chosen = kind.configure(problem, device.architecture, options or {})
    _fits_memory(problem, chosen, device)
    kernels = chosen.kernels(problem)
    tensors = _tensors(problem, seed) if functional else None
    settings = Options(draw=draw, seed=seed, tensors=tensors, rounded=functional == "dtype")
    runs = []
    for kernel in kernels:
        simulation = FullSimulation if full or functional or draw else FastSimulation
        runs.append(simulation(_device_of(kernel, device), clock, kernel, problem, settings).run())
    result = _result(problem, chosen, device, clock, source, runs)
    if tensors is not None:
        result = replace(result, functional=_compare(problem, tensors, rounded=functional == "dtype"))
    return result


def _clock(device: DeviceSpec, clock_mhz: float | None) -> tuple[float, str]:
    if clock_mhz is None:
        return device.clock.datasheet_mhz, "datasheet"
    if isinstance(clock_mhz, bool) or not math.isfinite(clock_mhz) or not 1 <= clock_mhz <= 10_000:
        raise InputError(f"clock_mhz: got {clock_mhz}, must be a number from 1 to 10000")
    return float(clock_mhz), "given"


def _fits_memory(problem: AttentionProblem, schedule: Schedule, device: DeviceSpec) -> None:
    workspace = schedule.workspace_byte(problem)
    if problem.memory_bytes + workspace > device.memory.hbm_byte:
        beside = f" and {workspace / 1e9:.1f} GB beside them" if workspace else ""
        raise InputError(
            f"schedule {schedule.name()} needs {problem.memory_bytes / 1e9:.1f} GB for this problem's tensors{beside}, "
            f"{device.name} has {device.memory.hbm_byte / 1e9:.1f} GB"
        )


def _device_of(kernel: Kernel, device: DeviceSpec) -> DeviceSpec:
    """The device as `kernel` finds it: a framework's kernels reach only a part of the HBM rate."""
    if not kernel.library:
        return device
    rate = device.library.stream_efficiency * device.memory.hbm_peak_byte_per_ns
    return replace(device, memory=replace(device.memory, hbm_byte_per_ns=rate))


def _tensors(problem: AttentionProblem, seed: int) -> dict[str, Any]:
    """Inputs, and outputs full of NaN, float64 (batch, seqlen, heads, head_dim)."""
    import numpy as np

    from flashsim.numerics.inputs import random_inputs

    if problem.flops > MAX_FUNCTIONAL_FLOPS:
        raise InputError(
            f"a functional run of {problem.flops / 1e9:.0f} GFLOP would take minutes; "
            f"up to {MAX_FUNCTIONAL_FLOPS / 1e9:.0f} GFLOP are accepted"
        )
    q, k, v = random_inputs(problem, seed)
    rows = (problem.batch, problem.seqlen_q, problem.heads_q)
    outputs = {
        "O": (*rows, problem.head_dim_v),
        "LSE": rows,
        "S": (*rows, problem.seqlen_k),
        "P": (*rows, problem.seqlen_k),
    }
    return {"Q": q, "K": k, "V": v} | {name: np.full(shape, np.nan) for name, shape in outputs.items()}


def _compare(problem: AttentionProblem, tensors: dict[str, Any], rounded: bool) -> Functional:
    from flashsim.numerics.bounds import rounding_bounds
    from flashsim.numerics.compare import compare_exact, compare_rounded
    from flashsim.numerics.eager import eager_attention
    from flashsim.numerics.reference import attention_reference

    q, k, v = tensors["Q"], tensors["K"], tensors["V"]
    o, lse = attention_reference(q, k, v, problem.mask)
    mine, mine_lse = tensors["O"], tensors["LSE"].transpose(0, 2, 1)
    if rounded:
        eager = eager_attention(q, k, v, problem.dtype, problem.mask)
        return compare_rounded(mine, mine_lse, o, lse, eager, rounding_bounds(q, k, v, problem.dtype, problem.mask))
    return compare_exact(mine, mine_lse, o, lse, v)


def _flops_executed(problem: AttentionProblem, kernel: Kernel) -> int:
    """FLOPs of all tiles that are computed, each counted whole."""
    if not kernel.dense:
        return flops_executed(problem, kernel.BLOCK_M, kernel.BLOCK_N)
    rows = -(-problem.seqlen_q // kernel.BLOCK_M) * kernel.BLOCK_M
    columns = -(-problem.seqlen_k // kernel.BLOCK_N) * kernel.BLOCK_N
    return 2 * problem.batch * problem.heads_q * rows * columns * (problem.head_dim + problem.head_dim_v)


def version() -> str:
    """The installed version of flashsim."""
    from flashsim import __version__

    return __version__


def _result(
    problem: AttentionProblem, schedule: Schedule, device: DeviceSpec, clock: float, source: str, runs: list[KernelRun]
) -> Result:
    gap = device.launch.gap_us * (len(runs) - 1)
    total = sum(run.ticks for run in runs)
    time_us = us_of_ticks(total, clock) + gap
    active = sum(run.active for run in runs)
    elapsed = device.sm.count * total
    utilization = {}
    for unit in UNITS:
        busy = sum(run.busy[unit] for run in runs)
        if unit in ("l2", "hbm"):  # one each, and active while any SM is
            utilization[unit] = Utilization(busy / (total - sum(run.launch for run in runs)), busy / total)
        else:
            utilization[unit] = Utilization(busy / active, busy / elapsed)
    busiest = max(UNITS, key=lambda unit: utilization[unit].active)
    if sum(run.launch for run in runs) > total / 2:
        bound_by = "launch"
    else:
        bound_by = busiest if utilization[busiest].active >= BOUND_AT else "latency"
    tflops = problem.flops / time_us / 1e6
    kernels = schedule.kernels(problem)
    tile = {"BLOCK_M": kernels[0].BLOCK_M, "BLOCK_N": kernels[0].BLOCK_N}
    peak = device.tensor.fp16_flop_per_clk * device.sm.count * clock / 1e6
    return Result(
        schedule=schedule.name(),
        gpu=device.name,
        time_us=time_us,
        tflops=tflops,
        clock_mhz=clock,
        clock_source=source,
        peak_fraction=tflops / peak,
        datasheet_fraction=tflops / device.tensor.fp16_tflops,
        flops=problem.flops,
        flops_executed=_flops_executed(problem, kernels[0]),
        hbm_bytes=HbmBytes(sum(run.read_byte for run in runs), sum(run.written_byte for run in runs)),
        utilization=utilization,
        bound_by=bound_by,
        kernels=tuple(
            KernelTime(k.name, us_of_ticks(run.ticks, clock), run.ticks) for k, run in zip(kernels, runs, strict=True)
        ),
        tile=tile,
        options=schedule.options(),
        ctas_per_sm=runs[0].ctas_per_sm,
        events=sum(run.events for run in runs),
        ticks=total,
        problem={name: getattr(problem, name) for name in problem.__dataclass_fields__},
        flashsim_version=version(),
        device_hash=device.device_hash,
    )
