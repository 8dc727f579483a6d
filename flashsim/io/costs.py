"""Instruction counts of a compiled kernel: `flashsim audit --as-costs FILE` writes them, `simulate --costs FILE` reads.

schedule = "fa2"
target = "sm_90"
dtype = "fp16"
head_dim = 128
head_dim_v = 128
options = { impl = "triton", BLOCK_M = 128, BLOCK_N = 64 }
[counts]                    # of each warp, for one KV tile, in the compiled inner loop
exp = 34                    # ... fma, alu, pack (conversions), issue (all)
[charged]                   # what a simulation charges for the same
exp = 34
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashsim.devices import DeviceSpec
from flashsim.errors import InputError
from flashsim.io.fields import complaints, read_toml
from flashsim.problem import AttentionProblem

KINDS = ("exp", "fma", "alu", "pack", "issue")
_Counts = dict[str, Annotated[float, Field(ge=0)]]


class CompiledCosts(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schedule: str
    target: str
    dtype: str
    head_dim: int
    head_dim_v: int
    options: dict[str, str | int | bool]
    counts: _Counts
    charged: _Counts

    def text(self) -> str:
        """As TOML."""
        table = self.model_dump()
        lines = [f"{key} = {_toml(table[key])}" for key in ("schedule", "target", "dtype", "head_dim", "head_dim_v")]
        options = ", ".join(f"{key} = {_toml(value)}" for key, value in self.options.items())
        lines.append(f"options = {{ {options} }}")
        for part in ("counts", "charged"):
            lines += [f"[{part}]", *(f"{kind} = {table[part][kind]:.10g}" for kind in KINDS)]
        return "\n".join(lines) + "\n"

    def misfits(self, schedule: str, options: Mapping[str, Any], problem: AttentionProblem) -> list[str]:
        """Where a case is not the kernel that was compiled, one line each."""
        case = {name: getattr(problem, name) for name in ("dtype", "head_dim", "head_dim_v")} | {"schedule": schedule}
        compiled = {name: getattr(self, name) for name in case} | self.options
        asked = {**options, **case}
        return [
            f"{name} is {asked.get(name)}, the counts are those of {name} {value}"
            for name, value in compiled.items()
            if asked.get(name) != value
        ]

    def applied(self, device: DeviceSpec) -> DeviceSpec:
        """The device on which the charged instructions take as long as the compiled ones do on `device`.

        A unit that has n times the instructions to do is one whose rate is divided by n. Where conversions go through
        the exp pipe, what counts there is the sum.
        """
        counts, charged = dict(self.counts), dict(self.charged)
        if device.pipes.pack_on_exp_pipe:
            for count in (counts, charged):
                count["exp"] += count["pack"]
        ratio = {kind: counts[kind] / charged[kind] if counts[kind] and charged[kind] else 1.0 for kind in KINDS}
        pipes = device.pipes
        return replace(
            device,
            pipes=replace(
                pipes,
                exp_op_per_clk=pipes.exp_op_per_clk / ratio["exp"],
                fma_op_per_clk=pipes.fma_op_per_clk / ratio["fma"],
                alu_op_per_clk=pipes.alu_op_per_clk / ratio["alu"],
                pack_op_per_clk=pipes.pack_op_per_clk / ratio["pack"],
                issue_inst_per_clk=pipes.issue_inst_per_clk / ratio["issue"],
            ),
        )


def _toml(value: object) -> str:
    """A text, whole number or truth value; JSON writes these as TOML does."""
    return json.dumps(value, ensure_ascii=False)


def read_costs(path: str) -> CompiledCosts:
    """Raises InputError with one line per mistake."""
    table = read_toml(Path(path))
    try:
        costs = CompiledCosts.model_validate(table)
    except ValidationError as error:
        raise InputError([f"{path}: {line}" for line in complaints(error, str, CompiledCosts.model_fields)]) from None
    problems = [
        f"{path}: {part}: must have {', '.join(KINDS)}, has {', '.join(found) or 'nothing'}"
        for part, found in (("counts", costs.counts), ("charged", costs.charged))
        if set(found) != set(KINDS)
    ]
    if problems:
        raise InputError(problems)
    return costs
