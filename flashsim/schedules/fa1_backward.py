"""FlashAttention-1, backward (Dao et al., arXiv 2205.14135, algorithm 4).

One CTA for each head of each batch entry. dK_j and dV_j stay in registers while an inner loop over the blocks of
queries computes S and P again; dQ_i goes through HBM at every step, without atomic additions, since nobody else works
on the head. The warps split the keys, so that each has a part of dQ_i, which they sum up through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from flashsim.problem import AttentionProblem, kv_tiles, num_k_tiles, num_q_tiles
from flashsim.schedules.base import Grid, Kernel, Role
from flashsim.schedules.fa2_backward import EXPANDED
from flashsim.schedules.tensors import Tensor
from flashsim.schedules.verbs import CTA, Awaitable, Operand, Program, Registers, Sync, Warpgroup, WorkTile

WARPS = 8
EXCHANGE_BYTE = 32 * 1024
"""Shared memory in which the warps' parts of O or dQ lie; some of their columns at a time if it is too small for all.
Chosen: so the tiles of both builds fit the registers and the shared memory of every architecture."""
OTHER_INSTRUCTIONS = 60
"""Of a warp per step, beside those of the verbs: as in the forward kernel."""
ROWS_AT_ONCE = 64
"""Of a tile of the kernels that only prepare or convert rows. Chosen."""
DQ_TMP = {"dQ_tmp": Tensor("queries", "head_dim", "fp32"), "D": Tensor("queries", "one", "fp32")}


@lru_cache(maxsize=16)
def begins_alike(problem: AttentionProblem, BLOCK_M: int, BLOCK_N: int) -> bool:
    """Whether every block of queries sees the first block of keys that any of them sees."""
    for batch in range(problem.batch if problem.mask_rule.by_batch else 1):
        blocks = [kv_tiles(problem, m, BLOCK_M, BLOCK_N, batch).blocks for m in range(num_q_tiles(problem, BLOCK_M))]
        firsts = {min(b[0], b[-1]) if isinstance(b, range) else min(b) for b in blocks if b}
        if len(firsts) != 1 or not all(blocks):
            return False
    return True


def share(warp: int, warps: int, size: int) -> tuple[int, int]:
    """(first, number) of the rows, or of the keys, that a warp has."""
    return warp * size // warps, size // warps


def parts_of(width: int, warps: int, rows: int) -> list[tuple[int, int]]:
    """(first column, columns) of the parts in which the warps sum up their tiles of `rows` x `width`."""
    parts = -(-warps * rows * width * 4 // EXCHANGE_BYTE)
    each = -(-width // parts // 8) * 8
    return [(start, min(each, width - start)) for start in range(0, width, each)]


def no_memory(cta: CTA) -> None:
    """Declares nothing: the kernel has registers only."""


@dataclass
class Shared:
    """What the warps of one CTA share: of P, and of dS in its place, each has its columns, of `dQ` a tile."""

    Q: list[Operand]
    dO: list[Operand]
    K: Operand
    V: Operand
    P: Operand
    LSE: Operand
    D: Operand
    dQ: list[Operand]
    everybody: Sync


@dataclass
class Fragments:
    """The register tiles of one warp: what it computes of all rows with its keys, then of its rows alone."""

    K: Operand
    S: Operand
    Z: Operand
    dP: Operand
    dS: Operand
    dQ_part: Operand
    dK: Operand
    dV: Operand
    LSE: Operand
    D: Operand
    dQ: Operand
    O: Operand  # noqa: E741 - the paper's name
    OdO: Operand
    my_LSE: Operand
    my_D: Operand


@dataclass
class Rows:
    """The register tiles of the kernels before and after: rows like those of Q or K and of O or V, as they come from
    HBM and to compute in."""

    Q: Operand
    dQ: Operand
    O: Operand  # noqa: E741 - the paper's name
    dO: Operand
    D: Operand


@dataclass(frozen=True)
class FA1Backward:
    """The launches of the backward pass; head dims are those of the tiles."""

    BLOCK_M: int
    BLOCK_N: int
    build: str
    head_dim: int
    head_dim_v: int

    def through(self, problem: AttentionProblem) -> str:
        """The tensor in which dQ_i goes through HBM; the code's is dQ itself where there is one block of keys."""
        return "dQ" if self.build == "paper" or num_k_tiles(problem, self.BLOCK_N) == 1 else "dQ_tmp"

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        """As in the forward pass: what some queries find at their first step has been put there by a kernel before, and
        a kernel after converts dQ_tmp, where the code's last step writes dQ."""
        through, grouped = self.through(problem), problem.heads_per_kv > 1
        prepared = self.build == "paper" or not begins_alike(problem, self.BLOCK_M, self.BLOCK_N)
        common: dict[str, Any] = {
            "mma": "mma.sync",
            "copy": "cp.async",
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "workspace": (DQ_TMP if through == "dQ_tmp" else {}) | (EXPANDED if grouped else {}),
        }
        by_rows: dict[str, Any] = {"BLOCK_M": ROWS_AT_ONCE, "BLOCK_N": ROWS_AT_ONCE, "walk": "none", **common}
        before = Role("warps", partial(self.prepare, through=through), registers=rows_of)
        main = Role("warps", partial(self.program, prepared=prepared), WARPS, warps=1, registers=self.registers)
        after = Role("warps", self.convert_dq, registers=rows_of)
        summed = Role("warps", self.sum_heads, registers=rows_of)
        kernels = (
            (prepared, Kernel("fa1_bwd_prepare", (before,), no_memory, Grid(), **by_rows)),
            (
                True,
                Kernel(
                    "fa1_bwd",
                    (main,),
                    self.shared,
                    Grid(over="keys", launch="head"),
                    self.BLOCK_M,
                    self.BLOCK_N,
                    overhead_instructions=OTHER_INSTRUCTIONS,
                    **common,
                ),
            ),
            (through == "dQ_tmp", Kernel("fa1_bwd_convert_dq", (after,), no_memory, Grid(), **by_rows)),
            (grouped, Kernel("fa1_bwd_sum_heads", (summed,), no_memory, Grid(over="keys", heads="kv"), **by_rows)),
        )
        return tuple(kernel for needed, kernel in kernels if needed)

    def shared(self, cta: CTA) -> Shared:
        M, N, d, dv = self.BLOCK_M, self.BLOCK_N, cta.head_dim, cta.head_dim_v
        _, width = parts_of(d, WARPS, M)[0]
        return Shared(
            Q=[cta.slot(f"Q[{n}]", (M, d)) for n in range(2)],
            dO=[cta.slot(f"dO[{n}]", (M, dv)) for n in range(2)],
            K=cta.slot("K", (N, d)),
            V=cta.slot("V", (N, dv)),
            P=cta.slot("P", (M, N)),
            LSE=cta.slot("LSE", (M, 1), "fp32"),
            D=cta.slot("D", (M, 1), "fp32"),
            dQ=[cta.slot(f"dQ[{n}]", (M, width), "fp32") for n in range(WARPS)],
            everybody=cta.sync("everybody", WARPS),
        )

    def registers(self, regs: Registers) -> Fragments:
        M, n, d, dv, dtype = self.BLOCK_M, self.BLOCK_N // WARPS, regs.head_dim, regs.head_dim_v, regs.problem.dtype
        _, width = parts_of(d, WARPS, M)[0]
        mine = M // WARPS
        S, dP = regs.tile("S", (M, n)), regs.tile("dP", (M, n))
        dQ = regs.tile("dQ", (mine, d))
        return Fragments(
            K=regs.tile("K", (n, d), dtype) if self.build != "paper" else S,
            S=S,
            Z=regs.tile("Z", (M, n)) if regs.problem.dropout else S,
            dP=dP,
            dS=regs.tile("dS", (M, n), dtype, over=S),
            dQ_part=regs.tile("dQ_part", (M, width), over=dP),
            dK=regs.tile("dK", (n, d)),
            dV=regs.tile("dV", (n, dv)),
            LSE=regs.rows("LSE", M),
            D=regs.rows("D", M),
            dQ=dQ,
            O=regs.tile("O", (mine, dv), dtype),
            OdO=regs.tile("OdO", (mine, dv), over=dQ),
            my_LSE=regs.rows("my_LSE", mine),
            my_D=regs.rows("my_D", mine),
        )

    def load(self, wg: Warpgroup, tile: WorkTile, i: int, s: Shared, r: Fragments, has_D: bool) -> list[Awaitable]:
        """Line 10: this warp's rows of Q_i, dO_i and L_i, and of D_i or what it follows from."""
        rows = share(wg.index, WARPS, self.BLOCK_M)
        return [
            wg.load(tile.Q(i).rows(*rows), into=s.Q[i % 2].rows(*rows)),
            wg.load(tile.dO(i).rows(*rows), into=s.dO[i % 2].rows(*rows)),
            wg.load(tile.LSE(i).rows(*rows), into=r.my_LSE),
            wg.load(tile.D(i).rows(*rows), into=r.my_D) if has_D else wg.load(tile.O(i).rows(*rows), into=r.O),
        ]

    def program(self, wg: Warpgroup, s: Shared, r: Fragments, prepared: bool) -> Program:
        """Algorithm 4, one warp: N / 8 of the keys, and M / 8 of the rows to load, to sum up and to store.

        P follows from L = m + log l, which the forward pass has saved. Where the code's dQ goes through dQ_tmp, its
        first block of keys, or the kernel before, also saves D for the others.
        """
        p, w = wg.problem, wg.index
        rows, keys = share(w, WARPS, self.BLOCK_M), share(w, WARPS, self.BLOCK_N)
        K, V, P = s.K.rows(*keys), s.V.rows(*keys), s.P.columns(*keys)
        parts = parts_of(K.shape[1], WARPS, self.BLOCK_M)
        through = self.through(p)
        for tile in wg.tiles():  # 6: K_j, V_j
            dQ = getattr(tile, through)
            seen = prepared or tile.index > 0
            has_D = seen and through == "dQ_tmp"
            wg.map("fill", 0.0, into=r.dK)  # 8
            wg.map("fill", 0.0, into=r.dV)

            if tile.count:
                k, v = wg.load(tile.K.rows(*keys), into=K), wg.load(tile.V.rows(*keys), into=V)  # 7
                loads = self.load(wg, tile, tile.first, s, r, has_D)
                yield k
                yield v
                if self.build != "paper":
                    wg.convert(K, into=r.K)
            for i in wg.q_tiles(tile):  # 9: Q_i
                Q, dO = s.Q[i % 2], s.dO[i % 2]
                yield from loads  # 10
                if not has_D:
                    wg.map("mul", r.O, dO.rows(*rows), into=r.OdO)
                    wg.map("fill", 0.0, into=r.my_D)
                    wg.reduce("sum", r.OdO, into=r.my_D)  # 19: D_i = rowsum(dO_i o O_i)
                    if through == "dQ_tmp":
                        wg.store(r.my_D, into=tile.D(i).rows(*rows))
                wg.convert(r.my_D, into=s.D.rows(*rows))
                wg.convert(r.my_LSE, into=s.LSE.rows(*rows))
                yield s.everybody.wait()  # all of Q_i, dO_i, D_i and L_i is there
                if i < tile.last:
                    loads = self.load(wg, tile, i + 1, s, r, has_D)
                if seen:
                    dq = wg.load(dQ(i).rows(*rows), into=r.dQ)
                yield wg.gemm(Q, (K if self.build == "paper" else r.K).T, into=r.S)  # 11: S = Q_i K_j^T
                if self.build != "paper" or tile.partial(i):  # the code masks always
                    wg.map("mask", r.S, tile, i, 0, keys[0], into=r.S)  # 12
                wg.convert(s.LSE, into=r.LSE)
                wg.convert(s.D, into=r.D)
                wg.map("exp_lse", r.S, r.LSE, into=r.S)  # 13: P = exp(S - L_i)
                if p.dropout:
                    wg.map("fill", 1.0, into=r.Z)
                    wg.map("dropout", r.Z, tile, i, 0, keys[0], into=r.Z)  # 14
                    wg.map("mul", r.S, r.Z, into=r.dP)  # 15
                wg.convert(r.dP if p.dropout else r.S, into=P)
                yield wg.gemm(P.T, dO, into=r.dV, accumulate=True)  # 16: dV_j += P^T dO_i
                yield wg.gemm(dO, V.T, into=r.dP)  # 17: dP = dO_i V_j^T
                if p.dropout:
                    wg.map("mul", r.dP, r.Z, into=r.dP)  # 18
                wg.map("sub", r.dP, r.D, into=r.dP)
                wg.map("mul", r.dP, r.S, into=r.dP)  # 20: dS = P o (dP - D_i)
                wg.convert(r.dP, into=P)
                wg.convert(r.dP, into=r.dS)
                yield wg.gemm(P.T, Q, into=r.dK, accumulate=True)  # 22: dK_j += dS^T Q_i
                for start, columns in parts:
                    part, mine = r.dQ_part.columns(0, columns), r.dQ.columns(start, columns)
                    yield wg.gemm(r.dS, K.columns(start, columns), into=part)  # 21: dS K_j, of its keys
                    if self.build == "paper":
                        wg.map("scale", part, into=part)
                    wg.convert(part, into=s.dQ[w].columns(0, columns))
                    yield s.everybody.wait()  # all of dS K_j is there
                    if start == 0 and seen:
                        yield dq
                    elif start == 0:
                        wg.map("fill", 0.0, into=r.dQ)
                    for other in s.dQ:
                        wg.map("add", mine, other.rows(*rows).columns(0, columns), into=mine)
                    if (start, columns) != parts[-1]:
                        yield s.everybody.wait()  # nobody reads this part any more
                if self.build != "paper" and through == "dQ":
                    wg.map("scale", r.dQ, into=r.dQ)
                wg.store(r.dQ, into=dQ(i).rows(*rows))  # 21: dQ_i += dS K_j
            wg.map("scale", r.dK, into=r.dK)
            grouped = p.heads_per_kv > 1
            wg.store(r.dK, into=(tile.dK_expanded if grouped else tile.dK).rows(*keys))  # 24
            wg.store(r.dV, into=(tile.dV_expanded if grouped else tile.dV).rows(*keys))

    # dQ = 0 and D before; dQ = dQ_tmp, and dK and dV of the heads of a group together, after

    def prepare(self, wg: Warpgroup, s: None, r: Rows, through: str) -> Program:
        """Line 5."""
        for tile in wg.tiles():
            if through == "dQ_tmp":
                yield from (wg.load(tile.O, into=r.O), wg.load(tile.dO, into=r.dO))
                wg.map("mul", r.dO, r.O, into=r.dO)
                wg.map("fill", 0.0, into=r.D)
                wg.reduce("sum", r.dO, into=r.D)
                wg.store(r.D, into=tile.D)
            wg.map("fill", 0.0, into=r.dQ)
            yield wg.store(r.dQ, into=getattr(tile, through))

    def convert_dq(self, wg: Warpgroup, s: None, r: Rows) -> Program:
        for tile in wg.tiles():
            yield wg.load(tile.dQ_tmp, into=r.dQ)
            wg.map("scale", r.dQ, into=r.dQ)
            wg.store(r.dQ, into=tile.dQ)

    def sum_heads(self, wg: Warpgroup, s: None, r: Rows) -> Program:
        for tile in wg.tiles():
            for each, of_head, summed, total in (
                (tile.dK_expanded, r.Q, r.dQ, tile.dK),
                (tile.dV_expanded, r.O, r.dO, tile.dV),
            ):
                wg.map("fill", 0.0, into=summed)
                for head in range(wg.problem.heads_per_kv):
                    yield wg.load(each(head), into=of_head)
                    wg.map("add", summed, of_head, into=summed)
                wg.store(summed, into=total)


def rows_of(regs: Registers) -> Rows:
    """Declares the tiles of a kernel that works on rows."""
    n, d, dv, dtype = ROWS_AT_ONCE, regs.head_dim, regs.head_dim_v, regs.problem.dtype
    return Rows(
        Q=regs.tile("Q", (n, d), dtype),
        dQ=regs.tile("dQ", (n, d)),
        O=regs.tile("O", (n, dv), dtype),
        dO=regs.tile("dO", (n, dv)),
        D=regs.rows("D", n),
    )
