"""`flashsim calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashsim.cli.app import OK, app
from flashsim.cli.show import Json, show, write_json
from flashsim.errors import FlashsimError, InputError, unknown

if TYPE_CHECKING:
    from flashsim.devices import DeviceSpec
    from flashsim.devices.spec import Citation
    from flashsim.gpu.calibrate import Findings

DEFAULT_OUTPUT = "my_gpu.toml"


@app.command()
def calibrate(
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help=f"The device file to write; {DEFAULT_OUTPUT}.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="NAME|FILE", help="For what is not measured; the nearest GPU known.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="SECTION,...", help="Measure these; the others are the base's.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Measure the rates and latencies of this machine's GPU, in about five minutes, and write a device file of them."""
    from flashsim.gpu import microbenchmarks

    facts = microbenchmarks.facts()  # before anything else: without a GPU no option matters

    from flashsim.devices import load_device
    from flashsim.gpu.calibrate import findings
    from flashsim.gpu.device_file import as_entries, check_base, device_text, nearest, told_by_driver
    from flashsim.io.output import whole_file

    names = _sections(only)
    device = load_device(base or nearest(facts))
    check_base(device, facts)
    sections = _of(device, names, only)
    path = _path(output)
    with whole_file(path) as file:  # fails before the measuring, if it cannot be written
        raw = microbenchmarks.measure(sections, facts, device, _advance)
        told = told_by_driver(device, facts)
        peak = told.get("memory.hbm_peak_byte_per_ns")
        found = findings(raw, device, sections, peak.value if peak else None)
        measured = as_entries(found.numbers.values(), facts, raw.clock_mhz())
        if not measured:
            reasons = "; ".join(dict.fromkeys(found.refused.values()))
            raise FlashsimError(f"nothing could be measured: {reasons}")
        comments = [
            f"{facts.name}, measured by flashsim calibrate",
            "",
            f"What was not measured is that of {device.name}. flashsim/devices/spec.py explains each key.",
        ]
        file.write(device_text(device, facts, told | measured, comments))
    load_device(Path(path))
    if as_json:
        write_json(_report(found, device, told | measured, path, raw.clock_mhz()))
    else:
        _show(found, device, told | measured, path)
    return OK


def _sections(only: str | None) -> list[str]:
    from flashsim.gpu.calibrate import SECTIONS

    if only is None:
        return list(SECTIONS)
    given = [name.strip() for name in only.split(",")]
    if wrong := [f"--only: {unknown('section', name, SECTIONS)}" for name in given if name not in SECTIONS]:
        raise InputError(wrong)
    return [name for name in SECTIONS if name in given]


def _of(device: DeviceSpec, names: list[str], only: str | None) -> list[str]:
    """Those that the device has. Raises InputError for one that was asked for by name and that it does not have."""
    if only and (missing := [name for name in names if getattr(device, name) is None]):
        raise InputError([f"--only: a GPU like {device.name} has no {name}" for name in missing])
    return [name for name in names if getattr(device, name) is not None]


def _path(output: str | None) -> str:
    """Where to write. A file that was not named is not replaced."""
    if output is None and Path(DEFAULT_OUTPUT).exists():
        raise InputError(f"--output: {DEFAULT_OUTPUT} exists; name it to replace it")
    return output or DEFAULT_OUTPUT


def _advance(name: str) -> None:
    """What is being measured, on one line of a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{name}")
        sys.stderr.flush()


def _show(found: Findings, base: DeviceSpec, entries: dict[str, Citation], path: str) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("number", "measured", base.name, "spread", "status", "how"):
        table.add_column(heading, justify="right" if heading in ("measured", base.name, "spread") else "left")
    for key, cited in entries.items():
        if key in base.citations:
            measured = found.numbers.get(key)
            spread = measured.spread if measured else None
            note = cited.note if spread is None else cited.note.partition("; ")[2]
            known = base.citations[key].value
            shown = "-" if spread is None else f"{spread:.1%}"
            table.add_row(key, f"{cited.value:g}", f"{known:g}", shown, cited.status, note)
    show(table, "")
    for one in found.overlaps:
        clk = " and ".join(f"{t:.4g}" for t in one.alone_clk)
        mixed = f"{' + '.join(f'{n} {kind}' for kind, n in one.mix.items())}: {clk} clk alone, {one.together_clk:.4g}"
        show(f"{mixed} together, overlap {one.share:.2f}: {one.verdict}")
    for key, reason in found.refused.items():
        show(f"{key} stays that of {base.name}: {reason}")
    show(f"wrote {path}")


def _report(
    found: Findings, base: DeviceSpec, entries: dict[str, Citation], path: str, clock_mhz: float | None
) -> dict[str, Any]:
    return {
        "output": path,
        "base": base.name,
        "clock_mhz": clock_mhz,
        "numbers": {
            key: {
                "value": cited.value,
                "base": base.citations[key].value,
                "status": cited.status,
                "spread": found.numbers[key].spread if key in found.numbers else None,
                "note": cited.note,
            }
            for key, cited in entries.items()
            if key in base.citations
        },
        "refused": [{"key": key, "reason": reason} for key, reason in found.refused.items()],
        "kept": [key for key in base.citations if key not in entries],
        "overlaps": [
            {
                "mix": dict(one.mix),
                "alone_clk": list(one.alone_clk),
                "together_clk": one.together_clk,
                "overlap": one.share,
                "verdict": one.verdict,
            }
            for one in found.overlaps
        ],
    }
