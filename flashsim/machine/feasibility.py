"""Does a kernel fit an SM, and how often? Runs the schedule's own declarations and adds up what they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashsim.devices import DeviceSpec
from flashsim.errors import Infeasible
from flashsim.problem import AttentionProblem
from flashsim.schedules.base import OTHER_REGISTERS, Kernel, Role
from flashsim.schedules.tensors import WIDTHS

BARRIER_BYTE = 16
"""A full and an empty mbarrier of 8 bytes for each slot of a ring."""
THREADS_PER_WARP = 32


@dataclass(frozen=True)
class Fit:
    """What one CTA takes, and how many of them an SM holds."""

    ctas_per_sm: int
    smem_byte: int
    registers_per_thread: dict[str, int]
    """By role: what its tiles and the rest need."""
    limited_by: str


def fit(kernel: Kernel, problem: AttentionProblem, device: DeviceSpec) -> Fit:
    """How `kernel` fits an SM of `device`. Raises Infeasible with every reason why it does not, numbers included."""
    reasons = []
    for feature, there in (("wgmma", device.wgmma), ("tma", device.tma)):
        if feature in (kernel.mma, kernel.copy) and there is None:
            reasons.append(f"{kernel.name} needs {feature}, which {device.name} ({device.architecture}) has not")
    tile = f"BLOCK_M = {kernel.BLOCK_M}, BLOCK_N = {kernel.BLOCK_N}"
    smem = SharedNeed(kernel, problem)
    kernel.shared(smem)
    smem_byte = smem.total
    if smem_byte > device.smem.per_cta_max_byte:
        parts = ", ".join(f"{name} {size}" for name, size in smem.parts.items())
        reasons.append(
            f"{kernel.name} with {tile} needs {smem_byte} bytes of shared memory ({parts}), "
            f"{device.name} has {device.smem.per_cta_max_byte} for a CTA"
        )
    need = {role.name: registers_per_thread(role, kernel, problem) for role in kernel.roles}
    registers = warps = 0
    for role in kernel.roles:
        limit = min(role.registers_per_thread, device.sm.max_registers_per_thread)
        if need[role.name] > limit:
            reasons.append(
                f"{kernel.name} with {tile} needs {need[role.name]} registers per thread of a {role.name} "
                f"({OTHER_REGISTERS} of them beside its tiles), the limit is {limit}"
            )
        # Where a kernel reallocates registers between roles it takes each role's limit; else what the role needs.
        each = limit if len(kernel.roles) > 1 else min(need[role.name], limit)
        granularity = device.sm.register_granularity_per_warp
        registers += role.count * role.warps * -(-each * THREADS_PER_WARP // granularity) * granularity
        warps += role.count * role.warps
    room = {
        "shared memory": device.smem.per_sm_byte // (smem_byte + device.smem.reserved_per_cta_byte),
        "registers": device.sm.registers // max(registers, 1),
        "warps": device.sm.max_warps // warps,
        "CTAs": device.sm.max_ctas,
    }
    limited_by = min(room, key=lambda what: room[what])
    if not reasons and room[limited_by] == 0:
        reasons.append(f"{kernel.name}: a CTA takes {registers} registers and {warps} warps, too many for {limited_by}")
    if reasons:
        raise Infeasible(reasons)
    return Fit(room[limited_by], smem_byte, need, limited_by)


class SharedNeed:
    """Stands in for a CTA where a schedule declares its shared memory, and counts bytes."""

    def __init__(self, kernel: Kernel, problem: AttentionProblem) -> None:
        self.problem = problem
        self.head_dim, self.head_dim_v = kernel.widths(problem)
        self.parts: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def ring(self, name: str, shape: tuple[int, int], stages: int, consumers: int, dtype: str | None = None) -> Any:
        self.parts[name] = stages * (self._byte(shape, dtype) + BARRIER_BYTE)
        return name

    def overlay(self, name: str, shape: tuple[int, int], consumers: int, over: Any, dtype: str | None = None) -> Any:
        self.parts[name] = max(0, self._byte(shape, dtype) - self.parts[over]) + BARRIER_BYTE
        return name

    def slot(self, name: str, shape: tuple[int, int], dtype: str | None = None) -> Any:
        self.parts[name] = self._byte(shape, dtype)
        return name

    def sync(self, name: str, warpgroups: int) -> Any:
        return name

    def turn(self, name: str, warpgroups: int) -> Any:
        return name

    def order(self, name: str, warpgroups: int) -> Any:
        return name

    def _byte(self, shape: tuple[int, int], dtype: str | None) -> int:
        return shape[0] * shape[1] * WIDTHS[dtype or self.problem.dtype]


class RegisterNeed:
    """Stands in for a warpgroup where a role declares its register tiles, and counts registers of a thread."""

    def __init__(self, kernel: Kernel, problem: AttentionProblem, warps: int) -> None:
        self.kernel = kernel
        self._warps = warps
        self.problem = problem
        self.head_dim, self.head_dim_v = kernel.widths(problem)
        self.index = 0
        self._alive: dict[int, int] = {}

    @property
    def per_thread(self) -> int:
        return sum(self._alive.values()) + OTHER_REGISTERS

    def tile(self, name: str, shape: tuple[int, int], dtype: str = "fp32", over: Any = None, warps: Any = None) -> Any:
        need = -(-shape[0] * shape[1] * WIDTHS[dtype] // (4 * THREADS_PER_WARP * self._warps))
        if over is not None:
            self._alive[over] = max(self._alive[over], need)
            return over
        self._alive[len(self._alive)] = need
        return len(self._alive) - 1

    def rows(self, name: str, count: int) -> Any:
        return -1  # a few registers, part of OTHER_REGISTERS


def registers_per_thread(role: Role, kernel: Kernel, problem: AttentionProblem) -> int:
    """Registers that a thread of `role` needs; a role that declares none needs only the others."""
    need = RegisterNeed(kernel, problem, role.warps)
    if role.registers:
        role.registers(need)
    return need.per_thread
