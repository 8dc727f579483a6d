"""Instruction counts of compiled kernels: `flashsim audit --as-costs FILE` writes them, `simulate --costs FILE` reads.

A JSON object whose `costs` are a list, one for each inner loop that a simulation has too:

    {"schedule": "fa2", "target": "sm_90", "dtype": "fp16", "head_dim": 128, "head_dim_v": 128,
     "options": {"impl": "triton", "BLOCK_M": 128, "BLOCK_N": 64},
     "counts": {"exp": 34, "fma": 132, "alu": 70, "pack": 16, "issue": 310},
     "charged": {"exp": 34, "fma": 132, "alu": 32, "pack": 16, "issue": 274}}

`counts` are instructions of each warp that computes, for one KV tile; `charged` is what a simulation charges for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashsim.devices import DeviceSpec
from flashsim.errors import InputError
from flashsim.io.fields import complaints, read_text
from flashsim.problem import AttentionProblem

KINDS = ("exp", "fma", "alu", "pack", "issue")
_Counts = dict[str, Annotated[float, Field(ge=0)]]


class CompiledCosts(BaseModel):
    """Of one inner loop."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schedule: str
    target: str
    dtype: str
    head_dim: int
    head_dim_v: int
    options: dict[str, str | int | bool]
    counts: _Counts
    charged: _Counts

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


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    costs: list[CompiledCosts]


def read_costs(path: str) -> list[CompiledCosts]:
    """Raises InputError with one line per mistake."""
    try:
        table = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: is no JSON: {error}") from None
    try:
        costs = _File.model_validate(table).costs
    except ValidationError as error:
        raise InputError([f"{path}: {line}" for line in complaints(error, str, CompiledCosts.model_fields)]) from None
    problems = [
        f"{path}: costs.{number}.{part}: must have {', '.join(KINDS)}, has {', '.join(found) or 'nothing'}"
        for number, one in enumerate(costs)
        for part, found in (("counts", one.counts), ("charged", one.charged))
        if set(found) != set(KINDS)
    ]
    if problems:
        raise InputError(problems)
    return costs


def fitting(
    costs: Sequence[CompiledCosts], schedule: str, options: Mapping[str, Any], problem: AttentionProblem
) -> CompiledCosts:
    """The counts of this case. Raises InputError, with what the nearest ones are of, where there are none."""
    if not costs:
        raise InputError("there are no counts in it")
    nearest = min(costs, key=lambda one: len(one.misfits(schedule, options, problem)))
    if wrong := nearest.misfits(schedule, options, problem):
        raise InputError(wrong)
    return nearest
