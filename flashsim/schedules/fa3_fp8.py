"""FlashAttention-3 in fp8, forward (Shah et al., arXiv 2407.08608, section 3.3): what differs from `fa3`.

The tensor cores take fp8 operands only if they lie along k, and V does not for the second product: the producer, a
whole warpgroup, transposes each V tile in shared memory, into a ring of its own, under the products of the consumers.
The accumulator of S is spread over the registers in another way than the operand P must be: a permutation. Q, K and V
have one scale for each block (block quantization); Q and K may have been multiplied by a random-sign Hadamard matrix,
which spreads outliers and leaves Q K^T as it is (incoherent processing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel, Role
from flashsim.schedules.softmax import Statistics, finish, online_softmax, rescale, start
from flashsim.schedules.tensors import Tensor
from flashsim.schedules.verbs import CTA, Operand, Program, Registers, Ring, Sync, Turn, Warpgroup, WorkTile

L2_SECTION_BYTE = 32 << 20
"""As in fa3."""
P_TIMES = 256.0
"""P~ <= 1 is multiplied by it before it is rounded to e4m3 (hopper/softmax.h: Max_offset of 8 in base 2)."""
QUANTIZING = 4
"""Warpgroups of a CTA that quantizes a block."""
LARGEST = 448.0
"""Of e4m3."""
QUANTIZED = {
    "Q_fp8": Tensor("queries", "head_dim", "fp8"),
    "K_fp8": Tensor("keys", "head_dim", "fp8", heads="kv"),
    "Q_16": Tensor("queries", "head_dim", "output"),
    "K_16": Tensor("keys", "head_dim", "output", heads="kv"),
}
"""Q and K before and after a kernel that transforms and quantizes them."""


@dataclass
class Shared:
    """What the warpgroups of one CTA share."""

    Q: Ring
    K: Ring
    V: Ring
    Vt: Ring
    O: Ring  # noqa: E741 - the paper's name; lies over V
    turn: Turn
    consumers: Sync


@dataclass
class Fragments:
    """The register tiles of one consumer."""

    S: Operand
    P: Operand
    O: Operand  # noqa: E741
    stats: Statistics


@dataclass
class Maxima:
    """The shared memory of a kernel that quantizes: the largest element of each warpgroup's rows."""

    maxima: Operand
    everybody: Sync


@dataclass
class Rows:
    """The register tiles of a kernel that quantizes a block of rows."""

    given: Operand
    x: Operand
    row_max: Operand
    scale: Operand


def tile_size(head_dim: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) as hopper/tile_size.h has them for 8 bits and V along its rows."""
    if head_dim <= 64:
        return 192, 160
    if head_dim <= 96:
        return 192, 128
    if head_dim <= 128:
        return 128, 224
    return (128, 160) if head_dim <= 192 else (128, 128)


@dataclass(frozen=True)
class FA3FP8:
    """The launches of a forward pass in fp8; head dims are those of the tiles."""

    BLOCK_M: int
    BLOCK_N: int
    num_stages: int
    pingpong: bool
    incoherent: str
    head_dim: int
    head_dim_v: int

    def complaints(self, problem: AttentionProblem, switches: Mapping[str, Any]) -> list[str]:
        """What FA3's switches, and the tile, have to be."""
        needed = {"warp_specialized": True, "intra_wg_overlap": True, "persistent": True, "P_in_shared": False}
        lines = [f"{name} must be {value} for fp8" for name, value in needed.items() if switches[name] != value]
        if self.num_stages < 2:
            lines.append("num_stages must be at least 2 for fp8: the producer loads one tile ahead of its transpose")
        if self.incoherent != "off" and problem.head_dim not in (64, 128, 256):
            lines.append(f"incoherent needs head_dim 64, 128 or 256, not {problem.head_dim}: a Hadamard matrix")
        if self.BLOCK_N % 32:
            lines.append(f"BLOCK_N = {self.BLOCK_N}, allowed are multiples of 32 for fp8 (k of a wgmma)")
        return lines

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        masked, consumers = problem.mask_rule.kind != "full", self.BLOCK_M // 64
        limit, producer_limit = {1: (255, 56), 2: (240, 24), 3: (160, 32)}[consumers]
        common: dict[str, Any] = {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "mma": "wgmma",
            "copy": "tma",
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
        }
        attention = Kernel(
            name="fa3_fwd_fp8",
            roles=(
                Role("producer", self.producer, registers_per_thread=producer_limit),
                Role("consumer", self.consumer, consumers, registers=self.registers, registers_per_thread=limit),
            ),
            shared=self.shared,
            grid=Grid("longest_first", "dynamic", L2_SECTION_BYTE) if masked else Grid("rows", "static"),
            workspace=QUANTIZED if self.incoherent == "separate" else {},
            **common,
        )
        if self.incoherent != "separate":
            return (attention,)
        quantize_q, quantize_k = (
            Role("warps", program, QUANTIZING, registers=registers)
            for program, registers in ((self.quantize_q, self.query_rows), (self.quantize_k, self.key_rows))
        )
        alone: dict[str, Any] = {**common, "walk": "none", "copy": "cp.async", "workspace": QUANTIZED}
        return (
            Kernel("fa3_quantize_q", (quantize_q,), maxima, Grid(), **alone),
            Kernel("fa3_quantize_k", (quantize_k,), maxima, Grid(over="keys", heads="kv"), **alone),
            attention,
        )

    def shared(self, cta: CTA) -> Shared:
        consumers, d, dv = self.BLOCK_M // 64, cta.head_dim, cta.head_dim_v
        V = cta.ring("V", (self.BLOCK_N, dv), self.num_stages, 1)
        return Shared(
            Q=cta.ring("Q", (self.BLOCK_M, d), 1, consumers),
            K=cta.ring("K", (self.BLOCK_N, d), self.num_stages, consumers),
            V=V,
            Vt=cta.ring("Vt", (dv, self.BLOCK_N), self.num_stages, consumers),
            O=cta.overlay("O", (self.BLOCK_M, dv), 1, over=V, dtype=cta.problem.output_dtype),
            turn=cta.turn("turn", consumers if self.pingpong else 0),
            consumers=cta.sync("consumers", consumers),
        )

    def registers(self, regs: Registers) -> Fragments:
        S = regs.tile("S", (64, self.BLOCK_N))
        return Fragments(
            S=S,
            P=regs.tile("P", (64, self.BLOCK_N), regs.problem.dtype),
            O=regs.tile("O", (64, regs.head_dim_v)),
            stats=Statistics.declare(regs, 64),
        )

    def producer(self, wg: Warpgroup, s: Shared, _: Any) -> Program:
        """Algorithm 1, lines 2 to 10, and the transpose of V, one tile behind the loads."""
        for tile in wg.tiles():
            Q, K = (tile.Q_fp8, tile.K_fp8) if self.incoherent == "separate" else (tile.Q, tile.K)
            for j in wg.kv_tiles(tile):
                yield s.K.empty(j)
                wg.load(K(j), into=s.K[j])
                if j == tile.first:
                    yield s.Q.empty(tile.index)
                    wg.load(Q, into=s.Q[tile.index])
                    yield s.O.empty(tile.index)  # the O of the tile before has left the memory that V needs
                yield s.V.empty(j)
                wg.load(tile.V(j), into=s.V[j])
                if j > tile.first:
                    yield from self.transpose(wg, s, j - 1)
            if tile.count:
                yield from self.transpose(wg, s, tile.last)

    def transpose(self, wg: Warpgroup, s: Shared, j: int) -> Program:
        """V_j^T by LDSM and STSM, so that the keys lie along rows."""
        yield s.V.full(j)
        yield s.Vt.empty(j)
        wg.convert(s.V[j].T, into=s.Vt[j])
        s.Vt.commit(j)
        s.V.release(j)

    def consumer(self, wg: Warpgroup, s: Shared, r: Fragments) -> Program:
        """As in fa3, one work tile after the other."""
        for tile in wg.tiles():
            start(wg, r.O, r.stats)
            if tile.count:
                yield from self.attend(wg, s, r, tile)
                yield from self.write_output(wg, s, r, tile)
            else:
                finish(wg, r.O, r.stats)
                wg.store(r.O, into=tile.O.rows(64 * wg.index, 64))
                wg.store(r.stats.l, into=tile.LSE.rows(64 * wg.index, 64))

    def attend(self, wg: Warpgroup, s: Shared, r: Fragments, tile: WorkTile) -> Program:
        """Algorithm 2, with V^T for V and the scales of the blocks."""
        Q, j = s.Q[tile.index].rows(64 * wg.index, 64), tile.first
        yield s.Q.full(tile.index)
        yield s.K.full(j)
        yield wg.gemm(Q, s.K[j].T, into=r.S)
        s.K.release(j)
        self.softmax(wg, r, tile, j, masked=True)
        self.operand(wg, r)
        for j in wg.kv_tiles(tile, start=1):
            yield s.K.full(j)
            yield s.turn.wait()
            qk = wg.gemm(Q, s.K[j].T, into=r.S)
            yield s.Vt.full(j - 1)
            pv = wg.gemm(r.P, s.Vt[j - 1].T, into=r.O, accumulate=True)
            s.turn.pass_on()
            yield qk
            s.K.release(j)
            self.softmax(wg, r, tile, j, masked=tile.partial(j))
            yield pv
            s.Vt.release(j - 1)
            self.operand(wg, r)
            # O is in units of V's scale.
            wg.map("mul", r.stats.alpha, tile.V_scale(j - 1).rows(0, 1), into=r.stats.alpha)
            wg.map("div", r.stats.alpha, tile.V_scale(j).rows(0, 1), into=r.stats.alpha)
            rescale(wg, r.O, r.stats)
        s.Q.release(tile.index)
        yield s.Vt.full(tile.last)
        yield wg.gemm(r.P, s.Vt[tile.last].T, into=r.O, accumulate=True)
        s.Vt.release(tile.last)

    def softmax(self, wg: Warpgroup, r: Fragments, tile: WorkTile, j: int, masked: bool) -> None:
        """Of S times the scales of Q_i and K_j."""
        scales = tile.Q_scale.rows(0, 1), tile.K_scale(j).rows(0, 1)
        wg.map("mul", r.S, *scales, into=r.S)
        online_softmax(wg, r.S, r.stats, tile, j, masked, times=P_TIMES)

    def operand(self, wg: Warpgroup, r: Fragments) -> None:
        """P in 8 bits, in the registers in which the product wants it."""
        wg.map("permute", r.S, into=r.S)
        wg.convert(r.S, into=r.P)

    def write_output(self, wg: Warpgroup, s: Shared, r: Fragments, tile: WorkTile) -> Program:
        """As in fa3; O and l are in the units of V's last scale and of P~."""
        wg.map("div", r.O, r.stats.l, into=r.O)
        wg.map("mul", r.O, tile.V_scale(tile.last).rows(0, 1), into=r.O)
        wg.map("div", r.stats.l, P_TIMES, into=r.stats.l)
        wg.map("lse", r.stats.m, r.stats.l, into=r.stats.l)
        wg.store(r.stats.l, into=tile.LSE.rows(64 * wg.index, 64))
        O = s.O[tile.index]  # noqa: E741
        wg.convert(r.O, into=O.rows(64 * wg.index, 64))
        yield s.consumers.wait()
        if wg.index == self.BLOCK_M // 64 - 1:
            yield wg.store(O, into=tile.O)
            s.O.release(tile.index)

    # Q and K, transformed and quantized by kernels of their own

    def query_rows(self, regs: Registers) -> Rows:
        return rows_of(regs, self.BLOCK_M // QUANTIZING)

    def key_rows(self, regs: Registers) -> Rows:
        return rows_of(regs, self.BLOCK_N // QUANTIZING)

    def quantize_q(self, wg: Warpgroup, s: Maxima, r: Rows) -> Program:
        for tile in wg.tiles():
            yield from self.quantize(wg, s, r, tile.Q_16, tile.Q_fp8, tile.Q_scale)

    def quantize_k(self, wg: Warpgroup, s: Maxima, r: Rows) -> Program:
        for tile in wg.tiles():
            yield from self.quantize(wg, s, r, tile.K_16, tile.K_fp8, tile.K_scale)

    def quantize(self, wg: Warpgroup, s: Maxima, r: Rows, given: Operand, codes: Operand, scale: Operand) -> Program:
        """x H, divided by the largest element of the block over 448; each warpgroup has some of the rows."""
        rows = given.shape[0] // QUANTIZING
        mine = wg.index * rows, rows
        yield wg.load(given.rows(*mine), into=r.given)
        wg.map("hadamard", r.given, into=r.x)
        wg.map("fill", 0.0, into=r.row_max)
        wg.reduce("abs_max", r.x, into=r.row_max)
        wg.map("fill", 0.0, into=r.scale)
        wg.reduce("abs_max", r.row_max.T, into=r.scale)
        wg.convert(r.scale, into=s.maxima.rows(wg.index, 1))
        yield s.everybody.wait()
        wg.reduce("abs_max", s.maxima.T, into=r.scale)
        wg.map("div", r.scale, LARGEST, into=r.scale)
        wg.map("div", r.x, r.scale, into=r.x)
        wg.store(r.x, into=codes.rows(*mine))
        if wg.index == 0:
            wg.store(r.scale, into=scale.rows(0, 1))


def maxima(cta: CTA) -> Maxima:
    """What the warpgroups of a kernel that quantizes share."""
    return Maxima(cta.slot("maxima", (QUANTIZING, 1), "fp32"), cta.sync("everybody", QUANTIZING))


def rows_of(regs: Registers, rows: int) -> Rows:
    d = regs.head_dim
    return Rows(
        regs.tile("given", (rows, d), regs.problem.output_dtype),
        regs.tile("x", (rows, d)),
        regs.rows("largest of the row", rows),
        regs.tile("scale", (1, 1)),
    )
