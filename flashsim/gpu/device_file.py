"""Device files of measured GPUs: which built-in one is nearest, and the text of a new one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log

from flashsim import __version__
from flashsim.devices import DeviceSpec, device_names, load_device
from flashsim.devices.load import ARCHITECTURES
from flashsim.devices.spec import Citation
from flashsim.errors import InputError
from flashsim.gpu.calibrate import Number

DIGITS = 4
"""Significant digits of what was measured."""


@dataclass(frozen=True)
class Facts:
    """What a GPU's driver says of it. None: this version of the libraries does not tell."""

    name: str
    compute_capability: str
    """Such as 9.0."""
    software: str
    """Versions, in words."""
    sm_count: int
    l2_byte: int
    hbm_byte: int
    smem_per_sm_byte: int | None = None
    smem_per_cta_byte: int | None = None
    max_mhz: float | None = None
    hbm_peak_byte_per_ns: float | None = None
    """Bus width times twice the memory clock."""


def nearest(facts: Facts) -> str:
    """The built-in device of the same architecture that is most like the GPU.

    The same compute capability first, then SMs, memory and name. Raises InputError if there is none.
    """
    alike = [d for d in map(load_device, device_names()) if d.architecture == architecture(facts)]
    if not alike:
        given = f"{facts.name}, of compute capability {facts.compute_capability}"
        raise InputError(f"{given}: a device file is of an {' or '.join(ARCHITECTURES)} GPU")

    def distance(device: DeviceSpec) -> tuple[bool, float, int]:
        size = abs(log(facts.sm_count / device.sm.count)) + abs(log(facts.hbm_byte / device.memory.hbm_byte))
        common = _words(facts.name) & _words(f"{device.name} {device.title}")
        # A few percent are what the driver keeps of the memory for itself.
        return facts.compute_capability != device.compute_capability, round(size, 1), -len(common)

    return min(alike, key=distance).name


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+\d*|\d+", name.lower()))


def architecture(facts: Facts) -> str | None:
    """As device files call it; None if they have no name for it."""
    if facts.compute_capability == "8.9":
        return "ada"
    return {"8": "ampere", "9": "hopper"}.get(facts.compute_capability.partition(".")[0])


def check_base(base: DeviceSpec, facts: Facts) -> None:
    """Raises InputError if the base is of another architecture than the GPU."""
    if base.architecture != architecture(facts):
        given = f"{facts.name} has compute capability {facts.compute_capability}"
        raise InputError(f"--base: {base.name} is of another architecture, {base.architecture}; {given}")


def told_by_driver(base: DeviceSpec, facts: Facts) -> dict[str, Citation]:
    """Entries for what the driver says and the base has otherwise, and for what follows from that."""
    source = f"CUDA driver of {facts.name}"
    found: dict[str, Citation] = {}

    def put(key: str, value: float | None, status: str = "measured", note: str = "", within: float = 0.0) -> None:
        known = base.citations[key].value
        if value is not None and abs(value - known) > within * known:
            found[key] = Citation(value, status, source, note)

    put("sm.count", facts.sm_count)
    put("memory.l2_byte", facts.l2_byte)
    put("smem.per_sm_byte", facts.smem_per_sm_byte)
    put("smem.per_cta_max_byte", facts.smem_per_cta_byte)
    put("clock.max_mhz", facts.max_mhz)
    # Datasheets round the size, and the driver keeps some.
    put("memory.hbm_byte", facts.hbm_byte, within=0.1)
    # The datasheets' rates are rounded, too.
    put("memory.hbm_peak_byte_per_ns", facts.hbm_peak_byte_per_ns, "derived", "bus width, memory clock", within=0.1)
    if "memory.l2_byte" in found:
        part = base.memory.l2_share_byte / base.memory.l2_byte
        found["memory.l2_share_byte"] = Citation(
            int(facts.l2_byte * part), "derived", source, f"the same part of the L2 as of {base.name}"
        )
    if facts.max_mhz is not None and facts.max_mhz < base.clock.datasheet_mhz:
        found["clock.datasheet_mhz"] = Citation(facts.max_mhz, "derived", source, "the highest clock")
    if found.keys() & {"sm.count", "clock.datasheet_mhz"}:
        mhz = found.get("clock.datasheet_mhz", base.citations["clock.datasheet_mhz"]).value
        tflops = facts.sm_count * base.tensor.fp16_flop_per_clk * mhz * 1e-6
        found["tensor.fp16_tflops"] = Citation(
            round(tflops, 1), "derived", source, "SMs, clock.datasheet_mhz and fp16_flop_per_clk"
        )
    return found


def as_entries(numbers: Iterable[Number], facts: Facts, clock_mhz: float | None) -> dict[str, Citation]:
    """What was measured, by section.key."""
    clock = f", SM clock {clock_mhz:.0f} MHz" if clock_mhz else ""
    source = f"flashsim calibrate {__version__}, {facts.name}, {facts.software}{clock}"
    return {one.key: Citation(_rounded(one.value), one.status, source, one.note) for one in numbers}


def device_text(base: DeviceSpec, facts: Facts, entries: Mapping[str, Citation], comments: Iterable[str]) -> str:
    """The device file: `entries` by section.key, the base's citations for the rest, `comments` on top."""
    lines = [f"# {_one_line(comment)}".rstrip() for comment in comments]
    name = re.sub(r"[^a-z0-9]+", "-", facts.name.lower()).strip("-")
    texts = {
        "name": name or base.name,
        "title": facts.name,
        "architecture": base.architecture,
        "compute_capability": facts.compute_capability,
    }
    lines += ["", *(f"{key} = {_quoted(text)}" for key, text in texts.items())]
    section = ""
    for key, cited in {**base.citations, **{k: entries[k] for k in base.citations if k in entries}}.items():
        here, _, entry = key.partition(".")
        if here != section:
            lines += ["", f"[{here}]"]
            section = here
        note = f", note = {_quoted(cited.note)}" if cited.note else ""
        value = f"{cited.value:.0f}" if float(cited.value).is_integer() else repr(float(cited.value))
        lines.append(
            f"{entry} = {{ value = {value}, status = {_quoted(cited.status)}, source = {_quoted(cited.source)}{note} }}"
        )
    return "\n".join(lines) + "\n"


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quoted(text: str) -> str:
    """A TOML string: its escapes are those of JSON."""
    return json.dumps(_one_line(text), ensure_ascii=False)
