"""FlashAttention-2's backward pass as Triton has it: `kernels/fa2_backward.py`.

The steps are those of `fa2_backward`, but S and P are transposed, a row for each key: P and dS are then in registers
where dV and dK need them, and only dS goes through shared memory, for dQ. With `deterministic`, a kernel of its own
computes dQ, block of queries by block of queries, with S and dP once more. The kernel sums grouped query heads up in a
loop; here a last kernel does, as in the published code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel, Role
from flashsim.schedules.fa2_backward import FA2Backward
from flashsim.schedules.verbs import CTA, Awaitable, Operand, Program, Registers, Sync, Warpgroup


@dataclass
class Shared:
    """What the warpgroups of one CTA share: of a block of keys, and of the tile of queries that it is at."""

    Q: Operand
    K: Operand
    V: Operand
    dO: Operand
    dS: Operand
    everybody: Sync


@dataclass
class Fragments:
    """The register tiles of one warpgroup: its keys; of dQ, which all of them compute, its columns."""

    S: Operand
    P: Operand
    dP: Operand
    dS: Operand
    dQ: Operand
    dK: Operand
    dV: Operand
    LSE: Operand
    D: Operand


@dataclass
class QueryFragments:
    """The register tiles of one warpgroup of the dQ kernel: its queries."""

    S: Operand
    dP: Operand
    dS: Operand
    dQ: Operand
    LSE: Operand
    D: Operand


@dataclass(frozen=True)
class FA2BackwardTriton(FA2Backward):
    """The launches, all of eight warps."""

    warpgroups: int = 2

    dq_tile: ClassVar[tuple[int, int, int]] = (128, 64, 2)
    """BLOCK_M, BLOCK_N and warpgroups of the kernel that computes dQ alone: the launch table's up to head dim 128 on
    Hopper. Tiles of wider heads are too small for the warps to share, and refused."""

    def complaints(self) -> list[str]:
        """Tiles that the warps cannot share."""
        lines = []
        if self.BLOCK_N % (64 * self.warpgroups):
            lines.append(f"bwd_BLOCK_N = {self.BLOCK_N}, must give each of {4 * self.warpgroups} warps 16 keys")
        if self.BLOCK_M % 16:
            lines.append(f"bwd_BLOCK_M = {self.BLOCK_M}, must be a multiple of 16")
        return lines

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        before, main, after, *summed = super().kernels(problem)
        role = Role("warps", self.by_keys, self.warpgroups, registers=self.registers_by_keys)
        main = replace(main, roles=(role,), shared=self.memory_by_keys)
        if not self.deterministic:
            return (before, main, after, *summed)
        M, N, groups = self.dq_tile
        role = Role("warps", self.by_queries, groups, registers=self.registers_by_queries)
        by_query: dict[str, Any] = {"grid": Grid(), "BLOCK_M": M, "BLOCK_N": N}
        dq = replace(main, name="fa2_bwd_dq", roles=(role,), shared=self.memory_by_queries, **by_query)
        return (before, main, dq, *summed)

    def memory_by_keys(self, cta: CTA) -> Shared:
        M, N, d, dv = self.BLOCK_M, self.BLOCK_N, cta.head_dim, cta.head_dim_v
        return Shared(
            Q=cta.slot("Q", (M, d)),
            K=cta.slot("K", (N, d)),
            V=cta.slot("V", (N, dv)),
            dO=cta.slot("dO", (M, dv)),
            dS=cta.slot("dS", (N, M)),
            everybody=cta.sync("everybody", self.warpgroups),
        )

    def registers_by_keys(self, regs: Registers) -> Fragments:
        M, keys, d, dv, dtype = self.BLOCK_M, self.keys, regs.head_dim, regs.head_dim_v, regs.problem.dtype
        S, dP = regs.tile("S", (keys, M)), regs.tile("dP", (keys, M))
        return Fragments(
            S=S,
            P=regs.tile("P", (keys, M), dtype),
            dP=dP,
            dS=regs.tile("dS", (keys, M), dtype),
            dQ=regs.tile("dQ", (M, d // self.warpgroups), warps=(4, 1) if M >= 64 else (M // 16, 64 // M)),
            dK=regs.tile("dK", (keys, d)),
            dV=regs.tile("dV", (keys, dv)),
            LSE=regs.rows("LSE", M),
            D=regs.rows("D", M),
        )

    @property
    def keys(self) -> int:
        """Of a warpgroup."""
        return self.BLOCK_N // self.warpgroups

    def by_keys(self, wg: Warpgroup, s: Shared, r: Fragments) -> Program:
        """Algorithm 2, lines 5 to 18, for the keys of one warpgroup."""
        rows, columns = self.BLOCK_M // self.warpgroups, r.dQ.shape[1]
        keys, queries = (wg.index * self.keys, self.keys), (wg.index * rows, rows)

        def load(i: int) -> tuple[Awaitable, ...]:
            parts = ((tile.Q, s.Q), (tile.dO, s.dO))
            return tuple(wg.load(source(i).rows(*queries), into=into.rows(*queries)) for source, into in parts)

        for tile in wg.tiles():  # 5
            wg.map("fill", 0.0, into=r.dK)  # 7
            wg.map("fill", 0.0, into=r.dV)
            if tile.count:
                k = wg.load(tile.K.rows(*keys), into=s.K.rows(*keys))  # 6
                v = wg.load(tile.V.rows(*keys), into=s.V.rows(*keys))
                q, do = load(tile.first)
                yield k
                yield v
            for i in wg.q_tiles(tile):  # 8
                lse, D = wg.load(tile.LSE(i), into=r.LSE), wg.load(tile.D(i), into=r.D)  # 9
                yield q
                yield do
                yield s.everybody.wait()  # everyone's part of Q_i and dO_i is there
                yield wg.gemm(s.K.rows(*keys), s.Q.T, into=r.S)  # 10: S = Q K_j^T, transposed
                if tile.partial(i):
                    wg.map("mask", r.S.T, tile, i, 0, keys[0], into=r.S.T)
                yield lse
                wg.map("exp_lse", r.S.T, r.LSE, into=r.S.T)  # 11: P = exp(S - L)
                wg.convert(r.S, into=r.P)
                wg.gemm(r.P, s.dO, into=r.dV, accumulate=True)  # 12: dV += P^T dO_i, which ends before the next product
                # 13: dP = dO V_j^T, transposed
                yield wg.gemm(s.V.rows(*keys), s.dO.T, into=r.dP)  # equivalent: 12 and 13 have nothing in common
                yield D
                wg.map("sub", r.dP.T, r.D, into=r.dP.T)
                wg.map("mul", r.dP, r.S, into=r.dP)  # 14: dS = P o (dP - D)
                wg.convert(r.dP, into=r.dS)
                if not self.deterministic:
                    wg.convert(r.dP, into=s.dS.rows(*keys))
                    yield s.everybody.wait()  # all of dS is there
                    mine = (wg.index * columns, columns)
                    yield wg.gemm(s.dS.T, s.K.columns(*mine), into=r.dQ)  # 15: dQ_i += dS K_j
                    wg.atomic_add(r.dQ, into=tile.dQ_accum(i).columns(*mine))
                # 16: dK += dS^T Q_i
                yield wg.gemm(r.dS, s.Q, into=r.dK, accumulate=True)  # equivalent: dQ and dK have nothing in common
                yield s.everybody.wait()  # nobody reads Q_i, dO_i and dS any more
                if i < tile.last:
                    q, do = load(i + 1)
            wg.map("scale", r.dK, into=r.dK)
            grouped = wg.problem.heads_per_kv > 1
            wg.store(r.dK, into=(tile.dK_expanded if grouped else tile.dK).rows(*keys))  # 18
            wg.store(r.dV, into=(tile.dV_expanded if grouped else tile.dV).rows(*keys))

    def memory_by_queries(self, cta: CTA) -> Shared:
        M, N, groups = self.dq_tile
        d, dv = cta.head_dim, cta.head_dim_v
        return Shared(
            Q=cta.slot("Q", (M, d)),
            K=cta.slot("K", (N, d)),
            V=cta.slot("V", (N, dv)),
            dO=cta.slot("dO", (M, dv)),
            dS=cta.slot("nothing", (0, 0)),
            everybody=cta.sync("everybody", groups),
        )

    def registers_by_queries(self, regs: Registers) -> QueryFragments:
        M, N, groups = self.dq_tile
        rows = M // groups
        return QueryFragments(
            S=regs.tile("S", (rows, N)),
            dP=regs.tile("dP", (rows, N)),
            dS=regs.tile("dS", (rows, N), regs.problem.dtype),
            dQ=regs.tile("dQ", (rows, regs.head_dim)),
            LSE=regs.rows("LSE", rows),
            D=regs.rows("D", rows),
        )

    def by_queries(self, wg: Warpgroup, s: Shared, r: QueryFragments) -> Program:
        """Algorithm 2, lines 10, 11 and 13 to 15, for the queries of one warpgroup."""
        M, N, groups = self.dq_tile
        mine, my_keys = (wg.index * M // groups, M // groups), (wg.index * N // groups, N // groups)

        def load(j: int) -> tuple[Awaitable, ...]:
            parts = ((tile.K, s.K), (tile.V, s.V))
            return tuple(wg.load(source(j).rows(*my_keys), into=into.rows(*my_keys)) for source, into in parts)

        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r.dQ)
            given = [wg.load(getattr(tile, x).rows(*mine), into=getattr(s, x).rows(*mine)) for x in ("Q", "dO")]
            given += [wg.load(getattr(tile, x).rows(*mine), into=getattr(r, x)) for x in ("LSE", "D")]
            if tile.count:
                k, v = load(tile.first)
            yield from given
            for j in wg.kv_tiles(tile):
                yield k
                yield v
                yield s.everybody.wait()  # everyone's part of K_j and V_j is there
                yield wg.gemm(s.Q.rows(*mine), s.K.T, into=r.S)  # 10
                if tile.partial(j):
                    wg.map("mask", r.S, tile, j, into=r.S)
                wg.map("exp_lse", r.S, r.LSE, into=r.S)  # 11
                yield wg.gemm(s.dO.rows(*mine), s.V.T, into=r.dP)  # equivalent: 13 does not depend on 11
                wg.map("sub", r.dP, r.D, into=r.dP)
                wg.map("mul", r.dP, r.S, into=r.dP)  # 14
                wg.convert(r.dP, into=r.dS)
                yield wg.gemm(r.dS, s.K, into=r.dQ, accumulate=True)  # 15
                yield s.everybody.wait()  # nobody reads K_j and V_j any more
                if j < tile.last:
                    k, v = load(j + 1)
            wg.map("scale", r.dQ, into=r.dQ)
            wg.store(r.dQ, into=tile.dQ.rows(*mine))
