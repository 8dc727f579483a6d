"""Split-KV decoding (Flash-Decoding; flash_fwd_splitkv_kernel and its combine kernel in FlashAttention-2).

With one query, or a few, there are not enough blocks of queries to keep a GPU busy: the keys are split, too. A CTA
attends to one split and leaves its part of O, normalized, and the LSE of its keys; a second kernel adds the parts up,
each with the weight exp(LSE_s - LSE). The inner loop is FlashAttention-2's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel, Role, Schedule, switch
from flashsim.schedules.launch import PUBLISHED, launch_parameters, power_of_two
from flashsim.schedules.softmax import Statistics, finish, online_softmax, rescale, start
from flashsim.schedules.tensors import Tensor
from flashsim.schedules.verbs import CTA, Awaitable, Operand, Program, Registers, Sync, Warpgroup, WorkTile

COMBINE_ROWS = 16
"""Rows of a CTA of the combine kernel (flash_fwd_launch_template.h: 4, 8 or 16, by head dim)."""
IN_FLIGHT = 4
"""Parts that the combine kernel loads ahead (kStages in hopper/flash_fwd_combine_kernel.h)."""
MAX_SPLITS = 128
OTHER_INSTRUCTIONS = 60
"""As in fa2."""
PARTS = {
    "O_partial": Tensor("queries", "head_dim_v", "fp32", splits=True),
    "LSE_partial": Tensor("queries", "one", "fp32", splits=True),
}


@dataclass
class Shared:
    """What the warps of a CTA share. `narrow` are K and V as they come from HBM, where that is 8 bits."""

    Q: Operand
    K: Operand
    V: Operand
    narrow: tuple[Operand, Operand] | None
    everybody: Sync


@dataclass
class Fragments:
    """The register tiles of the four warps."""

    S: Operand
    P: Operand
    O: Operand  # noqa: E741 - the paper's name
    stats: Statistics


@dataclass
class Merging:
    """The register tiles of the combine kernel: the sum, and parts that load while others are added."""

    O: Operand  # noqa: E741
    stats: Statistics
    parts: list[Operand]
    lses: list[Operand]
    weight: Operand


def num_splits(tiles: int, kv_tiles: int, slots: int) -> int:
    """The smallest number of splits that keeps `slots` CTAs nearly as busy as the best does: 85 % of it.

    `tiles` blocks of queries, each with `kv_tiles` KV tiles. One split where there are work tiles for 80 % of the slots
    (num_splits_heuristic in csrc/flash_attn/flash_api.cpp).
    """
    if tiles >= 0.8 * slots:
        return 1
    most = min(MAX_SPLITS, slots, kv_tiles)
    # A number that leaves the longest split as long as one split less does is none.
    possible = [n for n in range(1, most + 1) if n == 1 or -(-kv_tiles // n) != -(-kv_tiles // (n - 1))]
    efficiency = {n: (tiles * n / slots) / -(-tiles * n // slots) for n in possible}
    return next(n for n in possible if efficiency[n] >= 0.85 * max(efficiency.values()))


def padded(width: int) -> int:
    """The head dim of the tiles: the library has kernels for multiples of 32."""
    return -(-width // 32) * 32


@dataclass(frozen=True)
class SplitKV(Schedule):
    """Split-KV decoding, fp16 and bf16, Ampere, Ada and Hopper."""

    title = "split-KV decoding: FlashAttention-2's loop over a part of the keys, and a kernel that combines the parts"
    source = "pytorch.org/blog/flash-decoding; Dao-AILab/flash-attention csrc/flash_attn/src/flash_fwd_kernel.h"

    impl: str = switch(PUBLISHED, "whose kernels, with their tiles; triton: kernels/split_kv.py", (PUBLISHED, "triton"))
    mma: str = switch(None, "instruction of the products", ("mma.sync", "wgmma"))
    num_splits: int = switch(None, "parts of the keys")
    kv_dtype: str = switch("problem", "what K and V are kept in; the arithmetic is 16 bits", ("problem", "fp8"))
    layers: int = switch(1, "launches, one after the other, that read the same K and V")

    def defaults(self, problem: AttentionProblem, architecture: str) -> dict[str, Any]:
        d = max(problem.head_dim, problem.head_dim_v)
        if self.impl == "triton":
            row = launch_parameters(self.impl, "split_kv_fwd", problem, architecture)
            mma = "wgmma" if architecture == "hopper" else "mma.sync"
            return {"BLOCK_M": row["BLOCK_M"], "BLOCK_N": row["BLOCK_N"], "mma": mma}
        return {"mma": "mma.sync", "BLOCK_M": 64, "BLOCK_N": 256 if d <= 64 else 128 if d <= 128 else 64}

    def by_sms(self, problem: AttentionProblem, sms: int) -> dict[str, Any]:
        group = problem.heads_per_kv if self.pack_gqa else 1
        tiles = problem.batch * problem.heads_q // group * -(-problem.seqlen_q * group // self.BLOCK_M)
        return {"num_splits": num_splits(tiles, self.kv_tiles(problem), 2 * sms)}  # two CTAs fit an SM

    def kv_tiles(self, problem: AttentionProblem) -> int:
        return -(-problem.seqlen_k // self.BLOCK_N)

    def complaints(self, problem: AttentionProblem) -> list[str]:
        lines = []
        if self.BLOCK_M not in (64, 128):
            lines.append(f"BLOCK_M = {self.BLOCK_M}, allowed are 64 and 128: 16 or 32 rows for each of 4 warps")
        if self.BLOCK_N % 16 or not 16 <= self.BLOCK_N <= 256:
            lines.append(f"BLOCK_N = {self.BLOCK_N}, allowed are the multiples of 16 from 16 to 256 (k of one mma)")
        if self.num_splits is not None and self.num_splits > self.kv_tiles(problem):
            lines.append(f"num_splits = {self.num_splits}, there are {self.kv_tiles(problem)} KV tiles to split")
        if self.impl == "triton" and self.kv_dtype != "problem":
            lines.append("impl = triton has K and V in the problem's dtype")
        if self.layers > 64:
            lines.append(f"layers = {self.layers}, allowed are 1 to 64")
        return lines

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        width = power_of_two if self.impl == "triton" else padded
        common: dict[str, Any] = {
            "mma": "wgmma" if self.mma == "wgmma" else "mma.sync",
            "copy": "cp.async",
            "BLOCK_N": self.BLOCK_N,
            "head_dim": width(problem.head_dim),
            "head_dim_v": width(problem.head_dim_v),
        }
        if self.num_splits > 1:
            common["workspace"] = PARTS
        split = Kernel(
            name="split_kv_fwd",
            roles=(Role("warps", self.attend, registers=self.registers),),
            shared=self.shared,
            grid=Grid(splits=self.num_splits),
            BLOCK_M=self.BLOCK_M,
            kv_dtype="" if self.kv_dtype == "problem" else self.kv_dtype,
            overhead_instructions=OTHER_INSTRUCTIONS,
            **common,
        )
        combine = Kernel(
            name="split_kv_combine",
            roles=(Role("warps", self.combine, registers=self.merging),),
            shared=lambda cta: None,
            grid=Grid(),
            BLOCK_M=COMBINE_ROWS,
            walk="none",
            scaled_scores=True,  # what is exponentiated are LSEs
            **common,
        )
        return ((split, combine) if self.num_splits > 1 else (split,)) * self.layers

    def shared(self, cta: CTA) -> Shared:
        narrow = None
        if self.kv_dtype != "problem":
            narrow = (
                cta.slot("K in 8 bits", (self.BLOCK_N, cta.head_dim), self.kv_dtype),
                cta.slot("V in 8 bits", (self.BLOCK_N, cta.head_dim_v), self.kv_dtype),
            )
        return Shared(
            Q=cta.slot("Q", (self.BLOCK_M, cta.head_dim)),
            K=cta.slot("K", (self.BLOCK_N, cta.head_dim)),
            V=cta.slot("V", (self.BLOCK_N, cta.head_dim_v)),
            narrow=narrow,
            everybody=cta.sync("everybody", 1),
        )

    def registers(self, regs: Registers) -> Fragments:
        S = regs.tile("S", (self.BLOCK_M, self.BLOCK_N))
        return Fragments(
            S=S,
            P=regs.tile("P", (self.BLOCK_M, self.BLOCK_N), regs.problem.dtype, over=S),
            O=regs.tile("O", (self.BLOCK_M, regs.head_dim_v)),
            stats=Statistics.declare(regs, self.BLOCK_M),
        )

    def attend(self, wg: Warpgroup, s: Shared, r: Fragments) -> Program:
        """FlashAttention-2's algorithm 1 over the KV tiles of one split."""
        K, V = s.narrow or (s.K, s.V)
        for tile in wg.tiles():
            start(wg, r.O, r.stats)
            if tile.count:
                q = wg.load(tile.Q, into=s.Q)
                k = wg.load(tile.K(tile.first), into=K)
                yield q
            for j in wg.kv_tiles(tile):
                yield k
                yield s.everybody.wait()
                v = wg.load(tile.V(j), into=V)
                if s.narrow:
                    wg.convert(K, into=s.K)
                    yield s.everybody.wait()
                yield wg.gemm(s.Q, s.K.T, into=r.S)
                yield v
                yield s.everybody.wait()
                if j < tile.last:
                    k = wg.load(tile.K(j + 1), into=K)
                if s.narrow:
                    wg.convert(V, into=s.V)
                    yield s.everybody.wait()
                online_softmax(wg, r.S, r.stats, tile, j, masked=tile.partial(j))
                rescale(wg, r.O, r.stats)
                wg.convert(r.S, into=r.P)
                yield wg.gemm(r.P, s.V, into=r.O, accumulate=True)
            finish(wg, r.O, r.stats)
            whole = self.num_splits == 1
            wg.store(r.O, into=tile.O if whole else tile.O_partial)
            wg.store(r.stats.l, into=tile.LSE if whole else tile.LSE_partial)

    def merging(self, regs: Registers) -> Merging:
        rows, width = COMBINE_ROWS, regs.head_dim_v
        return Merging(
            O=regs.tile("O", (rows, width)),
            stats=Statistics.declare(regs, rows),
            parts=[regs.tile(f"part {n}", (rows, width)) for n in range(IN_FLIGHT)],
            lses=[regs.rows(f"LSE of part {n}", rows) for n in range(IN_FLIGHT)],
            weight=regs.rows("weight", rows),
        )

    def combine(self, wg: Warpgroup, s: None, r: Merging) -> Program:
        """O = sum_s exp(LSE_s - LSE) O_s; the parts that follow load while one is added."""
        for tile in wg.tiles():
            start(wg, r.O, r.stats)
            loads = {part: self.load_part(wg, r, tile, part) for part in range(min(IN_FLIGHT, self.num_splits))}
            for part in range(self.num_splits):
                O, LSE = r.parts[part % IN_FLIGHT], r.lses[part % IN_FLIGHT]  # noqa: E741
                yield loads[part][0]
                yield loads[part][1]
                wg.map("copy", r.stats.m, into=r.stats.m_old)
                wg.reduce("max", LSE, into=r.stats.m)
                wg.map("rescale_factor", r.stats.m_old, r.stats.m, into=r.stats.alpha)
                wg.map("exp", LSE, r.stats.m, into=r.weight)
                wg.map("mul", r.stats.l, r.stats.alpha, into=r.stats.l)
                wg.map("add", r.stats.l, r.weight, into=r.stats.l)
                rescale(wg, r.O, r.stats)
                wg.map("mul", O, r.weight, into=O)
                wg.map("add", r.O, O, into=r.O)
                if part + IN_FLIGHT < self.num_splits:
                    loads[part + IN_FLIGHT] = self.load_part(wg, r, tile, part + IN_FLIGHT)
            finish(wg, r.O, r.stats)
            wg.store(r.O, into=tile.O)
            wg.store(r.stats.l, into=tile.LSE)

    def load_part(self, wg: Warpgroup, r: Merging, tile: WorkTile, part: int) -> tuple[Awaitable, Awaitable]:
        """LSE and O of one split."""
        lse = wg.load(tile.LSE_partial(part), into=r.lses[part % IN_FLIGHT])
        return lse, wg.load(tile.O_partial(part), into=r.parts[part % IN_FLIGHT])
