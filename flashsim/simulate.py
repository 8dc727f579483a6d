"""Where a schedule meets a machine: `simulate(problem, schedule, gpu) -> Result`."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import EndlessRun, FlashsimError, Infeasible, InputError, SimulationError, line_of
from flashsim.machine.fast import FastSimulation
from flashsim.machine.feasibility import fit
from flashsim.machine.gpu import FullSimulation, KernelRun
from flashsim.machine.options import Options
from flashsim.problem import AttentionProblem
from flashsim.result import UNITS, HbmBytes, KernelTime, Result, TensorBytes, Utilization
from flashsim.schedules import Kernel, Schedule, load_schedule
from flashsim.schedules.tensors import WIDTHS
from flashsim.units import us_of_ticks
from flashsim.watchdog import Stuck, Watchdog

if TYPE_CHECKING:
    from flashsim.machine.sm import Draw

BOUND_AT = 0.75
"""A unit that is busy for this part of the active cycles, and busier than all others, is what binds."""


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
    chosen = configured(kind, problem, device, options or {})
    with naming_lines_of(kind):
        _fits_memory(problem, chosen, device)
        tensors = _tensors(problem, seed) if functional else None
        settings = Options(draw=draw, seed=seed, tensors=tensors, rounded=functional == "dtype")
        runs = run_kernels(problem, chosen, device, clock, settings, full)
        result = _result(problem, chosen, device, clock, source, runs)
    if tensors is not None:
        from flashsim.numerics.functional import judge

        result = replace(result, functional=judge(problem, tensors, functional == "dtype", kind.stores_scores))
    return result


def configured(
    kind: type[Schedule], problem: AttentionProblem, device: DeviceSpec, options: Mapping[str, Any]
) -> Schedule:
    """The schedule with its switches set. Raises InputError with everything that does not go together, SimulationError
    for a mistake in the schedule's own text."""
    with naming_lines_of(kind), Watchdog():
        chosen = kind.configure(problem, device.architecture, options, device.sm.count)
        # Asking declares the kernels' memory once, so that what goes wrong there is found here.
        for kernel in chosen.kernels(problem):
            with suppress(Infeasible):
                fit(kernel, problem, device)
    return chosen


def run_kernels(
    problem: AttentionProblem,
    schedule: Schedule,
    device: DeviceSpec,
    clock_mhz: float,
    settings: Options,
    full: bool = False,
) -> list[KernelRun]:
    """Run the kernels of a configured schedule one after the other; in full if numbers or drawn latencies ask for it.

    Raises Infeasible where one does not fit, and Deadlock, Race or Hazard for a schedule that is wrong.
    """
    if settings.tensors is not None:
        _prepare(settings.tensors, problem, schedule)
    if _as_run(problem, schedule) is not problem:
        return _run_packed(problem, schedule, device, clock_mhz, settings, full)
    full = full or settings.tensors is not None or settings.draw is not None
    simulation = FullSimulation if full else FastSimulation
    if settings.tensors is not None and problem.direction == "bwd":  # what the forward pass saves has to be there
        run_kernels(replace(problem, direction="fwd"), schedule, device, clock_mhz, settings)
    settings, kernels = replace(settings, l2={}), schedule.kernels(problem)
    return [simulation(_device_of(kernel, device), clock_mhz, kernel, problem, settings).run() for kernel in kernels]


def _prepare(tensors: dict[str, Any], problem: AttentionProblem, schedule: Schedule) -> None:
    """Quantize what is given to a functional run in fp8; where K and V are kept in 8 bits, its numbers are those that
    are kept."""
    from flashsim.numerics.functional import quantize_inputs
    from flashsim.numerics.rounding import round_to, saturate

    kernels = schedule.kernels(problem)
    if problem.dtype == "fp8":
        quantize_inputs(tensors, kernels[-1].BLOCK_M, kernels[-1].BLOCK_N, schedule.options()["incoherent"])
    for dtype in {kernel.kv_dtype for kernel in kernels if kernel.kv_dtype}:
        form = "e4m3" if dtype == "fp8" else dtype
        for name in ("K", "V"):
            tensors[name] = round_to(saturate(tensors[name], form), form)


def _as_run(problem: AttentionProblem, schedule: Schedule) -> AttentionProblem:
    """The problem that the kernels see."""
    from flashsim.packing import packed

    return packed(problem) if schedule.pack_gqa else problem


def _run_packed(
    problem: AttentionProblem, schedule: Schedule, device: DeviceSpec, clock_mhz: float, settings: Options, full: bool
) -> list[KernelRun]:
    """The same with the query heads that share a KV head in one tile."""
    from flashsim.packing import pack, unpack

    unpacked, group = settings.tensors, problem.heads_per_kv
    if unpacked is not None:
        by_query = {name: pack(unpacked[name], group) for name in ("Q", "O", "LSE")}
        settings = replace(settings, tensors=unpacked | by_query)
    runs = run_kernels(_as_run(problem, schedule), schedule, device, clock_mhz, settings, full)
    if unpacked is not None and settings.tensors is not None:
        for name in ("O", "LSE"):
            unpacked[name] = unpack(settings.tensors[name], group)
    return runs


@contextmanager
def naming_lines_of(schedule: type[Schedule]) -> Iterator[None]:
    """Turn an exception in a schedule's own text into a SimulationError that names file and line."""
    try:
        yield
    except FlashsimError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        module = sys.modules.get(schedule.__module__)
        line = line_of(error, within=getattr(module, "__file__", None) or "")
        if line is None:
            if schedule.__module__.startswith("flashsim.schedules."):
                raise  # a mistake of ours
            line = f"schedule {schedule.name()} does not run"
        raise SimulationError(f"{line}: {type(error).__name__}: {error}") from error
    except Stuck as error:
        module = sys.modules.get(schedule.__module__)
        line = line_of(error, within=getattr(module, "__file__", None) or "")
        raise EndlessRun(f"{line}: does not come to its end") from None


def _tensors(problem: AttentionProblem, seed: int) -> dict[str, Any]:
    from flashsim.numerics.functional import refuse_large, run_tensors
    from flashsim.numerics.inputs import random_do, random_inputs

    refuse_large(problem)
    do = random_do(problem, seed) if "bwd" in problem.passes else None
    return run_tensors(problem, *random_inputs(problem, seed), do)


def _clock(device: DeviceSpec, clock_mhz: float | None) -> tuple[float, str]:
    if clock_mhz is None:
        return device.clock.datasheet_mhz, "datasheet"
    if isinstance(clock_mhz, bool) or not math.isfinite(clock_mhz) or not 1 <= clock_mhz <= 10_000:
        raise InputError(f"clock_mhz: got {clock_mhz}, must be a number from 1 to 10000")
    return float(clock_mhz), "given"


def _fits_memory(problem: AttentionProblem, schedule: Schedule, device: DeviceSpec) -> None:
    workspace = schedule.workspace_byte(problem)
    tensors = _memory_byte(problem, schedule) - workspace
    if tensors + workspace > device.memory.hbm_byte:
        beside = f" and {workspace / 1e9:.1f} GB beside them" if workspace else ""
        raise InputError(
            f"schedule {schedule.name()} needs {tensors / 1e9:.1f} GB for this problem's tensors{beside}, "
            f"{device.name} has {device.memory.hbm_byte / 1e9:.1f} GB"
        )


def _notes(problem: AttentionProblem, kernels: Sequence[Kernel]) -> Iterator[str]:
    """What a reader of the result should know."""
    if assumed := problem.mask_rule.assumed:
        yield f"mask {problem.mask}: {assumed}"
    for name, given, widths in (
        ("head_dim", problem.head_dim, [kernel.widths(problem)[0] for kernel in kernels]),
        ("head_dim_v", problem.head_dim_v, [kernel.widths(problem)[1] for kernel in kernels]),
    ):
        if (wide := max(widths)) > given:
            yield f"{name} {given} is padded to {wide}: {(wide - given) / wide:.0%} of the products along it is waste"


def _memory_byte(problem: AttentionProblem, schedule: Schedule) -> int:
    """Device memory of a call: what it is given, gives back, and needs beside them."""
    kept = {kernel.kv_dtype for kernel in schedule.kernels(problem) if kernel.kv_dtype}
    sizes = problem.tensor_bytes
    for dtype in kept:
        for name in ("k", "v"):
            sizes[name] = sizes[name] * WIDTHS[dtype] // problem.element_bytes
    return sum(sizes.values()) + schedule.workspace_byte(problem)


def _device_of(kernel: Kernel, device: DeviceSpec) -> DeviceSpec:
    """The device as `kernel` finds it: a framework's kernels reach only a part of the HBM rate."""
    if not kernel.library:
        return device
    rate = device.library.byte_per_ns(device.memory.hbm_peak_byte_per_ns, kernel.indexed, kernel.flop_per_byte)
    return replace(device, memory=replace(device.memory, hbm_byte_per_ns=rate))


def _hbm_bytes(runs: list[KernelRun]) -> HbmBytes:
    read, written = Counter[str](), Counter[str]()
    for run in runs:
        read.update(run.read_byte)
        written.update(run.written_byte)
    tensors = {name: TensorBytes(read[name], written[name]) for name in sorted({*read, *written})}
    return HbmBytes(read.total(), written.total(), tensors)


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
    kernels = schedule.kernels(_as_run(problem, schedule))
    main = next((kernel for kernel in kernels if kernel.walk != "none"), kernels[0])
    tile = {"BLOCK_M": main.BLOCK_M, "BLOCK_N": main.BLOCK_N}
    narrow = problem.dtype == "fp8" and device.tensor.fp8_flop_per_clk
    times = narrow / device.tensor.fp16_flop_per_clk if narrow else 1.0
    peak = times * device.tensor.fp16_flop_per_clk * device.sm.count * clock / 1e6
    return Result(
        schedule=schedule.name(),
        gpu=device.name,
        time_us=time_us,
        tflops=tflops,
        clock_mhz=clock,
        clock_source=source,
        peak_fraction=tflops / peak,
        datasheet_fraction=tflops / (times * device.tensor.fp16_tflops),
        flops=problem.flops,
        flops_executed=sum(run.flop for run in runs),
        hbm_bytes=_hbm_bytes(runs),
        peak_memory_bytes=_memory_byte(problem, schedule),
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
        notes=tuple(_notes(problem, kernels)),
    )
