"""What standard attention is made of: matrix products of a library, and elementwise kernels that just move data.

They are the kernels of `attention_pytorch` in the FlashAttention repository's benchmarks/benchmark_flash_attention.py
and of PyTorch's autograd for it. A matrix of scores has a row for each query and a column for each key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel, Role
from flashsim.schedules.tensors import Tensor
from flashsim.schedules.verbs import CTA, Operand, Program, Registers, Warpgroup

BUFFERS = {
    "S": Tensor("queries", "keys"),
    "P": Tensor("queries", "keys"),
    "work": Tensor("queries", "keys"),
    "dS": Tensor("queries", "keys"),
    "kept": Tensor("queries", "keys", "e4m3"),  # 0 or 1, a byte for each element
    "Q_heads": Tensor("queries", "head_dim"),
    "K_heads": Tensor("keys", "head_dim"),
    "V_heads": Tensor("keys", "head_dim_v"),
    "K_repeated": Tensor("keys", "head_dim"),
    "V_repeated": Tensor("keys", "head_dim_v"),
}
"""Device memory beside inputs and outputs. As with a framework's allocator, what comes next takes the place of what is
dead, so that one buffer holds several things in turn: `standard` and `standard_backward` say which."""
OF_SCORES = {"BLOCK_M": 64, "BLOCK_N": 256}
"""The piece of a matrix of scores that a CTA of an elementwise kernel has in its registers at a time."""


def kernel(name: str, step: Any, tensors: tuple[str, ...], **fields: Any) -> Kernel:
    """A launch of one role; `step` has its program and its register tiles. `tensors` are those that it names."""
    role = Role("warps", step.program, registers=step.registers)
    workspace = {tensor: BUFFERS[tensor] for tensor in tensors if tensor in BUFFERS}
    given: dict[str, Any] = {"mma": "mma.sync", "copy": "cp.async", "grid": Grid(), "walk": "all", "masks": False}
    given |= {"shared": no_memory, "library": True, "workspace": workspace}
    return Kernel(f"standard_{name}", (role,), **given | fields)


def rows_at_once(block: int, columns: int) -> int:
    """Rows of a tile with so many columns: at 256, a warpgroup has no registers for 128 rows of sums, and Ada no shared
    memory for two operands of 128 rows."""
    return block if columns <= 192 else min(block, 64)


def no_memory(cta: CTA) -> None:
    """Declares nothing: the kernel has registers only."""


@dataclass(frozen=True)
class Passes:
    """Makes the kernels that both passes of attention have, with this tile and instruction for the products."""

    problem: AttentionProblem
    BLOCK_M: int
    BLOCK_N: int
    mma: Literal["mma.sync", "wgmma"]

    def scores(
        self, name: str, left: str, right: str, into: str, width: int, scaled: bool = False, masked: bool = False
    ) -> Kernel:
        """into = left right^T: a row of `left` for each query and one of `right` for each key. `scaled`: multiplied by
        the softmax scale, alpha of a library's product. `masked`: what the mask hides becomes -inf."""
        M, N = rows_at_once(self.BLOCK_M, width), self.BLOCK_N
        step = Scores(left, right, into, (M, width), (N, width), (M, N), scaled, masked)
        return replace(self._product(name, step, M, N, width), masks=masked)

    def by_queries(self, name: str, left: str, right: str, into: str, width: int) -> Kernel:
        """into = left right, of scores and a row for each key."""
        M, N = rows_at_once(self.BLOCK_M, width), self.BLOCK_N
        return self._product(name, ByQueries(left, right, into, (M, N), (N, width), (M, width)), M, N, width)

    def by_keys(self, name: str, left: str, right: str, into: str, width: int) -> Kernel:
        """into = left^T right, of scores and a row for each query."""
        M, N = self.BLOCK_M, rows_at_once(self.BLOCK_N, width)
        return self._product(name, ByKeys(left, right, into, (M, N), (M, width), (N, width)), M, N, width)

    def _product(self, name: str, step: Product, M: int, N: int, width: int) -> Kernel:
        p = self.problem
        byte = p.element_bytes * (p.seqlen_q * p.seqlen_k + (p.seqlen_q + p.seqlen_k) * width)
        return kernel(
            name,
            step,
            (step.left, step.right, step.into),
            BLOCK_M=M,
            BLOCK_N=N,
            mma=self.mma,
            copy="tma" if self.mma == "wgmma" else "cp.async",
            shared=step.operands,
            grid=Grid(over="keys" if isinstance(step, ByKeys) else "queries"),
            flop_per_byte=2 * p.seqlen_q * p.seqlen_k * width / byte,
        )

    def over_scores(self, name: str, source: str, into: str, does: Literal["copy", "zero", "mask", "visit"]) -> Kernel:
        """A pass over scores: to copy them, to write zeros, to hide what the mask hides, or to go over them with a mask
        that changes nothing."""
        step = OverScores(source, into, does)
        return kernel(name, step, (source, into), indexed=does in ("mask", "visit"), **OF_SCORES)

    def over_rows(
        self, name: str, source: str, into: str, over: Literal["queries", "keys"], width: int, scaled: bool = False
    ) -> Kernel:
        """A pass over rows of queries or keys: a copy with heads and rows permuted, or repeated for the heads of a
        group; or, `scaled`, a multiplication by the softmax scale where all is contiguous."""
        rows = self.BLOCK_M if over == "queries" else self.BLOCK_N
        step, tile = OverRows(source, into, (rows, width), scaled), {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N}
        grid = Grid(over=over)
        return kernel(name, step, (source, into), grid=grid, indexed=not scaled, walk="none", **tile)

    def sum_heads(self, name: str, source: str, into: str, width: int) -> Kernel:
        """The gradient of repeated rows: for each KV head the sum of those of the query heads that share it."""
        rows = rows_at_once(self.BLOCK_N, width + width // 2)  # sums in 32 bits, and what is added in 16
        step, tile = SumHeads(source, into, (rows, width)), {"BLOCK_M": self.BLOCK_M, "BLOCK_N": rows}
        return kernel(name, step, (source,), grid=Grid(over="keys", heads="kv"), walk="none", **tile)


# Products.


@dataclass
class Operands:
    """The shared memory of a product's CTA: a tile of the left operand and one of the right."""

    left: Operand
    right: Operand


@dataclass
class Accumulator:
    """The register tiles of a product."""

    sum: Operand
    rounded: Operand


@dataclass(frozen=True)
class Product:
    """Names and tiles of the operands and of the result."""

    left: str
    right: str
    into: str
    left_tile: tuple[int, int]
    right_tile: tuple[int, int]
    into_tile: tuple[int, int]

    def operands(self, cta: CTA) -> Operands:
        return Operands(cta.slot(self.left, self.left_tile), cta.slot(self.right, self.right_tile))

    def registers(self, regs: Registers) -> Accumulator:
        total = regs.tile(self.into, self.into_tile)
        return Accumulator(total, regs.tile(f"{self.into} rounded", self.into_tile, regs.problem.dtype, over=total))


@dataclass(frozen=True)
class Scores(Product):
    scaled: bool
    masked: bool

    def program(self, wg: Warpgroup, s: Operands, r: Accumulator) -> Program:
        for tile in wg.tiles():
            yield wg.load(getattr(tile, self.left), into=s.left)
            for j in wg.kv_tiles(tile):
                yield wg.load(getattr(tile, self.right)(j), into=s.right)
                yield wg.gemm(s.left, s.right.T, into=r.sum)
                if self.scaled:
                    wg.map("scale", r.sum, into=r.sum)
                if self.masked and tile.partial(j):
                    wg.map("mask", r.sum, tile, j, into=r.sum)
                wg.convert(r.sum, into=r.rounded)
                wg.store(r.rounded, into=getattr(tile, self.into)(j))


@dataclass(frozen=True)
class ByQueries(Product):
    def program(self, wg: Warpgroup, s: Operands, r: Accumulator) -> Program:
        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r.sum)
            for j in wg.kv_tiles(tile):
                scores = wg.load(getattr(tile, self.left)(j), into=s.left)
                rows = wg.load(getattr(tile, self.right)(j), into=s.right)
                yield scores
                yield rows
                yield wg.gemm(s.left, s.right, into=r.sum, accumulate=True)
            wg.convert(r.sum, into=r.rounded)
            wg.store(r.rounded, into=getattr(tile, self.into))


@dataclass(frozen=True)
class ByKeys(Product):
    def program(self, wg: Warpgroup, s: Operands, r: Accumulator) -> Program:
        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r.sum)
            for i in wg.q_tiles(tile):
                scores = wg.load(getattr(tile, self.left)(i), into=s.left)
                rows = wg.load(getattr(tile, self.right)(i), into=s.right)
                yield scores
                yield rows
                yield wg.gemm(s.left.T, s.right, into=r.sum, accumulate=True)
            wg.convert(r.sum, into=r.rounded)
            wg.store(r.rounded, into=getattr(tile, self.into))


# Elementwise kernels.


@dataclass
class Piece:
    """The register tiles of an elementwise kernel with two operands, and one value for each row."""

    a: Operand
    b: Operand
    row: Operand


@dataclass(frozen=True)
class OverScores:
    source: str
    into: str
    does: Literal["copy", "zero", "mask", "visit"]

    def registers(self, regs: Registers) -> Operand:
        return regs.tile("scores", (regs.kernel.BLOCK_M, regs.kernel.BLOCK_N), regs.problem.dtype)

    def program(self, wg: Warpgroup, s: None, r: Operand) -> Program:
        for tile in wg.tiles():
            for j in wg.kv_tiles(tile):
                if self.does == "zero":
                    yield wg.map("fill", 0.0, into=r)  # equivalent: the scoreboard orders registers
                else:
                    yield wg.load(getattr(tile, self.source)(j), into=r)
                if self.does == "mask":
                    wg.map("mask", r, tile, j, into=r)
                wg.store(r, into=getattr(tile, self.into)(j))


@dataclass(frozen=True)
class OverRows:
    source: str
    into: str
    tile: tuple[int, int]
    scaled: bool

    def registers(self, regs: Registers) -> Operand:
        return regs.tile("rows", self.tile, regs.problem.dtype)

    def program(self, wg: Warpgroup, s: None, r: Operand) -> Program:
        for tile in wg.tiles():
            yield wg.load(getattr(tile, self.source), into=r)
            if self.scaled:
                wg.map("scale", r, into=r)
            wg.store(r, into=getattr(tile, self.into))


@dataclass
class Sum:
    """The register tiles of a sum over heads."""

    each: Operand
    total: Operand


@dataclass(frozen=True)
class SumHeads:
    source: str
    into: str
    tile: tuple[int, int]

    def registers(self, regs: Registers) -> Sum:
        return Sum(regs.tile("each", self.tile, regs.problem.dtype), regs.tile("total", self.tile))

    def program(self, wg: Warpgroup, s: None, r: Sum) -> Program:
        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r.total)
            for head in range(wg.problem.heads_per_kv):
                yield wg.load(getattr(tile, self.source)(head), into=r.each)
                wg.map("add", r.total, r.each, into=r.total)
            wg.store(r.total, into=getattr(tile, self.into))
