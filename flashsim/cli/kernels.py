"""`flashsim audit`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashsim.cli.app import FAILED, OK, app
from flashsim.cli.show import Json, progress, say_interrupted, show, write_json
from flashsim.errors import InputError
from flashsim.paired import use_kernels

if TYPE_CHECKING:
    from rich.table import Table

    from flashsim.gpu.audit import CaseReport, Report
    from flashsim.gpu.inner_loops import LoopReport

NEEDED = ("torch", "triton")


@app.command()
def audit(
    kernel: Annotated[str | None, typer.Argument(metavar="[KERNEL]", help="Which one; else all.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="[sm_80|sm_90|sm_100]", help="For which GPUs; else all.")
    ] = None,
    as_json: Json = False,
    as_costs: Annotated[
        str | None,
        typer.Option("--as-costs", metavar="FILE", help="Write the instruction counts to FILE, for a simulation."),
    ] = None,
) -> int:
    """Compile the kernels, no GPU needed, and read the machine code: is it what the schedules assume? Exit 1 if not."""
    need_kernels()
    from flashsim.gpu.audit import audit as look
    from flashsim.gpu.kernels import KERNELS, TARGETS, find_kernel, find_target
    from flashsim.io.output import json_text, whole_file

    problems: list[str] = []
    for find, given in ((find_kernel, kernel), (find_target, target)):
        try:
            if given is not None:
                find(given)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    entries = [KERNELS[name] for name in ([kernel] if kernel else KERNELS)]
    pairs = [(entry, name) for entry in entries for name in ([target] if target else TARGETS)]
    total = sum(len(entry.cases_for(TARGETS[name])) for entry, name in pairs)
    reports: list[Report] = []
    finished, interrupted = 0, False
    with whole_file(as_costs, "--as-costs") if as_costs else nullcontext() as costs:
        try:
            for entry, name in pairs:
                with progress(max(1, len(entry.cases_for(TARGETS[name]))), f"{entry.name} for {name}") as advance:
                    reports.append(look(entry, name, advance))
                finished += len(reports[-1].cases)
                if not as_json:
                    show(*report_parts(reports[-1]), "")
        except KeyboardInterrupt:
            interrupted = True
        if costs is not None:
            costs.write(json_text({"costs": list(costs_of(reports))}))
    passed = not interrupted and all(report.passed for report in reports)
    if as_json:
        write_json({"passed": passed, "complete": not interrupted, "reports": [one.to_json() for one in reports]})
    elif len(reports) > 1:
        failed = [f"{one.kernel} for {one.target}" for one in reports if not one.passed]
        there = sum(one.exists for one in reports)
        show(f"{there} audited, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    if interrupted:
        return say_interrupted(finished, total)
    return OK if passed else FAILED


def need_kernels() -> None:
    """Raises InputError if what the kernels need is not installed."""
    use_kernels()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)}: not installed; the kernels need it: pip install 'flashsim[kernels]'")


def report_parts(report: Report) -> list[Any]:
    """What is printed of one kernel on one target."""
    if not report.exists:
        return [f"{report.kernel} ({report.implementation}) for {report.target}: does not exist"]
    versions = ", ".join(sorted({case.version for case in report.cases if case.version}))
    verdict = "passed" if report.passed else "FAILED"
    lines = [f"  {case.case.label}: {' '.join(line.split())}" for case in report.cases for line in case.problems]
    title = f"{report.kernel} ({report.implementation}) for {report.target}, Triton {versions or '-'}: {verdict}"
    rows = [row for case in report.cases for row in _rows(case)]
    return [title, *([_table(rows)] if rows else []), *lines]


COLUMNS = (
    *("case", "kernel", "tiles", "tile", "warps", "MMA", "EX2", "load\nKiB", "FMA", "max", "ALU", "cvt", "smem\nKiB"),
    *("TMA", "other", "regs", "stack\nB", "LDL\nSTL", "shared\nKiB", "TMEM", "setmax\nreg", "EX2 under\nMMA"),
)
"""Instructions are warp instructions of a CTA for a tile; `1.02x`: of what the simulator charges."""


def _table(rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        text = name in ("case", "kernel", "tiles", "tile", "MMA")
        table.add_column(name, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _rows(case: CaseReport) -> Iterator[list[str]]:
    for launch in case.launches:
        tile = "x".join(str(size) for size in launch.tile.values())
        warps = f"{launch.num_warps}" if launch.total_warps == launch.num_warps else f"{launch.total_warps} WS"
        about = [
            f"{launch.registers}",
            f"{launch.stack}",
            f"{launch.spills}",
            f"{launch.shared / 1024:.0f}",
            f"{launch.tmem or '-'}",
            f"{launch.register_reallocations or '-'}",
        ]
        for loop in launch.loops:
            tiles = ("masked" if loop.masked else "whole") + (f" x{loop.tiles}" if loop.tiles > 1 else "")
            yield [case.case.label, launch.kernel, tiles, tile, warps, *_counts(loop), *about, _overlap(loop)]
        if not launch.loops:
            yield [case.case.label, launch.kernel, "-", tile, warps, *["-"] * 9, *about, "-"]


def _counts(loop: LoopReport) -> list[str]:
    def told(value: float, name: str) -> str:
        ratio = loop.ratios.get(name)
        return f"{value:.0f}" + ("" if ratio is None else f" {ratio:.2f}x")

    counts = loop.counts
    return [
        " ".join(f"{count:.0f} {name}" for name, count in loop.mma.items()) or "-",
        told(counts["exp"], "exp"),
        told(loop.bytes / 1024, "load_byte"),
        told(counts["fma"], "fma"),
        told(counts["max"], "max"),
        told(counts["alu"], "alu"),
        told(counts["convert"], "convert"),
        told(loop.shared_bytes / 1024, "smem_byte"),
        told(counts["tma"], "tma"),
        told(counts["other"], "other"),
    ]


def _overlap(loop: LoopReport) -> str:
    return "-" if loop.overlap is None else f"{loop.exps_in_flight} of {loop.exps_in_loop}"


def costs_of(reports: Sequence[Report]) -> Iterator[dict[str, Any]]:
    """What `simulate --costs` reads, for each inner loop over whole tiles that a simulation has too."""
    from flashsim.gpu.kernels import KERNELS

    for report in reports:
        for case in report.cases:
            for loop, tile in ((loop, launch.tile) for launch in case.launches for loop in launch.loops):
                if loop.charged is not None and not loop.masked:
                    yield _cost(report, str(KERNELS[report.kernel].schedule), case, loop, tile)


def _cost(report: Report, schedule: str, case: CaseReport, loop: LoopReport, tile: Mapping[str, int]) -> dict[str, Any]:
    from flashsim.analysis.charges import INSTRUCTIONS
    from flashsim.gpu.kernels import SHORT

    assert loop.charged is not None
    per_warp = loop.per_warp
    counts = {"pack" if kind == "convert" else kind: n for kind, n in per_warp.items() if kind != "other"}
    return {
        "schedule": schedule,
        "target": report.target,
        "dtype": SHORT[case.case.dtype],
        "head_dim": case.case.head_dim,
        "head_dim_v": case.case.head_dim,
        "options": {"impl": report.implementation, **tile, **(case.case.simulated or {})},
        "counts": {**dict.fromkeys(INSTRUCTIONS, 0.0), **counts, "issue": sum(per_warp.values())},
        "charged": dict(loop.charged.instructions),
    }
