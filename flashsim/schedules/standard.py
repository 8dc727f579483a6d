"""Standard attention: what FlashAttention replaced, as a framework runs it; `standard_backward` has the backward pass.

S and P go through HBM between separate kernels (algorithm 0 of the FlashAttention paper, arXiv 2205.14135): a copy of
each of Q, K and V in which a head's rows follow each other, S = scale Q K^T, a pass for a mask, a softmax over rows,
one for dropout, O = P V. Keys and values that query heads share are repeated for them first (repeat_interleave).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Kernel, Schedule, switch
from flashsim.schedules.launch import PUBLISHED, launch_parameters
from flashsim.schedules.softmax import Statistics, finish, online_softmax, start
from flashsim.schedules.standard_backward import StandardBackward
from flashsim.schedules.standard_passes import OF_SCORES, Passes, Piece, kernel
from flashsim.schedules.verbs import Operand, Program, Registers, Warpgroup

ROW_ELEMENTS = 16384
"""Scores that a CTA of the softmax kernel holds in its registers, 128 in each thread, unless one row has more."""


@dataclass(frozen=True)
class Standard(Schedule):
    """Standard attention, fp16 and bf16, as a framework runs it."""

    title = "standard attention: S and P through HBM, one kernel for each step"
    stores_scores = True
    source = "arXiv 2205.14135, algorithm 0; attention_pytorch in the FlashAttention repository's benchmarks"
    directions = ("fwd", "bwd", "fwd+bwd")
    dropout = True
    passes: ClassVar[type[Passes]] = Passes
    backward: ClassVar[type[StandardBackward]] = StandardBackward

    impl: str = switch(
        PUBLISHED, "whose kernels; triton: the three of kernels/standard.py, with their tiles", (PUBLISHED, "triton")
    )
    mma: str = switch(None, "instruction of the products", ("mma.sync", "wgmma"))

    def defaults(self, problem: AttentionProblem, architecture: str) -> dict[str, Any]:
        tile = {"BLOCK_M": 128, "BLOCK_N": 128}
        if self.impl == "triton":
            row = launch_parameters(self.impl, "standard_scores", problem, architecture)
            tile = {name: row[name] for name in tile}
        return {**tile, "mma": "wgmma" if architecture == "hopper" else "mma.sync"}

    def complaints(self, problem: AttentionProblem) -> list[str]:
        ours = self.impl != PUBLISHED and (problem.dropout or "bwd" in problem.passes)
        lines = ["impl = triton is a forward pass without dropout; gradients come from fa2"] if ours else []
        return lines + [
            f"{name} = {value}, allowed are 64 and 128: rows and columns of a product's tile"
            for name, value in (("BLOCK_M", self.BLOCK_M), ("BLOCK_N", self.BLOCK_N))
            if value not in (64, 128)
        ]

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        make = self.passes(problem, self.BLOCK_M, self.BLOCK_N, "wgmma" if self.mma == "wgmma" else "mma.sync")
        launches = {"fwd": self.forward(problem, make), "bwd": self.backward().kernels(problem, make)}
        return tuple(kernel for name in problem.passes for kernel in launches[name])

    def forward(self, p: AttentionProblem, make: Passes) -> tuple[Kernel, ...]:
        """A mask that is the same for all heads and batch entries is added to the scores, which gives another matrix;
        one that is not is filled in where they are."""
        d, dv, grouped, masked = p.head_dim, p.head_dim_v, p.heads_per_kv > 1, p.mask_rule.kind != "full"
        if self.impl == "triton":  # inputs are read where they are, and masked when S is written
            S = make.scores("scores", "Q", "K", "S", d, scaled=True, masked=masked)
            kernels = [S, Softmax().kernel(p), make.by_queries("output", "P", "V", "O", dv)]
            return tuple(replace(kernel, library=False) for kernel in kernels)
        scores = "work" if masked and not p.mask_rule.by_batch else "S"
        kernels = [
            make.over_rows("permute_Q", "Q", "Q_heads", "queries", d),
            make.over_rows("permute_K", "K_repeated" if grouped else "K", "K_heads", "keys", d),
            make.over_rows("permute_V", "V_repeated" if grouped else "V", "V_heads", "keys", dv),
            make.scores("scores", "Q_heads", "K_heads", scores, d, scaled=True),  # scaled, so that S does not overflow
        ]
        if grouped:
            repeat_K = make.over_rows("repeat_K", "K", "K_repeated", "keys", d)
            kernels[:0] = [repeat_K, make.over_rows("repeat_V", "V", "V_repeated", "keys", dv)]
        if masked:
            kernels.append(make.over_scores("mask", scores, "S", "mask"))
        kernels.append(Softmax().kernel(p))
        if p.dropout:
            kernels.append(kernel("dropout", Dropout(), ("P", "S", "kept"), **OF_SCORES))
        return (*kernels, make.by_queries("output", "S" if p.dropout else "P", "V_heads", "O", dv))


@dataclass
class Rows:
    """The register tiles of the softmax."""

    S: Operand
    stats: Statistics


class Softmax:
    """P = softmax(S): a CTA has whole rows, one KV tile wide."""

    def kernel(self, p: AttentionProblem) -> Kernel:
        width = -(-p.seqlen_k // 128) * 128
        height = max(1, min(64, ROW_ELEMENTS // width))
        return kernel("softmax", self, ("S", "P"), BLOCK_M=height, BLOCK_N=width, scaled_scores=True)

    def registers(self, regs: Registers) -> Rows:
        shape = regs.kernel.BLOCK_M, regs.kernel.BLOCK_N
        dtype = "fp32" if shape[0] * shape[1] <= ROW_ELEMENTS else regs.problem.dtype
        return Rows(regs.tile("S", shape, dtype), Statistics.declare(regs, shape[0]))

    def program(self, wg: Warpgroup, s: None, r: Rows) -> Program:
        for tile in wg.tiles():
            start(wg, r.S, r.stats)
            for j in wg.kv_tiles(tile):
                yield wg.load(tile.S(j), into=r.S)
                beyond = wg.problem.seqlen_k < r.S.shape[1]  # columns that are no keys
                online_softmax(wg, r.S, r.stats, tile, j, masked=beyond)
                finish(wg, r.S, r.stats)
                wg.store(r.S, into=tile.P(j))
                wg.store(r.stats.l, into=tile.LSE)


class Dropout:
    """P~ = P o keep / (1 - p), which takes the place of S, and a byte for each element: is it kept?"""

    def registers(self, regs: Registers) -> Piece:
        shape, dtype = (regs.kernel.BLOCK_M, regs.kernel.BLOCK_N), regs.problem.dtype
        return Piece(regs.tile("P", shape, dtype), regs.tile("kept", shape), regs.rows("1 - p", shape[0]))

    def program(self, wg: Warpgroup, s: None, r: Piece) -> Program:
        for tile in wg.tiles():
            wg.map("fill", 1 - wg.problem.dropout, into=r.row)
            for j in wg.kv_tiles(tile):
                yield wg.load(tile.P(j), into=r.a)
                wg.map("fill", 1.0, into=r.b)
                wg.map("dropout", r.b, tile, j, into=r.b)
                wg.map("mul", r.a, r.b, into=r.a)
                wg.map("mul", r.b, r.row, into=r.b)
                wg.store(r.a, into=tile.S(j))
                wg.store(r.b, into=tile.kept(j))
