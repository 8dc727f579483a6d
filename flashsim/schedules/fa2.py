"""FlashAttention-2, forward (Dao, arXiv 2307.08691, algorithm 1); `fa2_backward` has the backward pass.

One CTA for each block of queries, an inner loop over the K/V blocks, each warp with its own query rows. There is no
producer: the warps that compute also issue the loads (cp.async), one K and one V buffer, and mma.sync products are
awaited. What overlaps is one CTA with another on the same SM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel, Role, Schedule, switch
from flashsim.schedules.fa2_backward import FA2Backward
from flashsim.schedules.fa2_backward import tile_size as backward_tile_size
from flashsim.schedules.fa2_backward_triton import FA2BackwardTriton
from flashsim.schedules.fa2_triton import FA2Triton
from flashsim.schedules.launch import PUBLISHED, launch_parameters, power_of_two
from flashsim.schedules.softmax import Statistics, finish, online_softmax, rescale, start
from flashsim.schedules.verbs import CTA, Operand, Program, Registers, Sync, Warpgroup

BACKWARD_TILE = ("bwd_BLOCK_M", "bwd_BLOCK_N", "bwd_stages")
OTHER_INSTRUCTIONS = 60
"""Per KV tile, beside those of the verbs: counted in the compiled loop of flash_fwd_kernel.h, about 60."""


@dataclass
class Shared:
    """What the warpgroups of one CTA share."""

    Q: Operand
    K: Operand
    V: Operand
    everybody: Sync


@dataclass
class Fragments:
    """The register tiles of one warpgroup."""

    S: Operand
    P: Operand
    O: Operand  # noqa: E741 - the paper's name
    stats: Statistics


def tile_size(head_dim: int, masked: bool, dropout: bool, architecture: str) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) as csrc/flash_attn/src/flash_fwd_launch_template.h has them.

    Ada (sm_89), with less shared memory than Ampere and Hopper, has its own for head dims 96 to 160 and 256.
    """
    ada = architecture == "ada"
    if head_dim <= 64:
        return (128, 64) if dropout else (128, 128)
    if head_dim <= 96:
        return (64, 64) if ada and masked else (128, 64)
    if head_dim <= 128:
        if dropout:
            return 128, 32
        return ((64, 64) if masked else (128, 32)) if ada else (128, 64)
    if head_dim <= 160:
        return ((64, 64) if masked else (128, 64)) if ada else (128, 32)
    if head_dim <= 192:
        return (64, 64) if dropout else (128, 64)
    return (128, 64) if architecture == "ampere" else (64, 64)


@dataclass(frozen=True)
class FA2(Schedule):
    """FlashAttention-2, fp16 and bf16, Ampere, Ada and Hopper."""

    title = "FlashAttention-2: mma.sync and cp.async, no warp specialization"
    source = "arXiv 2307.08691, algorithms 1 and 2; Dao-AILab/flash-attention csrc/flash_attn/src/flash_fwd_kernel.h"
    directions = ("fwd", "bwd", "fwd+bwd")
    dropout = True
    backward: ClassVar[type[FA2Backward]] = FA2Backward
    triton: ClassVar[type[FA2Triton]] = FA2Triton
    backward_triton: ClassVar[type[FA2BackwardTriton]] = FA2BackwardTriton

    impl: str = switch(PUBLISHED, "whose kernel; triton: kernels/fa2.py, with its tiles", (PUBLISHED, "triton"))
    mma: str = switch(None, "instruction of the products", ("mma.sync", "wgmma"))
    num_warps: int = switch(None, "warps of a CTA of the forward pass")
    num_stages: int = switch(None, "of impl=triton: tiles of K and V under way at a time, one of them computed on")
    bwd_BLOCK_M: int = switch(None, "query rows of a tile of the backward pass")
    bwd_BLOCK_N: int = switch(None, "keys of a CTA's tile in the backward pass")
    bwd_stages: int = switch(None, "buffers of Q in the backward pass")
    deterministic: bool = switch(False, "CTAs add to dQ one after the other, in the order of their keys")

    def defaults(self, problem: AttentionProblem, architecture: str) -> dict[str, Any]:
        head_dim = max(problem.head_dim, problem.head_dim_v)
        backward = dict(zip(BACKWARD_TILE, backward_tile_size(head_dim, architecture), strict=True))
        if self.impl == "triton":
            main = "fa2_bwd_dkdv" if self.deterministic else "fa2_bwd"
            forward, row = (launch_parameters(self.impl, name, problem, architecture) for name in ("fa2_fwd", main))
            backward = dict(zip(BACKWARD_TILE, (row["BLOCK_M"], row["BLOCK_N"], 1), strict=True))
            return {"mma": "wgmma" if architecture == "hopper" else "mma.sync", **forward, **backward}
        rows, keys = tile_size(head_dim, problem.mask_rule.kind != "full", problem.dropout > 0, architecture)
        rows, keys = self.BLOCK_M or rows, self.BLOCK_N or keys
        # Up to 32 rows for each warp, or 16 where 32 rows of O and S would take more than 192 registers a thread: the
        # rule gives the numbers of warps that the code has for each of its tiles.
        wide = self.width(problem.head_dim_v) + keys > 192
        warps = 4 * max(1, rows // (64 if wide else 128))
        return {"BLOCK_M": rows, "BLOCK_N": keys, "mma": "mma.sync", "num_warps": warps, "num_stages": 1, **backward}

    def complaints(self, problem: AttentionProblem) -> list[str]:
        lines = []
        if self.BLOCK_M not in (64, 128, 256):
            lines.append(f"BLOCK_M = {self.BLOCK_M}, allowed are 64, 128, 256: 16 or 32 rows for each of 4 or 8 warps")
        elif self.num_warps not in (4, 8, 16) or self.BLOCK_M % (16 * self.num_warps):
            lines.append(
                f"num_warps = {self.num_warps}, allowed are 4, 8 and 16, each with at least 16 of {self.BLOCK_M} rows"
            )
        if self.BLOCK_N % 16 or not 16 <= self.BLOCK_N <= 256:
            lines.append(f"BLOCK_N = {self.BLOCK_N}, allowed are the multiples of 16 from 16 to 256 (k of one mma)")
        if self.impl == "triton":
            backward = self.backward_kernel(problem).complaints() if "bwd" in problem.passes else []
            return lines + self.triton_kernel().complaints(problem) + backward
        for name, value in (("bwd_BLOCK_M", self.bwd_BLOCK_M), ("bwd_BLOCK_N", self.bwd_BLOCK_N)):
            if value not in (64, 128):
                lines.append(
                    f"{name} = {value}, allowed are 64 and 128: rows for four warps, columns for two warpgroups"
                )
        if self.bwd_stages not in (1, 2):
            lines.append(f"bwd_stages = {self.bwd_stages}, allowed are 1 and 2")
        if self.num_stages != 1:
            lines.append(f"num_stages = {self.num_stages}, the published kernel has one buffer of K and one of V")
        return lines

    def width(self, head_dim: int) -> int:
        """Columns of the tiles: the library has kernels for multiples of 32 (round_multiple in flash_api.cpp)."""
        return power_of_two(head_dim) if self.impl == "triton" else -(-head_dim // 32) * 32

    @property
    def warpgroups(self) -> int:
        return self.num_warps // 4

    def triton_kernel(self) -> FA2Triton:
        return self.triton(self.BLOCK_M, self.BLOCK_N, self.num_stages, self.warpgroups, self.mma)

    def backward_kernel(self, problem: AttentionProblem) -> Any:
        """The class that has the launches of the backward pass."""
        kind = self.backward_triton if self.impl == "triton" else self.backward
        d, dv = (self.width(width) for width in (problem.head_dim, problem.head_dim_v))
        tile = self.bwd_BLOCK_M, self.bwd_BLOCK_N, self.bwd_stages
        return kind(*tile, self.deterministic, d, dv, "wgmma" if self.mma == "wgmma" else "mma.sync")

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        text = self.triton_kernel() if self.impl == "triton" else self
        d, dv = (self.width(width) for width in (problem.head_dim, problem.head_dim_v))
        forward = Kernel(
            name="fa2_fwd",
            roles=(Role("warps", text.program, self.warpgroups, registers=text.registers),),
            shared=text.shared,
            grid=Grid("rows", "cta"),
            BLOCK_M=self.BLOCK_M,
            BLOCK_N=self.BLOCK_N,
            mma="wgmma" if self.mma == "wgmma" else "mma.sync",
            copy="cp.async",
            head_dim=d,
            head_dim_v=dv,
            overhead_instructions=OTHER_INSTRUCTIONS,
        )
        launches = {"fwd": (forward,)}
        if "bwd" in problem.passes:
            launches["bwd"] = self.backward_kernel(problem).kernels(problem)
        return tuple(kernel for name in problem.passes for kernel in launches[name])

    def shared(self, cta: CTA) -> Shared:
        return Shared(
            Q=cta.slot("Q", (self.BLOCK_M, cta.head_dim)),
            K=cta.slot("K", (self.BLOCK_N, cta.head_dim)),
            V=cta.slot("V", (self.BLOCK_N, cta.head_dim_v)),
            everybody=cta.sync("everybody", self.warpgroups),
        )

    def registers(self, regs: Registers) -> Fragments:
        rows = self.BLOCK_M // self.warpgroups
        S = regs.tile("S", (rows, self.BLOCK_N))
        return Fragments(
            S=S,
            P=regs.tile("P", (rows, self.BLOCK_N), regs.problem.dtype, over=S),
            O=regs.tile("O", (rows, regs.head_dim_v)),
            stats=Statistics.declare(regs, rows),
        )

    def program(self, wg: Warpgroup, s: Shared, r: Fragments) -> Program:
        """Algorithm 1. Each warpgroup loads its share of the rows of Q, K and V, and computes its own rows of O."""
        groups = self.warpgroups
        rows, keys = self.BLOCK_M // groups, self.BLOCK_N // groups
        for tile in wg.tiles():
            my_rows, my_keys = (wg.index * rows, rows), (wg.index * keys, keys)
            start(wg, r.O, r.stats)  # 5
            if tile.count:
                q = wg.load(tile.Q.rows(*my_rows), into=s.Q.rows(*my_rows))  # 4
                k = wg.load(tile.K(tile.first).rows(*my_keys), into=s.K.rows(*my_keys))
                yield q
            for j in wg.kv_tiles(tile):  # 6
                yield k  # 7
                yield s.everybody.wait()  # everyone's part of K_j is there, and nobody reads V_{j-1} any more
                v = wg.load(tile.V(j).rows(*my_keys), into=s.V.rows(*my_keys))
                yield wg.gemm(s.Q.rows(*my_rows), s.K.T, into=r.S)  # 8: S = Q K_j^T
                yield v
                yield s.everybody.wait()  # everyone's part of V_j is there, and nobody reads K_j any more
                if j < tile.last:
                    k = wg.load(tile.K(j + 1).rows(*my_keys), into=s.K.rows(*my_keys))
                online_softmax(wg, r.S, r.stats, tile, j, masked=tile.partial(j))  # 9
                rescale(wg, r.O, r.stats)
                if wg.problem.dropout:
                    wg.map("dropout", r.S, tile, j, into=r.S)
                wg.convert(r.S, into=r.P)
                yield wg.gemm(r.P, s.V, into=r.O, accumulate=True)  # 10: O = diag(alpha) O + P V_j
            finish(wg, r.O, r.stats)  # 12, 13
            wg.store(r.O, into=tile.O.rows(*my_rows))  # 14
            wg.store(r.stats.l, into=tile.LSE.rows(*my_rows))  # 15
