"""Standard attention, backward: what autograd runs for the forward pass of `standard`.

P~ is P after dropout. dP~ = dO V^T, dV = P~^T dO, dP = dP~ o keep / (1 - p), dS = P o (dP - rowsum(P o dP)),
dQ = scale dS K, dK = scale dS^T Q; then the gradients of the copies: permuted back, and summed over the query heads
that share a KV head.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Kernel
from flashsim.schedules.standard_passes import OF_SCORES, Passes, Piece, kernel
from flashsim.schedules.verbs import Program, Registers, Warpgroup

ROW_ELEMENTS = 8192
"""Elements of P, and of dP, that a CTA of the softmax kernel holds in its registers, unless one row has more."""


class StandardBackward:
    """The launches of the backward pass."""

    def kernels(self, p: AttentionProblem, make: Passes) -> tuple[Kernel, ...]:
        """Buffers: dP~ is in `work`. With dropout dP goes where P~ was, in S, and dS where dP~ was. dV is in V_heads,
        dK in K_heads, dQ in its own place and then in Q_heads, each of which holds nothing else by then."""
        d, dv, grouped = p.head_dim, p.head_dim_v, p.heads_per_kv > 1
        dropped, dP, dS = ("S", "S", "work") if p.dropout else ("P", "work", "dS")
        kernels = [make.scores("dP", "dO", "V_heads", "work", dv), make.by_keys("dV", dropped, "dO", "V_heads", dv)]
        if p.dropout:
            kernels.append(kernel("dropout_bwd", DropoutBackward(), ("work", "kept", "S"), **OF_SCORES))
        kernels.append(SoftmaxBackward(dP, dS).kernel(p))
        if p.mask_rule.by_batch:
            kernels += self.fill(make, dS)
        kernels += [
            make.by_queries("dQ", dS, "K_heads", "dQ", d),
            make.by_keys("dK", dS, "Q_heads", "K_heads", d),
            make.over_rows("scale_dQ", "dQ", "Q_heads", "queries", d, scaled=True),
            make.over_rows("scale_dK", "K_heads", "K_heads", "keys", d, scaled=True),
            make.over_rows("permute_dQ", "Q_heads", "dQ", "queries", d),
            make.over_rows("permute_dK", "K_heads", "K_repeated" if grouped else "dK", "keys", d),
            make.over_rows("permute_dV", "V_heads", "V_repeated" if grouped else "dV", "keys", dv),
        ]
        if grouped:
            kernels.append(make.sum_heads("sum_dK", "K_repeated", "dK", d))
            kernels.append(make.sum_heads("sum_dV", "V_repeated", "dV", dv))
        return tuple(kernels)

    def fill(self, make: Passes, dS: str) -> list[Kernel]:
        """The gradient of a fill in place: autograd takes the filled matrix for a part of another one, copies it in and
        out, and fills a copy (CopySlices in PyTorch; these are the kernels that it launches)."""
        return [
            make.over_scores("mask_bwd_zero", "S", "S", "zero"),
            make.over_scores("mask_bwd_copy", dS, "S", "copy"),
            make.over_scores("mask_bwd_base", "S", dS, "copy"),
            make.over_scores("mask_bwd_slice", dS, "P", "copy"),
            make.over_scores("mask_bwd_clone", "P", "S", "copy"),
            make.over_scores("mask_bwd_fill", "S", "S", "visit"),  # with 0, which dS, as P, has there already
            make.over_scores("mask_bwd_return", "S", dS, "copy"),
        ]


class DropoutBackward:
    """dP = dP~ o keep / (1 - p)."""

    def registers(self, regs: Registers) -> Piece:
        shape, dtype = (regs.kernel.BLOCK_M, regs.kernel.BLOCK_N), regs.problem.dtype
        kept = regs.tile("kept", shape, "e4m3")
        return Piece(regs.tile("dP", shape, dtype), kept, regs.rows("1 / (1 - p)", shape[0]))

    def program(self, wg: Warpgroup, s: None, r: Piece) -> Program:
        for tile in wg.tiles():
            wg.map("fill", 1 / (1 - wg.problem.dropout), into=r.row)
            for j in wg.kv_tiles(tile):
                kept = wg.load(tile.kept(j), into=r.b)
                dP = wg.load(tile.work(j), into=r.a)
                yield kept
                yield dP
                wg.map("mul", r.a, r.b, into=r.a)
                wg.map("mul", r.a, r.row, into=r.a)
                wg.store(r.a, into=tile.S(j))


@dataclass(frozen=True)
class SoftmaxBackward:
    """dS = P o (dP - rowsum(P o dP)): a CTA has whole rows, one KV tile wide."""

    dP: str
    dS: str

    def kernel(self, p: AttentionProblem) -> Kernel:
        width = -(-p.seqlen_k // 128) * 128
        height = max(1, min(64, ROW_ELEMENTS // width))
        return kernel("softmax_bwd", self, ("P", self.dP, self.dS), BLOCK_M=height, BLOCK_N=width)

    def registers(self, regs: Registers) -> Piece:
        shape = regs.kernel.BLOCK_M, regs.kernel.BLOCK_N
        dtype = "fp32" if shape[0] * shape[1] <= ROW_ELEMENTS else regs.problem.dtype
        return Piece(regs.tile("P", shape, dtype), regs.tile("dP", shape, dtype), regs.rows("sum", shape[0]))

    def program(self, wg: Warpgroup, s: None, r: Piece) -> Program:
        for tile in wg.tiles():
            for j in wg.kv_tiles(tile):
                p = wg.load(tile.P(j), into=r.a)
                dP = wg.load(getattr(tile, self.dP)(j), into=r.b)
                yield p
                yield dP
                wg.map("fill", 0.0, into=r.row)
                wg.map("mul", r.b, r.a, into=r.b)
                wg.reduce("sum", r.b, into=r.row)
                wg.map("mul", r.a, r.row, into=r.a)
                wg.map("sub", r.b, r.a, into=r.b)
                wg.store(r.b, into=getattr(tile, self.dS)(j))
