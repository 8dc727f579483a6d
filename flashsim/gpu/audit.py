"""Holds compiled kernels against what their algorithm needs, what their device allows, and what the simulator charges.

Without a GPU: kernels are compiled offline (`compile`), and their inner loops are read (`sass`, `inner_loops`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil
from typing import Any

from flashsim.analysis.charges import Charges, charges
from flashsim.devices import load_device
from flashsim.errors import InputError
from flashsim.gpu.compile import Compiled, Failure, compile_call
from flashsim.gpu.inner_loops import THREADS, LoopReport, loop_report, turns_of
from flashsim.gpu.kernels import (
    GPUS,
    SHARED_LIMIT,
    SHORT,
    TMEM_LIMIT,
    Case,
    Entry,
    Need,
    Sizes,
    expected_mma,
    find_kernel,
    find_target,
    sizes,
)
from flashsim.problem import AttentionProblem


@dataclass(frozen=True)
class LaunchReport:
    """One kernel that the function launches."""

    kernel: str
    tile: Mapping[str, int]
    """BLOCK_M and BLOCK_N; of a kernel without inner loops to look at, what it has of these."""
    num_warps: int
    total_warps: int
    """With those of all roles of a warp-specialized kernel."""
    num_stages: int
    registers: int
    stack: int
    """Bytes a thread."""
    spills: int
    """LDL and STL in inner loops."""
    shared: int
    shared_limit: int
    tmem: int
    register_reallocations: int
    """USETMAXREG in the kernel."""
    loops: tuple[LoopReport, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def specialized(self) -> bool:
        return self.total_warps > self.num_warps and self.register_reallocations > 0


@dataclass(frozen=True)
class CaseReport:
    """One call of a kernel."""

    case: Case
    launches: tuple[LaunchReport, ...] = ()
    failure: str | None = None
    """Why it could not be compiled."""
    version: str | None = None
    """Of Triton."""

    @property
    def problems(self) -> tuple[str, ...]:
        found = tuple(f"{launch.kernel}: {problem}" for launch in self.launches for problem in launch.problems)
        return found if self.failure is None else (self.failure,)


@dataclass(frozen=True)
class Report:
    """A kernel on a target. Without cases: it does not exist there, which is no failure."""

    kernel: str
    target: str
    implementation: str
    cases: tuple[CaseReport, ...] = ()

    @property
    def exists(self) -> bool:
        return bool(self.cases)

    @property
    def passed(self) -> bool:
        return not any(case.problems for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """What `flashsim audit --json` prints of it."""
        about = {"kernel": self.kernel, "target": self.target, "implementation": self.implementation}
        return about | {"exists": self.exists, "passed": self.passed, "cases": [_case_json(one) for one in self.cases]}


def _case_json(report: CaseReport) -> dict[str, Any]:
    case = report.case
    about = {"case": case.label, "dtype": SHORT[case.dtype], "head_dim": case.head_dim, "causal": case.causal}
    launches = []
    for launch in report.launches:
        loops = [asdict(loop) | {"overlap": loop.overlap, "ratios": loop.ratios} for loop in launch.loops]
        launches.append(asdict(replace(launch, loops=())) | {"specialized": launch.specialized, "loops": loops})
    promised = {"specialized": case.specialized, "overlapped": case.overlapped}
    rest = {"triton": report.version, "failure": report.failure, "problems": list(report.problems)}
    return about | {"promised": promised} | rest | {"launches": launches}


def audit(kernel: str | Entry, target: str = "sm_90", advance: Callable[[], object] = lambda: None) -> Report:
    """Compile the kernel's cases for the target and look at each; `advance` is called after each of them.

    A kernel that cannot be compiled is a report with a failure. Raises InputError for an unknown kernel or target.
    """
    entry = find_kernel(kernel) if isinstance(kernel, str) else kernel
    number = find_target(target)

    def one(case: Case) -> CaseReport:
        try:
            return _case_report(entry, case, compile_call(case.call, number))
        finally:
            advance()

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return Report(entry.name, target, entry.implementation, tuple(pool.map(one, entry.cases_for(number))))


def _case_report(entry: Entry, case: Case, compiled: Sequence[Compiled] | Failure) -> CaseReport:
    if isinstance(compiled, Failure):
        return CaseReport(case, failure=f"not compiled: {compiled}")
    if not any(one.kernel in entry.work for one in compiled):
        launched = ", ".join(one.kernel for one in compiled) or "nothing"
        return CaseReport(case, failure=f"launched {launched}, expected one of {', '.join(entry.work)}")
    return CaseReport(case, tuple(_launch_report(entry, case, one) for one in compiled), version=compiled[0].version)


def _launch_report(entry: Entry, case: Case, kernel: Compiled) -> LaunchReport:
    report = LaunchReport(
        kernel=kernel.kernel,
        tile={name: kernel.constants[name] for name in ("BLOCK_M", "BLOCK_N") if name in kernel.constants},
        num_warps=kernel.num_warps,
        total_warps=kernel.total_warps,
        num_stages=kernel.num_stages,
        registers=kernel.registers,
        stack=kernel.stack,
        spills=sum(loop.spills for loop in kernel.code.loops),
        shared=kernel.shared,
        shared_limit=SHARED_LIMIT[kernel.target],
        tmem=kernel.tmem,
        register_reallocations=kernel.code.counts["USETMAXREG"],
    )
    problems = []
    if report.shared > report.shared_limit:
        problems.append(f"{report.shared} bytes of shared memory, sm_{kernel.target} has {report.shared_limit}")
    if report.tmem > TMEM_LIMIT:
        problems.append(f"{report.tmem} columns of tensor memory, there are {TMEM_LIMIT}")
    if report.spills:
        problems.append(
            f"{report.spills} LDL or STL in inner loops: registers are spilled ({report.stack} bytes a thread)"
        )
    if kernel.kernel not in entry.work:
        return replace(report, problems=tuple(problems))

    if case.specialized and not report.specialized:
        problems.append(
            "warp specialization was promised and is absent: "
            f"{report.total_warps} warps, {report.num_warps} asked for, {report.register_reallocations} USETMAXREG"
        )
    size = sizes(case, kernel, looped=bool(kernel.code.loops))
    need = entry.work[kernel.kernel](size)
    loops = []
    try:
        charged = _charged(entry, case, kernel, size, need)
    except InputError as error:
        problems += [f"the simulator cannot say what it charges: {line}" for line in error.problems]
        charged = None
    try:
        for turn in turns_of(kernel, need):
            loops.append(loop_report(kernel, turn, need, charged))
            problems += _faults(loops[-1], kernel.target, case, size)
    except ValueError as error:
        problems.append(str(error))
    tile = {"BLOCK_M": size.rows, "BLOCK_N": size.keys}
    return replace(report, tile=tile, loops=tuple(loops), problems=tuple(problems))


def _faults(loop: LoopReport, target: int, case: Case, size: Sizes) -> list[str]:
    """What is wrong in an inner loop."""
    need, found = loop.need, []
    if need.flop:
        wanted = expected_mma(target, size.rows, case.dtype)
        if set(loop.mma) != {wanted}:
            found.append(f"products by {', '.join(loop.mma) or 'no tensor core'}, expected {wanted}")
        if loop.flop != need.flop:
            found.append(f"{loop.flop} FLOP of products a tile, {need.flop} needed")
    # Of products, a thread holds two of 16 rows, and computes the factors of its rows; else at worst all of them.
    rows = max(2, ceil(size.rows / loop.computing_warps / 8)) if need.flop else size.rows
    factors = need.factors * rows * THREADS * loop.computing_warps
    if not need.exps <= loop.exps <= need.exps + factors:
        found.append(f"{loop.exps} exponentials a tile, {need.exps} needed (and up to {factors} of factors)")
    if need.bytes is not None and loop.bytes != need.bytes:
        found.append(f"{loop.bytes} bytes loaded a tile, {need.bytes} needed")
    if case.overlapped and loop.overlap != "present":
        found.append(
            f"overlap was promised and is lost: {loop.exps_in_flight or 0} of {loop.exps_in_loop} exponentials stand "
            "between asynchronous products and the wait for them"
        )
    if loop.charged is not None:
        if loop.flop != loop.charged.mma_flop:
            found.append(f"{loop.flop} FLOP of products a tile, the simulator charges {loop.charged.mma_flop}")
        if need.bytes is not None and not 0 <= loop.charged.load_byte - loop.bytes <= need.beside:
            found.append(f"{loop.bytes} bytes loaded a tile, the simulator charges {loop.charged.load_byte}")
        exps = loop.charged.instructions["exp"] * loop.charged.warps * THREADS
        if not exps - factors <= loop.exps <= exps + factors:
            found.append(f"{loop.exps} exponentials a tile, the simulator charges {exps:g}")
    return [f"{'masked' if loop.masked else 'whole'} tiles: {line}" for line in found]


def _charged(entry: Entry, case: Case, kernel: Compiled, size: Sizes, need: Need) -> Charges | None:
    """What the simulator charges; None where it has no such device, or no kernel of this name.

    Raises InputError for what it does not take, and where its tile is another.
    """
    if entry.schedule is None or case.simulated is None or kernel.target not in GPUS:
        return None
    problem = AttentionProblem(
        batch=1, heads_q=1, seqlen_q=4096, head_dim=case.head_dim, dtype=SHORT[case.dtype], direction=entry.direction
    )
    switches = {"impl": entry.implementation, **case.simulated}
    found = _charges(entry.schedule, problem, GPUS[kernel.target], tuple(switches.items()))
    name = entry.charged.get(kernel.kernel, kernel.kernel)
    charged = None if name is None else found.get(name)
    if charged is None:
        return None
    area = charged.BLOCK_M * charged.BLOCK_N
    if entry.scaled:
        return _part(charged, need.flop / charged.mma_flop if need.flop else size.rows * size.keys / area)
    if (size.rows, size.keys) != (charged.BLOCK_M, charged.BLOCK_N):
        raise InputError(
            f"its tile is {charged.BLOCK_M} x {charged.BLOCK_N}, the compiled one {size.rows} x {size.keys}"
        )
    return charged


def _part(charged: Charges, part: float) -> Charges:
    return replace(
        charged,
        mma_flop=round(charged.mma_flop * part),
        load_byte=round(charged.load_byte * part),
        smem_byte=charged.smem_byte * part,
        copies=charged.copies * part,
        instructions={name: count * part for name, count in charged.instructions.items()},
    )


@cache
def _charges(
    schedule: str, problem: AttentionProblem, gpu: str, switches: tuple[tuple[str, Any], ...]
) -> Mapping[str, Charges]:
    return charges(schedule, problem, load_device(gpu), dict(switches))
