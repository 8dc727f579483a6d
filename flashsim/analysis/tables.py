"""What the command line prints for people: rich tables, and lines of text. Numbers come from results, as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from flashsim.analysis.accuracy import AccuracyReport, ErrorStatistics
from flashsim.analysis.claims import Verdict
from flashsim.analysis.fp8_error import VariantError
from flashsim.analysis.run import CaseOutcome, published_beside
from flashsim.devices import DeviceSpec
from flashsim.io.case import PROBLEM_FIELDS
from flashsim.io.claims import QUANTITIES
from flashsim.io.experiment import Experiment
from flashsim.io.measured import option_text
from flashsim.io.scenario import Grid, Scenario, ScenarioCase
from flashsim.masks import SPELLING
from flashsim.result import Result
from flashsim.schedules.base import Schedule

RUN_UNITS = ("tensor", "exp", "smem", "hbm")
"""Units with a column of their own in the table of `run`."""
_RULE = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
SHORT = {"head_dim": "d", "head_dim_v": "dv", "clock_mhz": "MHz", "heads": "heads", "kv_heads": "kv heads"}
"""Column headings for keys whose names are too wide for a table of 100 columns."""


def percent(fraction: float | None, digits: int = 0) -> str:
    """`74` for 0.74; `-` for None."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f}"


def signed_percent(fraction: float | None) -> str:
    """`+3.1` for 0.031; `-` for None."""
    return "-" if fraction is None else f"{100 * fraction:+.1f}"


def number(value: float) -> str:
    """Four significant digits, never an exponent."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:#.4g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.3g}"


def _tflops(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _table(columns: Iterable[tuple[str, bool]], gap: int = 1, wrap: bool = True) -> Table:
    """A table with a rule under its headings and nothing else; a column is (heading, is it a number).

    Numbers are never wrapped, text only if `wrap`.
    """
    table = Table(box=_RULE, show_edge=False, padding=(0, gap, 0, 0), pad_edge=False)
    for heading, numeric in columns:
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=numeric or not wrap, overflow="fold")
    return table


def run_tables(scenario: Scenario, outcomes: Sequence[CaseOutcome]) -> list[Any]:
    """For each grid what its cases have in common, and a table with one line per case that was run."""
    parts: list[Any] = []
    first = 0
    for grid in scenario.grids:
        cases = scenario.cases[first : first + grid.count]
        parts += [_common(cases, grid.varying), _grid_table(grid, cases, outcomes[first : first + grid.count]), ""]
        first += grid.count
    return parts


def _common(cases: Sequence[ScenarioCase], varying: Sequence[str]) -> str:
    """The keys that all *cases* share, without those that only repeat another or a default."""
    keys = cases[0].case.keys
    left_out = {quotient for product, quotient in (("tokens", "batch"), ("hidden", "heads")) if product in keys}
    shared = {
        key: value
        for key, value in keys.items()
        if key not in left_out | set(varying) and all(case.case.keys.get(key) == value for case in cases)
    }
    return _words(shared)


def _words(keys: Mapping[str, Any]) -> str:
    """Keys of a case in one line, without those that only repeat another or are off."""
    repeated = {"kv_heads": "heads", "seqlen_k": "seqlen", "head_dim_v": "head_dim"}
    said = []
    for key, value in keys.items():
        off = value is None or value == {} or (key == "dropout" and value == 0)
        if not off and (key not in repeated or value != keys.get(repeated[key])):
            said.append(_cell(value) if key == "set" else f"{key} {_cell(value)}")
    return ", ".join(said)


def _grid_table(grid: Grid, cases: Sequence[ScenarioCase], outcomes: Sequence[CaseOutcome]) -> Table:
    text = ("gpu", "schedule", "mask", "dtype", "direction", "set")
    measured = any(case.measured for case in cases)
    heads = [(SHORT.get(key, key), key not in text) for key in grid.varying]
    heads += [("time\nus", True), ("TFLOP/s", True), ("% of\npeak", True)]
    heads += [(f"{unit}\n%", True) for unit in RUN_UNITS] + [("bound\nby", False)]
    heads += [("measured\nTFLOP/s", True), ("error\n%", True)] if measured else []
    table = _table(heads, gap=0, wrap=False)
    for outcome in outcomes:
        cells = [_cell(outcome.case.case.keys.get(key)) for key in grid.varying]
        result = outcome.result
        if result is None:
            table.add_row(*cells, "failed")
            continue
        cells += [number(result.time_us), _tflops(result.tflops), percent(result.peak_fraction, 1)]
        cells += [percent(result.utilization[unit].active) for unit in RUN_UNITS] + [result.bound_by]
        if measured:
            beside = outcome.case.measured
            cells += [_tflops(beside.tflops) if beside else "-", signed_percent(outcome.error)]
        table.add_row(*cells)
    return table


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return option_text(value) or "-"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def run_footer(scenario: Scenario, outcomes: Sequence[CaseOutcome]) -> list[str]:
    """The clock and where it is from, what the columns mean, where the measurements are from, how far off they are."""
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    lines = [
        f"clock: {gpu} at {clock:g} MHz ({clock_words(source)})"
        for gpu, clock, source in dict.fromkeys((r.gpu, r.clock_mhz, r.clock_source) for r in results)
    ]
    lines.append("% of peak: at that clock; unit %: busy part of the cycles in which an SM had work")
    sources = dict.fromkeys(case.measured.source for case in scenario.cases if case.measured)
    lines += [f"measured: {source}" for source in sources]
    errors = [abs(outcome.error) for outcome in outcomes if outcome.error is not None]
    if errors:
        lines.append(
            "error: predicted time / measured time - 1; "
            f"mean absolute {percent(sum(errors) / len(errors), 1)} %, max {percent(max(errors), 1)} % "
            f"over {len(errors)} cases"
        )
    for beside in published_beside(scenario, outcomes):
        lines += [
            f"{beside.schedule}: highest predicted {percent(beside.highest)} % of the datasheet's peak ({beside.at})",
            f"{' ' * len(beside.schedule)}  published {percent(beside.published.datasheet_fraction)} % "
            f"({beside.published.source})",
        ]
    return lines


def fp8_error_parts(experiment: Experiment, errors: Sequence[VariantError]) -> list[Any]:
    """The sizes, a table with one line per variant, and what its columns mean."""
    rows = min(experiment.rows, experiment.seqlen)
    sizes = ", ".join(f"{key} {getattr(experiment, key)}" for key in ("seqlen", "head_dim", "heads"))
    table = _table(
        [("variant", False), ("RMSE", True), ("min", True), ("max", True), ("published", True), ("ratio", True)]
    )
    for error in errors:
        spread = (error.median, min(error.rmse, default=None), max(error.rmse, default=None), error.published)
        cells = ["-" if value is None else f"{value:.2e}" for value in spread]
        table.add_row(error.variant, *cells, "-" if error.ratio is None else f"{error.ratio:.2f}")
    seeds = max((len(error.rmse) for error in errors), default=0)
    return [
        f"{sizes}, tile {experiment.BLOCK_M} x {experiment.BLOCK_N}",
        table,
        "",
        f"RMSE: of {rows} rows of O against float64 attention of the unrounded tensors; median over {seeds} seeds",
        *[f"published: {source}" for source in dict.fromkeys(error.source for error in errors) if source],
    ]


def claims_parts(verdicts: Sequence[Verdict]) -> list[Any]:
    """A table with one line per claim, and what its columns mean."""
    table = _table(
        [("claim", False), ("source", False), ("says", True), ("simulated", True), ("verdict", False), ("why", False)]
    )
    for found in verdicts:
        claim, unit = found.claim, QUANTITIES[found.claim.quantity].unit
        cells = [_range(claim.says, unit), "failed" if found.simulated is None else _range(found.simulated, unit)]
        outside = [f"{word} by {percent(by)} %" for word, by in (("below", found.below), ("above", found.above)) if by]
        verdict = "within" if found.within else ", ".join(outside) or "-"
        table.add_row(claim.claim, claim.source, *cells, verdict, claim.why or "")
    return [
        table,
        "",
        "simulated: over all cases of the claim, at the datasheet's clock unless a case says clock_mhz",
        "verdict: below and above are part of what the claim says",
    ]


def _range(ends: tuple[float, float], unit: str) -> str:
    """`1.5 to 2 x`, `75 %` for a fraction of a peak; one number where both ends are the same."""
    scale, word = (100, "%") if unit == "of peak" else (1, unit)
    texts = [f"{end * scale:.0f}" if abs(end * scale) >= 1000 else f"{end * scale:.3g}" for end in ends]
    return f"{' to '.join(dict.fromkeys(texts))} {word}"


def clock_words(source: str) -> str:
    """What a `clock_source` means."""
    return {
        "datasheet": "assumed: the clock of the datasheet's TFLOP/s; --clock-mhz or clock_mhz sets another",
        "given": "as given",
        "row": "from the row",
        "sessions.toml": "from sessions.toml",
    }.get(source, source)


def verdict(result: Result) -> list[str]:
    """The answer to `simulate` in a few lines."""
    shape = _words({key: result.problem[field] for field, key in PROBLEM_FIELDS.items()})
    busy = sorted(result.utilization.items(), key=lambda item: item[1].active, reverse=True)
    bound = result.utilization.get(result.bound_by, busy[0][1])
    tail = 1 - bound.elapsed / bound.active if bound.active else None
    options = {key: value for key, value in result.options.items() if key not in result.tile and value is not None}
    return [
        f"{result.schedule} on {result.gpu}: {shape}",
        f"{number(result.time_us)} us, {_tflops(result.tflops)} TFLOP/s at {result.clock_mhz:g} MHz "
        f"({clock_words(result.clock_source)})",
        f"{percent(result.peak_fraction)} % of peak at this clock, "
        f"{percent(result.datasheet_fraction)} % of the datasheet's",
        f"bound by {result.bound_by}: "
        + ", ".join(f"{name} {percent(unit.active)} %" for name, unit in busy if unit.active >= 0.005)
        + f"; launch, ramp and tail {percent(tail)} % of the time",
        f"tile {' x '.join(str(size) for size in result.tile.values())}, CTAs per SM: {result.ctas_per_sm}",
        *([f"switches {option_text(options)}"] if options else []),
        f"HBM {_bytes(result.hbm_bytes.read)} read, {_bytes(result.hbm_bytes.written)} written; "
        f"{number(result.flops / 1e9)} GFLOP counted, {number(result.flops_executed / 1e9)} GFLOP executed",
        *result.notes,
    ]


def _bytes(count: int) -> str:
    return f"{number(count / 1e6)} MB"


def kernels_table(result: Result) -> Table:
    """The launches of one call."""
    table = _table([("kernel", False), ("time us", True), ("share %", True)])
    total = sum(kernel.time_us for kernel in result.kernels)
    for kernel in result.kernels:
        table.add_row(kernel.name, number(kernel.time_us), percent(kernel.time_us / total if total else None))
    return table


def functional_lines(result: Result) -> list[str]:
    """What the numbers of a functional run came to."""
    functional = result.functional
    if functional is None:
        return []
    return [
        f"computed: max error {functional.max_abs_error:.3g}, mean error {functional.mean_abs_error:.3g}, "
        f"LSE max error {functional.lse_max_abs_error:.3g} against float64 attention: "
        + ("accepted" if functional.accepted else "NOT accepted"),
        *functional.hazards,
    ]


def accuracy_table(report: AccuracyReport) -> Table:
    """Errors by session, or by the columns asked for, and in all."""
    heads = [(key, False) for key in report.by or ("session", "clock MHz")]
    heads += [("rows", True), ("mean |error| %", True), ("max |error| %", True), ("bias %", True), ("tau", True)]
    table = _table(heads)
    if report.by:
        for key, errors in report.groups:
            table.add_row(*(_cell(value) for value in key.values()), *_errors(errors))
    else:
        for name, errors in report.sessions.items():
            clocks = "; ".join(f"{c['clock_mhz']:g} ({c['clock_source']})" for c in report.clocks[name])
            table.add_row(name, clocks, *_errors(errors))
    table.add_row("all", *[""] * (len(heads) - 6), *_errors(report.total))
    return table


def _errors(errors: ErrorStatistics) -> list[str]:
    tau = "-" if errors.kendall_tau is None else f"{errors.kendall_tau:.2f}"
    return [
        str(errors.n),
        percent(errors.mape, 1),
        percent(errors.max_abs_error, 1),
        signed_percent(errors.bias),
        tau,
    ]


def accuracy_lines(report: AccuracyReport) -> list[str]:
    """What was predicted and what was skipped, and why."""
    skipped = sum(report.skipped.values())
    lines = [f"{report.rows} rows: {report.total.n} predicted, {skipped} skipped"]
    lines += [f"  skipped {count}: {reason}" for reason, count in report.skipped.items()]
    lines.append("error: predicted time / measured time - 1; tau: Kendall's tau-b of predicted and measured times")
    return lines


def gpus_table(devices: Iterable[DeviceSpec]) -> Table:
    """One line per GPU."""
    table = _table([("name", False), ("GPU", False), ("architecture", False)])
    for spec in devices:
        table.add_row(spec.name, spec.title, spec.architecture)
    return table


def gpu_table(spec: DeviceSpec) -> Table:
    """Every number of a GPU with where it comes from."""
    table = _table([("number", False), ("value", True), ("status", False), ("source", False)])
    for name, cited in spec.citations.items():
        source = cited.source + (f" ({cited.note})" if cited.note else "")
        table.add_row(name, _cell(cited.value), cited.status, source)
    return table


def schedules_table(schedules: Iterable[type[Schedule]]) -> Table:
    """One line per schedule."""
    columns = ("name", "schedule", "runs on", "directions", "masks", "dtypes", "dropout")
    table = _table([(column, False) for column in columns])
    for schedule in schedules:
        table.add_row(
            schedule.name(),
            schedule.title,
            ", ".join(schedule.architectures),
            ", ".join(schedule.directions),
            "all" if schedule.masks == tuple(SPELLING) else ", ".join(schedule.masks),
            ", ".join(schedule.dtypes),
            "yes" if schedule.dropout else "no",
        )
    return table


def switches_table(schedule: type[Schedule]) -> Table:
    """The switches of one schedule."""
    table = _table([("switch", False), ("type", False), ("default", False), ("choices", False), ("what", False)])
    for switch in schedule.switches():
        default = "-" if switch.default is None else str(switch.default).lower()
        table.add_row(switch.name, switch.type_name, default, ", ".join(map(str, switch.choices)) or "-", switch.help)
    return table
