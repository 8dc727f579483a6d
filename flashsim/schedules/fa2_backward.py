"""FlashAttention-2, backward (Dao, arXiv 2307.08691, algorithm 2).

One CTA for each block of keys, an inner loop over the blocks of queries that see it. S is computed again and P follows
from the LSE that the forward pass has saved; five products a step. dK_j and dV_j stay in registers; dQ_i is summed
over CTAs by atomic additions to an fp32 buffer. A kernel before computes D = rowsum(dO o O) and clears that buffer, one
after converts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel, Role
from flashsim.schedules.tensors import Tensor
from flashsim.schedules.verbs import CTA, Awaitable, Operand, Order, Program, Registers, Sync, Warpgroup

WARPGROUPS = 2
OTHER_INSTRUCTIONS = 60
"""Per step, beside those of the verbs: as in the forward kernel."""
WORKSPACE = {
    "D": Tensor("queries", "one", "fp32"),
    "dQ_accum": Tensor("queries", "head_dim", "fp32"),
}
EXPANDED = {"dK_expanded": Tensor("keys", "head_dim"), "dV_expanded": Tensor("keys", "head_dim_v")}
"""With grouped heads, dK and dV of each query head, which a last kernel sums up (mha_bwd in csrc/flash_attn)."""


def tile_size(head_dim: int, architecture: str) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, buffers of Q) as csrc/flash_attn/src/flash_bwd_launch_template.h has them.

    Ada, with less shared memory, has smaller tiles and one buffer; Ampere keeps one at head dim 256.
    """
    small = architecture == "ada"
    if head_dim <= 64:
        return (64, 128, 1) if small and head_dim > 32 else (128, 128, 1 if small else 2)
    if head_dim <= 96:
        return 64, 128, 1 if small else 2
    if head_dim <= 128:
        return (64, 64, 1) if small else (64, 128, 2)
    if head_dim <= 192:
        return 64, 64, 1 if small else 2
    return 64, 64, 2 if architecture == "hopper" else 1


@dataclass
class Shared:
    """What the warpgroups of one CTA share."""

    Q: list[Operand]
    K: Operand
    V: Operand
    dO: Operand
    P: Operand
    dS: Operand
    everybody: Sync
    order: Order


@dataclass
class Fragments:
    """The register tiles of one warpgroup: half of the columns of each product."""

    S: Operand
    dP: Operand
    dQ: Operand
    dK: Operand
    dV: Operand
    LSE: Operand
    D: Operand


@dataclass
class Rows:
    """The register tiles of a kernel that works on rows: what it loads, and an fp32 tile of each width."""

    given: Operand
    also_given: Operand
    like_Q: Operand
    like_O: Operand
    sum: Operand


@dataclass(frozen=True)
class FA2Backward:
    """The launches of the backward pass; head dims are those of the tiles. `stages`: buffers of Q."""

    BLOCK_M: int
    BLOCK_N: int
    stages: int
    deterministic: bool
    head_dim: int
    head_dim_v: int
    mma: Literal["mma.sync", "wgmma"]

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        grouped = problem.heads_per_kv > 1
        common: dict[str, Any] = {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "mma": self.mma,
            "copy": "cp.async",
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "workspace": WORKSPACE | (EXPANDED if grouped else {}),
        }
        by_query, by_key, by_kv_head = Grid(), Grid(over="keys"), Grid(over="keys", heads="kv")
        main = Role("warps", self.program, WARPGROUPS, registers=self.registers)
        before = Role("warps", self.preprocess, WARPGROUPS, registers=self.query_rows)
        after = Role("warps", self.convert_dq, WARPGROUPS, registers=self.query_rows)
        summed = Role("warps", self.sum_heads, WARPGROUPS, registers=self.key_rows)
        kernels = (
            Kernel("fa2_bwd_preprocess", (before,), no_memory, by_query, walk="none", **common),
            Kernel("fa2_bwd", (main,), self.shared, by_key, overhead_instructions=OTHER_INSTRUCTIONS, **common),
            Kernel("fa2_bwd_convert_dq", (after,), no_memory, by_query, walk="none", **common),
        )
        if not grouped:
            return kernels
        return (*kernels, Kernel("fa2_bwd_sum_heads", (summed,), no_memory, by_kv_head, walk="none", **common))

    # D = rowsum(dO o O), dQ = 0

    def query_rows(self, regs: Registers) -> Rows:
        return rows_of(regs, self.BLOCK_M // WARPGROUPS)

    def preprocess(self, wg: Warpgroup, s: None, r: Rows) -> Program:
        """Line 4. Each warpgroup has half of the rows."""
        mine = (wg.index * self.BLOCK_M // WARPGROUPS, self.BLOCK_M // WARPGROUPS)
        for tile in wg.tiles():
            o = wg.load(tile.O.rows(*mine), into=r.given)
            do = wg.load(tile.dO.rows(*mine), into=r.also_given)
            yield o
            yield do
            wg.map("mul", r.given, r.also_given, into=r.like_O)
            wg.map("fill", 0.0, into=r.sum)
            wg.reduce("sum", r.like_O, into=r.sum)
            wg.store(r.sum, into=tile.D.rows(*mine))
            wg.map("fill", 0.0, into=r.like_Q)
            wg.store(r.like_Q, into=tile.dQ_accum.rows(*mine))

    # The five products

    def shared(self, cta: CTA) -> Shared:
        M, N, d, dv = self.BLOCK_M, self.BLOCK_N, cta.head_dim, cta.head_dim_v
        return Shared(
            Q=[cta.slot(f"Q[{n}]", (M, d)) for n in range(self.stages)],
            K=cta.slot("K", (N, d)),
            V=cta.slot("V", (N, dv)),
            dO=cta.slot("dO", (M, dv)),
            P=cta.slot("P", (M, N)),
            dS=cta.slot("dS", (M, N)),
            everybody=cta.sync("everybody", WARPGROUPS),
            order=cta.order("dQ", WARPGROUPS),
        )

    def registers(self, regs: Registers) -> Fragments:
        M, N, d, dv = self.BLOCK_M, self.BLOCK_N, regs.head_dim, regs.head_dim_v
        # How the warps of a warpgroup share rows and columns: AtomLayoutMSdP, NdKV and MdQ of the code's tiles.
        square, wide = (4, 1), (2, 2)
        over_S = wide if M < N else square
        over_dKV = square if N >= 128 else wide
        over_dQ = square if d <= 96 else wide
        dP = regs.tile("dP", (M, N // WARPGROUPS), warps=over_S)
        return Fragments(
            S=regs.tile("S", (M, N // WARPGROUPS), warps=over_S),
            dP=dP,
            dQ=regs.tile("dQ", (M, d // WARPGROUPS), warps=over_dQ, over=dP),
            dK=regs.tile("dK", (N, d // WARPGROUPS), warps=over_dKV),
            dV=regs.tile("dV", (N, dv // WARPGROUPS), warps=over_dKV),
            LSE=regs.rows("LSE", M),
            D=regs.rows("D", M),
        )

    def program(self, wg: Warpgroup, s: Shared, r: Fragments) -> Program:
        """Algorithm 2, lines 5 to 22. Each warpgroup loads half of the rows and computes half of the columns."""

        def half(size: int) -> tuple[int, int]:
            return wg.index * size // WARPGROUPS, size // WARPGROUPS

        def load(source: Operand, into: Operand) -> Awaitable:
            return wg.load(source.rows(*half(source.shape[0])), into=into.rows(*half(source.shape[0])))

        def mine(operand: Operand) -> Operand:
            return operand.columns(*half(operand.shape[1]))

        for tile in wg.tiles():  # 5
            wg.map("fill", 0.0, into=r.dK)  # 7
            wg.map("fill", 0.0, into=r.dV)
            if tile.count:
                i = tile.first
                kv = load(tile.K, s.K), load(tile.V, s.V)  # 6
                q, do = load(tile.Q(i), s.Q[i % self.stages]), load(tile.dO(i), s.dO)  # 9
                lse = wg.load(tile.LSE(i), into=r.LSE)
                yield kv[0]
                yield kv[1]
            for i in wg.q_tiles(tile):  # 8
                Q, more = s.Q[i % self.stages], i < tile.last
                place = tile, i, 0, half(self.BLOCK_N)[0]
                D = wg.load(tile.D(i), into=r.D)
                yield q
                yield do
                yield s.everybody.wait()  # everyone's part of Q_i and dO_i is there
                yield wg.gemm(Q, mine(s.K.T), into=r.S)  # 10: S = Q K_j^T
                if tile.partial(i):
                    wg.map("mask", r.S, *place, into=r.S)
                yield lse
                wg.map("exp_lse", r.S, r.LSE, into=r.S)  # 11: P = exp(S - L)
                if wg.problem.dropout:
                    wg.map("dropout", r.S, *place, into=r.dP)
                wg.convert(r.dP if wg.problem.dropout else r.S, into=mine(s.P))
                yield wg.gemm(s.dO, mine(s.V.T), into=r.dP)  # 13: dP = dO V_j^T
                if wg.problem.dropout:  # the same bits, which the code keeps in the signs of P
                    wg.map("dropout", r.dP, *place, into=r.dP)
                yield D
                wg.map("sub", r.dP, r.D, into=r.dP)
                wg.map("mul", r.dP, r.S, into=r.dP)  # 14: dS = P o (dP - D)
                if more and self.stages > 1:
                    q = load(tile.Q(i + 1), s.Q[(i + 1) % self.stages])
                wg.convert(r.dP, into=mine(s.dS))
                yield s.everybody.wait()  # all of P and dS is there
                yield wg.gemm(s.P.T, mine(s.dO), into=r.dV, accumulate=True)  # 12: dV += P^T dO_i
                yield s.everybody.wait()  # nobody reads dO_i any more
                if more:
                    do = load(tile.dO(i + 1), s.dO)
                    lse = wg.load(tile.LSE(i + 1), into=r.LSE)
                yield wg.gemm(s.dS, mine(s.K), into=r.dQ)  # 15: dQ_i += dS K_j
                if self.deterministic:
                    yield s.order.turn(tile, i)  # after the blocks of keys before this one
                wg.atomic_add(r.dQ, into=mine(tile.dQ_accum(i)))
                if self.deterministic:
                    s.order.pass_on(tile, i)
                yield wg.gemm(s.dS.T, mine(Q), into=r.dK, accumulate=True)  # 16: dK += dS^T Q_i
                if more and self.stages == 1:
                    yield s.everybody.wait()  # nobody reads Q_i any more
                    q = load(tile.Q(i + 1), s.Q[0])
            wg.map("scale", r.dK, into=r.dK)
            grouped = wg.problem.heads_per_kv > 1
            wg.store(r.dK, into=mine(tile.dK_expanded if grouped else tile.dK))  # 18
            wg.store(r.dV, into=mine(tile.dV_expanded if grouped else tile.dV))

    # dQ = scale dQ_accum, and dK and dV of the heads of a group together

    def convert_dq(self, wg: Warpgroup, s: None, r: Rows) -> Program:
        mine = (wg.index * self.BLOCK_M // WARPGROUPS, self.BLOCK_M // WARPGROUPS)
        for tile in wg.tiles():
            yield wg.load(tile.dQ_accum.rows(*mine), into=r.like_Q)
            wg.map("scale", r.like_Q, into=r.like_Q)
            wg.store(r.like_Q, into=tile.dQ.rows(*mine))

    def key_rows(self, regs: Registers) -> Rows:
        return rows_of(regs, self.BLOCK_N // WARPGROUPS)

    def sum_heads(self, wg: Warpgroup, s: None, r: Rows) -> Program:
        mine = (wg.index * self.BLOCK_N // WARPGROUPS, self.BLOCK_N // WARPGROUPS)
        for tile in wg.tiles():
            for each, part, sum, total in (
                (tile.dK_expanded, r.given, r.like_Q, tile.dK),
                (tile.dV_expanded, r.also_given, r.like_O, tile.dV),
            ):
                wg.map("fill", 0.0, into=sum)
                for head in range(wg.problem.heads_per_kv):
                    yield wg.load(each(head).rows(*mine), into=part)
                    wg.map("add", sum, part, into=sum)
                wg.store(sum, into=total.rows(*mine))


def no_memory(cta: CTA) -> None:
    """Declares nothing: the kernel has registers only."""


def rows_of(regs: Registers, rows: int) -> Rows:
    d, dv, dtype = regs.head_dim, regs.head_dim_v, regs.problem.dtype
    by_query = regs.kernel.grid.over == "queries"
    given = regs.tile("given", (rows, dv if by_query else d), dtype)
    also_given = regs.tile("also given", (rows, dv), dtype)
    like_Q, like_O = regs.tile("like Q", (rows, d)), regs.tile("like O", (rows, dv))
    return Rows(given, also_given, like_Q, like_O, regs.rows("sum", rows))
