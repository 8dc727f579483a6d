"""What standard attention is made of: matrix products of a library, and elementwise kernels that just move data.

They are the kernels of `attention_pytorch` in the FlashAttention repository's benchmarks/benchmark_flash_attention.py
and of PyTorch's autograd for it. A matrix of scores has a row for each query and a column for each key.
"""

from __future__ import annotations

from dataclasses import dataclass
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

PIECE = 16384
"""Elements that a CTA of an elementwise kernel has in its registers at a time."""
OF_SCORES = {"BLOCK_M": 64, "BLOCK_N": 256}
"""Such a piece of a matrix of scores."""


@dataclass(frozen=True)
class LibraryKernel(Kernel):
    """A framework's kernel; `devices.spec.Library.byte_per_ns` says at what rate it moves data."""

    flop_per_byte: float = 0.0
    """FLOPs of a product for each byte of its operands and its result."""
    indexed: bool = False
    """An elementwise kernel of which an operand is broadcast or permuted: it divides to find each element's place and
    moves two bytes a thread (elementwise_kernel in PyTorch's CUDALoops.cuh), where others are vectorized."""


def kernel(name: str, step: Any, tensors: tuple[str, ...], **fields: Any) -> LibraryKernel:
    """A launch of one role; `step` has its program and its register tiles. `tensors` are those that it names."""
    role = Role("warps", step.program, registers=step.registers)
    workspace = {tensor: BUFFERS[tensor] for tensor in tensors if tensor in BUFFERS}
    given = {"mma": "mma.sync", "copy": "cp.async", "grid": Grid(), "shared": no_memory, "walk": "all", "masks": False}
    return LibraryKernel(f"standard_{name}", (role,), library=True, workspace=workspace, **given | fields)


def no_memory(cta: CTA) -> None:
    """Declares nothing: the kernel has registers only."""


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
class Multiply:
    """into = left right^T (`scores`), scores right (`queries`: rows of `into`) or scores^T right (`keys`)."""

    name: str
    gives: Literal["scores", "queries", "keys"]
    left: str
    right: str
    into: str
    width: int
    """Columns of the operands, or of one and the result, that are no scores."""
    BLOCK_M: int
    BLOCK_N: int
    mma: Literal["mma.sync", "wgmma"]
    scaled: bool = False
    """Multiplied by the softmax scale: alpha of a library's product."""

    def kernel(self, p: AttentionProblem) -> Kernel:
        byte = p.element_bytes * (p.seqlen_q * p.seqlen_k + (p.seqlen_q + p.seqlen_k) * self.width)
        return kernel(
            self.name,
            _ByKeys(self) if self.gives == "keys" else _Scores(self) if self.gives == "scores" else _ByQueries(self),
            (self.left, self.right, self.into),
            BLOCK_M=self.BLOCK_M,
            BLOCK_N=self.BLOCK_N,
            mma=self.mma,
            copy="tma" if self.mma == "wgmma" else "cp.async",
            shared=self.operands,
            grid=Grid(over="keys" if self.gives == "keys" else "queries"),
            flop_per_byte=2 * p.seqlen_q * p.seqlen_k * self.width / byte,
        )

    def operands(self, cta: CTA) -> Operands:
        scores, queries, keys = (self.BLOCK_M, self.BLOCK_N), (self.BLOCK_M, self.width), (self.BLOCK_N, self.width)
        left, right = {"scores": (queries, keys), "queries": (scores, keys), "keys": (scores, queries)}[self.gives]
        return Operands(cta.slot(self.left, left), cta.slot(self.right, right))

    def accumulator(self, regs: Registers) -> Accumulator:
        scores, queries, keys = (self.BLOCK_M, self.BLOCK_N), (self.BLOCK_M, self.width), (self.BLOCK_N, self.width)
        shape = {"scores": scores, "queries": queries, "keys": keys}[self.gives]
        total = regs.tile(self.into, shape)
        return Accumulator(total, regs.tile(f"{self.into} rounded", shape, regs.problem.dtype, over=total))


@dataclass(frozen=True)
class _Step:
    of: Multiply

    def registers(self, regs: Registers) -> Accumulator:
        return self.of.accumulator(regs)


class _Scores(_Step):
    def program(self, wg: Warpgroup, s: Operands, r: Accumulator) -> Program:
        for tile in wg.tiles():
            yield wg.load(getattr(tile, self.of.left), into=s.left)
            for j in wg.kv_tiles(tile):
                yield wg.load(getattr(tile, self.of.right)(j), into=s.right)
                yield wg.gemm(s.left, s.right.T, into=r.sum)
                if self.of.scaled:
                    wg.map("scale", r.sum, into=r.sum)
                wg.convert(r.sum, into=r.rounded)
                wg.store(r.rounded, into=getattr(tile, self.of.into)(j))


class _ByQueries(_Step):
    def program(self, wg: Warpgroup, s: Operands, r: Accumulator) -> Program:
        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r.sum)
            for j in wg.kv_tiles(tile):
                left = wg.load(getattr(tile, self.of.left)(j), into=s.left)
                yield wg.load(getattr(tile, self.of.right)(j), into=s.right)
                yield left
                yield wg.gemm(s.left, s.right, into=r.sum, accumulate=True)
            wg.convert(r.sum, into=r.rounded)
            wg.store(r.rounded, into=getattr(tile, self.of.into))


class _ByKeys(_Step):
    def program(self, wg: Warpgroup, s: Operands, r: Accumulator) -> Program:
        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r.sum)
            for i in wg.q_tiles(tile):
                left = wg.load(getattr(tile, self.of.left)(i), into=s.left)
                yield wg.load(getattr(tile, self.of.right)(i), into=s.right)
                yield left
                yield wg.gemm(s.left.T, s.right, into=r.sum, accumulate=True)
            wg.convert(r.sum, into=r.rounded)
            wg.store(r.rounded, into=getattr(tile, self.of.into))


# Elementwise kernels.


@dataclass
class Piece:
    """The register tiles of an elementwise kernel, and one value for each row."""

    a: Operand
    b: Operand
    row: Operand


@dataclass(frozen=True)
class OverScores:
    """A pass over matrices of scores, contiguous but for a mask: `copy` and `zero` what is there, hide what the mask
    hides (`mask`), or go over it with the mask and change nothing (`visit`)."""

    name: str
    does: Literal["copy", "zero", "mask", "visit"]
    source: str
    into: str

    def kernel(self, p: AttentionProblem) -> Kernel:
        indexed = self.does in ("mask", "visit")
        return kernel(self.name, self, (self.source, self.into), indexed=indexed, **OF_SCORES)

    def registers(self, regs: Registers) -> Operand:
        return regs.tile("scores", (regs.kernel.BLOCK_M, regs.kernel.BLOCK_N), regs.problem.dtype)

    def program(self, wg: Warpgroup, s: None, r: Operand) -> Program:
        for tile in wg.tiles():
            for j in wg.kv_tiles(tile):
                if self.does == "zero":
                    yield wg.map("fill", 0.0, into=r)
                else:
                    yield wg.load(getattr(tile, self.source)(j), into=r)
                if self.does == "mask":
                    wg.map("mask", r, tile, j, into=r)
                wg.store(r, into=getattr(tile, self.into)(j))


@dataclass(frozen=True)
class OverRows:
    """A pass over rows of queries or keys: a `copy` with heads and rows permuted, or repeated for the heads of a group,
    or a multiplication by the softmax `scale`, where all is contiguous."""

    name: str
    does: Literal["copy", "scale"]
    source: str
    into: str
    over: Literal["queries", "keys"]
    width: int

    def kernel(self, p: AttentionProblem) -> Kernel:
        rows = PIECE // self.width
        M, N = (rows, p.seqlen_k) if self.over == "queries" else (p.seqlen_q, rows)
        grid, indexed = Grid(over=self.over), self.does == "copy"
        tensors = (self.source, self.into)
        return kernel(self.name, self, tensors, grid=grid, indexed=indexed, BLOCK_M=M, BLOCK_N=N, walk="none")

    def registers(self, regs: Registers) -> Operand:
        return regs.tile("rows", (PIECE // self.width, self.width), regs.problem.dtype)

    def program(self, wg: Warpgroup, s: None, r: Operand) -> Program:
        for tile in wg.tiles():
            yield wg.load(getattr(tile, self.source), into=r)
            if self.does == "scale":
                wg.map("scale", r, into=r)
            wg.store(r, into=getattr(tile, self.into))
