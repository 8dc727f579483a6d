"""Standard attention, backward: what autograd runs for the forward pass of `standard`.

P~ is P after dropout. dP~ = dO V^T, dV = P~^T dO, dP = dP~ o keep / (1 - p), dS = P o (dP - rowsum(P o dP)),
dQ = scale dS K, dK = scale dS^T Q, and the gradients of the copies: permuted back, and summed over the query heads that
share a KV head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel
from flashsim.schedules.standard_passes import (
    OF_SCORES,
    PIECE,
    Multiply,
    OverRows,
    OverScores,
    Piece,
    kernel,
)
from flashsim.schedules.verbs import Operand, Program, Registers, Warpgroup

ROW_ELEMENTS = 8192
"""Elements of P, and of dP, that a CTA of the softmax kernel holds in its registers, unless one row has more."""
FILL = (
    OverScores("mask_bwd_zero", "zero", "work", "work"),
    OverScores("mask_bwd_copy", "copy", "dS", "work"),
    OverScores("mask_bwd_slice", "copy", "work", "S"),
    OverScores("mask_bwd_clone", "copy", "S", "P"),
    OverScores("mask_bwd_clone_again", "copy", "P", "work"),
    OverScores("mask_bwd_fill", "visit", "work", "work"),  # 0 where the mask is; dS, as P, is 0 there already
    OverScores("mask_bwd_return", "copy", "work", "S"),
)
"""The gradient of a fill in place: autograd takes S for a part of a larger tensor and copies it in and out (CopySlices
in PyTorch; the kernels are those that its profiler lists)."""


@dataclass(frozen=True)
class StandardBackward:
    """The launches of the backward pass; the tile is that of the products."""

    BLOCK_M: int
    BLOCK_N: int
    mma: Literal["mma.sync", "wgmma"]

    def kernels(self, p: AttentionProblem) -> tuple[Kernel, ...]:
        """Buffers: dP~ in `work`; dP there, too, or in S, which P~ leaves; dV in V_heads, dK in K_heads, dQ in its own
        place and then in Q_heads, which hold what is dead by then."""
        d, dv, grouped, tile = p.head_dim, p.head_dim_v, p.heads_per_kv > 1, (self.BLOCK_M, self.BLOCK_N, self.mma)
        filled = p.mask_rule.by_batch
        dS = "S" if filled else "dS"
        key, value = ("K_repeated", "V_repeated") if grouped else ("dK", "dV")
        steps: tuple[Any, ...] = (
            Multiply("dP", "scores", "dO", "V_heads", "work", dv, *tile),
            Multiply("dV", "keys", "S" if p.dropout else "P", "dO", "V_heads", dv, *tile),
            *([DropoutBackward()] if p.dropout else []),
            SoftmaxBackward("S" if p.dropout else "work"),
            *(FILL if filled else ()),
            Multiply("dQ", "queries", dS, "K_heads", "dQ", d, *tile),
            Multiply("dK", "keys", dS, "Q_heads", "K_heads", d, *tile),
            OverRows("scale_dQ", "scale", "dQ", "Q_heads", "queries", d),
            OverRows("scale_dK", "scale", "K_heads", "K_heads", "keys", d),
            OverRows("permute_dQ", "copy", "Q_heads", "dQ", "queries", d),
            OverRows("permute_dK", "copy", "K_heads", key, "keys", d),
            OverRows("permute_dV", "copy", "V_heads", value, "keys", dv),
            *((SumHeads("sum_dK", "K_repeated", "dK", d), SumHeads("sum_dV", "V_repeated", "dV", dv)) if grouped else ()),
        )
        return tuple(step.kernel(p) for step in steps)


@dataclass(frozen=True)
class DropoutBackward:
    """dP = dP~ o keep / (1 - p)."""

    def kernel(self, p: AttentionProblem) -> Kernel:
        return kernel("dropout_bwd", self, ("work", "kept", "S"), **OF_SCORES)

    def registers(self, regs: Registers) -> Piece:
        shape = regs.kernel.BLOCK_M, regs.kernel.BLOCK_N
        dtype = regs.problem.dtype
        return Piece(regs.tile("dP", shape, dtype), regs.tile("kept", shape, "e4m3"), regs.rows("1 / (1 - p)", shape[0]))

    def program(self, wg: Warpgroup, s: None, r: Piece) -> Program:
        for tile in wg.tiles():
            wg.map("fill", 1 / (1 - wg.problem.dropout), into=r.row)
            for j in wg.kv_tiles(tile):
                kept = wg.load(tile.kept(j), into=r.b)
                yield wg.load(tile.work(j), into=r.a)
                yield kept
                wg.map("mul", r.a, r.b, into=r.a)
                wg.map("mul", r.a, r.row, into=r.a)
                wg.store(r.a, into=tile.S(j))


@dataclass(frozen=True)
class SoftmaxBackward:
    """dS = P o (dP - rowsum(P o dP)), of whole rows."""

    dP: str

    def kernel(self, p: AttentionProblem) -> Kernel:
        width = -(-p.seqlen_k // 128) * 128
        height = max(1, min(64, ROW_ELEMENTS // width))
        return kernel("softmax_bwd", self, ("P", self.dP, "dS"), BLOCK_M=height, BLOCK_N=width)

    def registers(self, regs: Registers) -> Piece:
        shape = regs.kernel.BLOCK_M, regs.kernel.BLOCK_N
        dtype = "fp32" if shape[0] * shape[1] <= ROW_ELEMENTS else regs.problem.dtype
        return Piece(regs.tile("P", shape, dtype), regs.tile("dP", shape, dtype), regs.rows("sum", shape[0]))

    def program(self, wg: Warpgroup, s: None, r: Piece) -> Program:
        for tile in wg.tiles():
            for j in wg.kv_tiles(tile):
                p = wg.load(tile.P(j), into=r.a)
                yield wg.load(getattr(tile, self.dP)(j), into=r.b)
                yield p
                wg.map("fill", 0.0, into=r.row)
                wg.map("mul", r.b, r.a, into=r.b)
                wg.reduce("sum", r.b, into=r.row)
                wg.map("mul", r.a, r.row, into=r.a)
                wg.map("sub", r.b, r.a, into=r.b)
                wg.store(r.b, into=tile.dS(j))


@dataclass
class Sum:
    """The register tiles of a sum over heads."""

    each: Operand
    total: Operand


@dataclass(frozen=True)
class SumHeads:
    """The gradient of repeated rows: that of all query heads that share a KV head."""

    name: str
    source: str
    into: str
    width: int

    def kernel(self, p: AttentionProblem) -> Kernel:
        grid, tile = Grid(over="keys", heads="kv"), {"BLOCK_M": p.seqlen_q, "BLOCK_N": PIECE // self.width}
        return kernel(self.name, self, (self.source,), grid=grid, walk="none", **tile)

    def registers(self, regs: Registers) -> Sum:
        shape = PIECE // self.width, self.width
        return Sum(regs.tile("each", shape, regs.problem.dtype), regs.tile("total", shape))

    def program(self, wg: Warpgroup, s: None, r: Sum) -> Program:
        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r.total)
            for head in range(wg.problem.heads_per_kv):
                yield wg.load(getattr(tile, self.source)(head), into=r.each)
                wg.map("add", r.total, r.each, into=r.total)
            wg.store(r.total, into=getattr(tile, self.into))
