"""Standard attention, forward: what FlashAttention replaced. S and P go through HBM between separate kernels.

The kernels of a framework: S = Q K^T, an elementwise pass where there is a mask, a softmax over rows, O = P V. Each
reads from HBM what the one before it wrote there (algorithm 0 of the FlashAttention paper, arXiv 2205.14135).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel, Role, Schedule, switch
from flashsim.schedules.softmax import Statistics, finish, online_softmax, start
from flashsim.schedules.tensors import Tensor
from flashsim.schedules.verbs import CTA, Operand, Program, Registers, Warpgroup

WORKSPACE = {"S": Tensor("queries", "keys"), "P": Tensor("queries", "keys")}
"""S before the softmax, P after it."""
ROW_ELEMENTS = 16384
"""Scores that a CTA of the softmax kernel holds in its registers, 128 in each thread, unless one row has more."""
MASK_ROWS, MASK_COLUMNS = 16, 1024
"""The piece of S that a CTA of the mask kernel has in its registers at a time."""


@dataclass
class Operands:
    """The shared memory of a product's CTA: a block of the left operand and one of the right."""

    left: Operand
    right: Operand


@dataclass
class Accumulator:
    """The register tiles of a product."""

    sum: Operand
    rounded: Operand


@dataclass
class Rows:
    """The register tiles of the kernels that work on rows of S."""

    S: Operand
    stats: Statistics


@dataclass(frozen=True)
class Standard(Schedule):
    """Standard attention forward, fp16 and bf16, as a framework runs it."""

    title = "standard attention: S and P through HBM, one kernel for each step"
    stores_scores = True
    source = "arXiv 2205.14135, algorithm 0; attention_pytorch in the FlashAttention repository's benchmarks"

    mma: str = switch(None, "instruction of the products", ("mma.sync", "wgmma"))

    def defaults(self, problem: AttentionProblem, architecture: str) -> dict[str, Any]:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "mma": "wgmma" if architecture == "hopper" else "mma.sync"}

    def complaints(self, problem: AttentionProblem) -> list[str]:
        return [
            f"{name} = {value}, allowed are 64 and 128: rows and columns of a product's tile"
            for name, value in (("BLOCK_M", self.BLOCK_M), ("BLOCK_N", self.BLOCK_N))
            if value not in (64, 128)
        ]

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        width = -(-problem.seqlen_k // 128) * 128
        height = max(1, min(64, ROW_ELEMENTS // width))
        scores = self._kernel("scores", Role("warps", self.scores, registers=self.score_registers), self.score_operands)
        mask = self._kernel("mask", Role("warps", self.mask, registers=self.rows), None, MASK_ROWS, MASK_COLUMNS)
        softmax = self._kernel("softmax", Role("warps", self.softmax, registers=self.rows), None, height, width, True)
        output = self._kernel(
            "output", Role("warps", self.output, registers=self.output_registers), self.output_operands
        )
        return (scores, mask, softmax, output) if problem.mask_rule.kind != "full" else (scores, softmax, output)

    def _kernel(
        self, name: str, role: Role, shared: Any, BLOCK_M: int = 0, BLOCK_N: int = 0, scaled_scores: bool = False
    ) -> Kernel:
        """A product, with its operands in shared memory, or a kernel that works on rows of S in its registers."""
        return Kernel(
            name=f"standard_{name}",
            roles=(role,),
            shared=shared or (lambda cta: (BLOCK_M, BLOCK_N)),
            grid=Grid("rows", "cta"),
            BLOCK_M=BLOCK_M or self.BLOCK_M,
            BLOCK_N=BLOCK_N or self.BLOCK_N,
            mma="wgmma" if self.mma == "wgmma" else "mma.sync",
            copy="tma" if self.mma == "wgmma" else "cp.async",
            walk="all",
            masks=shared is None,
            scaled_scores=scaled_scores,
            library=True,
            workspace=WORKSPACE,
        )

    # S = scale Q K^T

    def score_operands(self, cta: CTA) -> Operands:
        d = cta.problem.head_dim
        return Operands(cta.slot("Q", (self.BLOCK_M, d)), cta.slot("K", (self.BLOCK_N, d)))

    def score_registers(self, regs: Registers) -> Accumulator:
        S = regs.tile("S", (self.BLOCK_M, self.BLOCK_N))
        return Accumulator(S, regs.tile("S rounded", (self.BLOCK_M, self.BLOCK_N), regs.problem.dtype, over=S))

    def scores(self, wg: Warpgroup, s: Operands, r: Accumulator) -> Program:
        for tile in wg.tiles():
            yield wg.load(tile.Q, into=s.left)
            for j in wg.kv_tiles(tile):
                yield wg.load(tile.K(j), into=s.right)
                yield wg.gemm(s.left, s.right.T, into=r.sum)
                wg.map("scale", r.sum, into=r.sum)  # alpha of the product, so that S does not overflow
                wg.convert(r.sum, into=r.rounded)
                wg.store(r.rounded, into=tile.S(j))

    # S = S + mask, and P = softmax(S): a CTA has whole rows, one KV tile wide

    def rows(self, regs: Registers) -> Rows:
        shape = regs.kernel.BLOCK_M, regs.kernel.BLOCK_N
        dtype = "fp32" if shape[0] * shape[1] <= ROW_ELEMENTS else regs.problem.dtype
        return Rows(regs.tile("S", shape, dtype), Statistics.declare(regs, shape[0]))

    def mask(self, wg: Warpgroup, s: Any, r: Rows) -> Program:
        for tile in wg.tiles():
            for j in wg.kv_tiles(tile):
                yield wg.load(tile.S(j), into=r.S)
                if tile.partial(j):
                    wg.map("mask", r.S, tile, j, into=r.S)
                wg.store(r.S, into=tile.S(j))

    def softmax(self, wg: Warpgroup, s: Any, r: Rows) -> Program:
        for tile in wg.tiles():
            start(wg, r.S, r.stats)
            for j in wg.kv_tiles(tile):
                yield wg.load(tile.S(j), into=r.S)
                online_softmax(wg, r.S, r.stats, tile, j, masked=tile.partial(j))
                finish(wg, r.S, r.stats)
                wg.store(r.S, into=tile.P(j))
                wg.store(r.stats.l, into=tile.LSE)

    # O = P V

    def output_operands(self, cta: CTA) -> Operands:
        return Operands(
            cta.slot("P", (self.BLOCK_M, self.BLOCK_N)), cta.slot("V", (self.BLOCK_N, cta.problem.head_dim_v))
        )

    def output_registers(self, regs: Registers) -> Accumulator:
        O = regs.tile("O", (self.BLOCK_M, regs.problem.head_dim_v))  # noqa: E741
        return Accumulator(
            O, regs.tile("O rounded", (self.BLOCK_M, regs.problem.head_dim_v), regs.problem.dtype, over=O)
        )

    def output(self, wg: Warpgroup, s: Operands, r: Accumulator) -> Program:
        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r.sum)
            for j in wg.kv_tiles(tile):
                p = wg.load(tile.P(j), into=s.left)
                yield wg.load(tile.V(j), into=s.right)
                yield p
                yield wg.gemm(s.left, s.right, into=r.sum, accumulate=True)
            wg.convert(r.sum, into=r.rounded)
            wg.store(r.rounded, into=tile.O)
