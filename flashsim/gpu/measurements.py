"""Measured rows of our own: times of kernels as a CSV file in the schema of `flashsim.io.measured`, and what is known
of the session in a `sessions.toml` beside it. Both are written as measurements come."""

from __future__ import annotations

import csv
import json
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashsim.errors import InputError
from flashsim.gpu.timing import Times
from flashsim.gpu.variants import VARIANTS
from flashsim.io.measured import COLUMNS, option_text, read_sessions
from flashsim.problem import AttentionProblem

TIMING = (
    "CUDA events; median; L2 cleared before each measurement; variants of a problem interleaved; the second of two "
    "launches in a row is the time with a warm L2, in the notes"
)
KNOWN = ("driver", "power_limit_w", "max_sm_mhz", "torch", "triton", "cuda")
"""What `clocks.describe` says that goes into a session."""


@dataclass(frozen=True)
class Measurement:
    """One variant at one problem."""

    id: str
    variant: str
    problem: AttentionProblem
    times: Times
    state: dict[str, Any] | None
    """`clocks.State` of the GPU meanwhile; None where it is unknown."""

    @property
    def tflops(self) -> float:
        return self.problem.flops / self.times.time_us / 1e6

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "variant": self.variant,
            "problem": {name: getattr(self.problem, name) for name in self.problem.__dataclass_fields__},
            "time_us": self.times.time_us,
            "warm_time_us": self.times.warm_time_us,
            "spread": self.times.spread,
            "runs": len(self.times.cold_us),
            "host_late": self.times.late,
            "tflops": self.tflops,
            "state": self.state,
        }

    def row(self, session: str, device: str, versions: str) -> dict[str, Any]:
        """By the columns of the schema."""
        p, variant, state = self.problem, VARIANTS[self.variant], self.state or {}
        schedule = variant.schedule_at(p)
        about = [f"{self.variant}", f"{len(self.times.cold_us)} measurements, spread {self.times.spread:.3f}"]
        about += [f"warm L2 {self.times.warm_time_us:.6g} us"]
        about += [f"{state['power_w']:.0f} W, {state['temperature_c']:.0f} C"] if state else []
        about += [f"{reason} in {part:.0%} of the time" for reason, part in state.get("throttled", {}).items()]
        about += ["host-bound"] if self.times.late else []
        return {
            "id": self.id,
            "session": session,
            "source": f"flashsim validate, {versions}",
            "device": device,
            "clock_mhz": f"{state['sm_mhz']:g}" if state else "",
            "schedule": schedule,
            "options": option_text(variant.options),
            "direction": p.direction,
            "dtype": p.dtype,
            "batch": p.batch,
            "heads_q": p.heads_q,
            "heads_kv": p.heads_kv,
            "seqlen_q": p.seqlen_q,
            "seqlen_k": p.seqlen_k,
            "head_dim": p.head_dim,
            "head_dim_v": p.head_dim_v,
            "mask": p.mask,
            "dropout": f"{p.dropout:g}",
            "time_us": f"{self.times.time_us:.6g}",
            "tflops": f"{self.tflops:.6g}",
            "flop_convention": "std",
            "value_kind": "measured",
            "notes": "; ".join(about),
        }


def session_of(device: str) -> str:
    """A name that no other run has: the device and the time."""
    return f"{device}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


class Writer:
    """Writes rows to a file, each complete when it is written; to none, if there is no path."""

    def __init__(self, path: str | None, session: str, device: str, machine: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._session, self._device, self._machine = session, device, machine
        self._files = ExitStack()

    @staticmethod
    def check(path: Path) -> None:
        """Raises InputError if nothing can be written to `path`, or the sessions beside it do not read."""
        if not path.parent.is_dir():
            raise InputError(f"--output: cannot write {path}: there is no folder {path.parent}")
        if path.exists() and not path.is_file():
            raise InputError(f"--output: {path} is not a regular file")
        try:
            with path.open("a", encoding="utf-8"):
                pass
        except OSError as error:
            raise InputError(f"--output: cannot write {path}: {error.strerror or error}") from None
        read_sessions(path.parent / "sessions.toml")

    def __enter__(self) -> Writer:
        if self._path is None:
            return self
        with (self._path.parent / "sessions.toml").open("a", encoding="utf-8", newline="\n") as sessions:
            sessions.write(self._about())
        self._stream = self._files.enter_context(self._path.open("w", encoding="utf-8", newline=""))
        self._csv = csv.DictWriter(self._stream, COLUMNS, lineterminator="\n")
        self._csv.writeheader()
        self._stream.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def write(self, measurement: Measurement) -> None:
        if self._path is not None:
            versions = f"torch {self._machine['torch']}, triton {self._machine['triton']}"
            self._csv.writerow(measurement.row(self._session, self._device, versions))
            self._stream.flush()

    def _about(self) -> str:
        """The session as a table of TOML."""
        known = {"gpu": self._machine["gpu"], "timing": TIMING}
        known |= {name: self._machine[name] for name in KNOWN if self._machine.get(name) is not None}
        if "clock_unknown" in self._machine:
            known["clock_status"] = f"unknown: {self._machine['clock_unknown']}"
        else:
            known["clock_status"] = "read by nvidia-ml-py while measuring; the median of each row is in its clock_mhz"
        lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in known.items()]
        before = self._path is not None and (self._path.parent / "sessions.toml").stat().st_size > 0
        return "\n" * before + "\n".join([f"[{self._session}]", *lines]) + "\n"
