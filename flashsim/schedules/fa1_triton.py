"""FlashAttention-1's forward loops as Triton has them: `kernels/fa1.py`.

The algorithm's order, as in `fa1`, but the warps split the *queries* of a tile, as Triton lays out its products:
nothing is exchanged through shared memory, and nothing is loaded ahead. l and m are one number here, as in `fa1`; the
kernel reads and writes both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel, Role
from flashsim.schedules.launch import power_of_two
from flashsim.schedules.verbs import CTA, Operand, Program, Registers, Sync, Warpgroup


@dataclass
class Shared:
    """What the warpgroups of one CTA share."""

    Q: Operand
    K: Operand
    V: Operand
    everybody: Sync


@dataclass
class Fragments:
    """The register tiles of one warpgroup: its rows of the tile of queries."""

    S: Operand
    P: Operand
    PV: Operand
    O: Operand  # noqa: E741 - the paper's name
    L: Operand
    m: Operand
    alpha: Operand
    l: Operand  # noqa: E741 - the paper's name
    scale: Operand


@dataclass(frozen=True)
class FA1Triton:
    """The launches: O_tmp = 0 and L = -inf, the loops, and O = O_tmp. `before` and `after` are `fa1`'s."""

    BLOCK_M: int
    BLOCK_N: int
    warpgroups: int
    mma: str

    def complaints(self, problem: AttentionProblem) -> list[str]:
        """What the kernel does not have, and tiles that its warps cannot share."""
        lines = ["impl = triton is a forward pass without dropout; gradients come from fa2"]
        lines = lines if problem.dropout or "bwd" in problem.passes else []
        for name, value in (("BLOCK_M", self.BLOCK_M), ("BLOCK_N", self.BLOCK_N)):
            if value & (value - 1):
                lines.append(f"{name} = {value}, must be a power of two, as all tiles of Triton are")
        if self.BLOCK_M % (64 * self.warpgroups):
            lines.append(f"BLOCK_M = {self.BLOCK_M}, must be a multiple of 64: 16 rows for each of 4 warps")
        return lines

    def kernel(self, problem: AttentionProblem, **common: Any) -> Kernel:
        return Kernel(
            "fa1_fwd",
            (Role("warps", self.program, self.warpgroups, registers=self.registers),),
            self.shared,
            Grid(over="keys", launch="head"),
            BLOCK_M=self.BLOCK_M,
            BLOCK_N=self.BLOCK_N,
            mma="wgmma" if self.mma == "wgmma" else "mma.sync",
            copy="cp.async",
            head_dim=power_of_two(problem.head_dim),
            head_dim_v=power_of_two(problem.head_dim_v),
            **common,
        )

    def shared(self, cta: CTA) -> Shared:
        return Shared(
            Q=cta.slot("Q", (self.BLOCK_M, cta.head_dim)),
            K=cta.slot("K", (self.BLOCK_N, cta.head_dim)),
            V=cta.slot("V", (self.BLOCK_N, cta.head_dim_v)),
            everybody=cta.sync("everybody", self.warpgroups),
        )

    def registers(self, regs: Registers) -> Fragments:
        rows, dv = self.BLOCK_M // self.warpgroups, regs.head_dim_v
        S = regs.tile("S", (rows, self.BLOCK_N))
        return Fragments(
            S=S,
            P=regs.tile("P", (rows, self.BLOCK_N), regs.problem.dtype, over=S),
            PV=regs.tile("PV", (rows, dv)),
            O=regs.tile("O", (rows, dv)),
            L=regs.rows("L", rows),
            m=regs.rows("m", rows),
            alpha=regs.rows("alpha", rows),
            l=regs.rows("l", rows),
            scale=regs.rows("scale", rows),
        )

    def program(self, wg: Warpgroup, s: Shared, r: Fragments) -> Program:
        """Algorithm 1; each warpgroup has its rows of Q_i and O_i, and loads its part of K_j and V_j."""
        rows, keys = self.BLOCK_M // self.warpgroups, self.BLOCK_N // self.warpgroups
        mine, my_keys = (wg.index * rows, rows), (wg.index * keys, keys)
        for tile in wg.tiles():  # 5
            wg.map("fill", wg.problem.softmax_scale, into=r.scale)
            if tile.count:
                k = wg.load(tile.K.rows(*my_keys), into=s.K.rows(*my_keys))  # 6
                v = wg.load(tile.V.rows(*my_keys), into=s.V.rows(*my_keys))
                yield k
                yield v
                yield s.everybody.wait()  # everyone's part of K_j and V_j is there
            for i in wg.q_tiles(tile):  # 7
                q = wg.load(tile.Q(i).rows(*mine), into=s.Q.rows(*mine))  # 8
                o = wg.load(tile.O_tmp(i).rows(*mine), into=r.O)
                L = wg.load(tile.LSE(i).rows(*mine), into=r.L)
                yield q
                yield wg.gemm(s.Q.rows(*mine), s.K.T, into=r.S)  # 9: S = Q_i K_j^T
                wg.map("mask", r.S, tile, i, into=r.S)  # as in the published code, of every score
                yield L
                wg.map("div", r.L, r.scale, into=r.L)
                wg.map("copy", r.L, into=r.m)
                wg.reduce("max", r.S, into=r.m)  # 10, 11: m_new
                wg.map("exp", r.S, r.m, into=r.S)  # 10: P = exp(S - m_new)
                wg.map("rescale_factor", r.L, r.m, into=r.alpha)
                wg.map("copy", r.alpha, into=r.l)
                wg.reduce("sum", r.S, into=r.l)  # 11: l_new
                wg.convert(r.S, into=r.P)
                yield wg.gemm(r.P, s.V, into=r.PV)
                yield o
                wg.map("mul", r.O, r.alpha, into=r.O)
                wg.map("add", r.O, r.PV, into=r.O)
                wg.map("div", r.O, r.l, into=r.O)  # 12: O_i = diag(l_new)^-1 (diag(alpha) O_i + P V_j)
                wg.map("lse", r.m, r.l, into=r.L)
                wg.store(r.O, into=tile.O_tmp(i).rows(*mine))
                wg.store(r.L, into=tile.LSE(i).rows(*mine))  # 13
            yield s.everybody.wait()  # nobody reads K_j and V_j any more
