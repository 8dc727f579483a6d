"""What a simulation charges for one tile of the inner loop, as instruction counts: to be held against compiled code.

One CTA is simulated at two lengths of its inner loop; the difference is what the tiles between them cost, whatever the
text around the loop does. Busy ticks become instructions by the rates of the device file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flashsim.devices import DeviceSpec
from flashsim.machine.costs import Costs
from flashsim.machine.gpu import FullSimulation, KernelRun
from flashsim.machine.options import Options
from flashsim.problem import AttentionProblem
from flashsim.schedules import Kernel, load_schedule
from flashsim.simulate import configured
from flashsim.units import TICKS_PER_CLK

LENGTHS = 8, 24
"""Tiles of the inner loop at which the CTA is simulated."""
INSTRUCTIONS = ("exp", "fma", "alu", "pack", "issue")
"""Of each warp: EX2; FFMA, FMUL, FADD; maxima, compares, selects; conversions of two values; all that are issued."""


@dataclass(frozen=True)
class Charges:
    """For one tile of a kernel's inner loop."""

    BLOCK_M: int
    BLOCK_N: int
    warps: int
    """Of a CTA, those that compute."""
    mma_flop: int
    """Of a CTA."""
    load_byte: int
    """From HBM or L2, of a CTA."""
    smem_byte: float
    """Through the port of the shared memory, of a CTA, operands of wgmma included."""
    copies: float
    """TMA copies of a CTA."""
    instructions: dict[str, float]
    """By name of `INSTRUCTIONS`."""


def charges(
    schedule: str, problem: AttentionProblem, device: DeviceSpec, options: dict[str, Any] | None = None
) -> dict[str, Charges]:
    """By name of a launch, for all that have an inner loop. Of `problem`, head dims, dtype and direction count.

    Raises InputError for options that do not fit, Infeasible for a kernel that does not fit the device.
    """
    one = replace(
        device,
        sm=replace(device.sm, count=1),
        # Counted apart, even where one pipe does both.
        pipes=replace(device.pipes, pack_on_exp_pipe=0),
    )
    kind = load_schedule(schedule)
    plain = _problem(problem, 128, 128)
    chosen = configured(kind, plain, one, options or {})
    fixed = {name: value for name, value in chosen.options().items() if value is not None}
    found = {}
    for position, kernel in enumerate(chosen.kernels(plain)):
        if kernel.walk == "none":
            continue
        runs = []
        for count in LENGTHS:
            if kernel.grid.over == "keys":
                sized = _problem(problem, count * kernel.BLOCK_M, kernel.BLOCK_N)
            else:
                sized = _problem(problem, kernel.BLOCK_M, count * kernel.BLOCK_N)
            launch = configured(kind, sized, one, fixed).kernels(sized)[position]
            run = FullSimulation(one, one.clock.datasheet_mhz, launch, sized, Options())
            runs.append(run.run())
        found[kernel.name] = _charges(kernel, one, *runs)
    return found


def _problem(like: AttentionProblem, seqlen_q: int, seqlen_k: int) -> AttentionProblem:
    return AttentionProblem(
        batch=1,
        heads_q=1,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=like.head_dim,
        head_dim_v=like.head_dim_v,
        dtype=like.dtype,
        direction=like.direction,
    )


def _charges(kernel: Kernel, device: DeviceSpec, short: KernelRun, long: KernelRun) -> Charges:
    costs, tiles = Costs(device, device.clock.datasheet_mhz), LENGTHS[1] - LENGTHS[0]
    computing = [role for role in kernel.roles if role.registers is not None]
    warps = sum(role.count * role.warps for role in computing)

    def clk(unit: str) -> float:
        return (long.busy[unit] - short.busy[unit]) / TICKS_PER_CLK / tiles

    tma = device.tma.issue_clk if device.tma else 0
    return Charges(
        BLOCK_M=kernel.BLOCK_M,
        BLOCK_N=kernel.BLOCK_N,
        warps=warps,
        mma_flop=(long.flop - short.flop) // tiles,
        load_byte=(sum(long.read_byte.values()) - sum(short.read_byte.values())) // tiles,
        smem_byte=clk("smem") * device.smem.byte_per_clk,
        copies=clk("tma") / tma if tma else 0.0,
        instructions={name: clk(name) / costs.clk_per_instruction[name] / (warps / 4) for name in INSTRUCTIONS},
    )
