"""FlashAttention-3, forward (Shah et al., arXiv 2407.08608, algorithms 1 and 2); `fa3_backward` has the backward pass.

One producer keeps rings of K and V tiles full by TMA; consumer warpgroups of 64 query rows each compute on them. Two
overlaps hide the softmax: inside a warpgroup, S_next = Q K_j^T and O += P V_{j-1} are issued together and the softmax
of S_next runs under the second product; between warpgroups, a turn on the tensor cores is handed round (ping-pong).

`build` is the code that was measured: 2024-07 (commit 7f67966c, the paper's) or 2025-01 (the refactored hopper/
folder).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel, Role, Schedule, switch
from flashsim.schedules.fa3_backward import FA3Backward
from flashsim.schedules.fa3_backward import tile_size as backward_tile_size
from flashsim.schedules.fa3_fp8 import FA3FP8
from flashsim.schedules.fa3_fp8 import tile_size as fp8_tile_size
from flashsim.schedules.fa3_three_stages import ThreeStages, keys_of_three_stages
from flashsim.schedules.launch import PUBLISHED, launch_parameters, power_of_two
from flashsim.schedules.softmax import Statistics, finish, online_softmax, rescale, start
from flashsim.schedules.verbs import CTA, Operand, Program, Registers, Ring, Sync, Turn, Warpgroup, WorkTile

OUR_KERNELS = {"gluon": "fa3_fwd", "triton": "fa3_triton_fwd"}
"""What the launch tables call them."""
NOT_IN_TRITON = ("P_in_shared", "pingpong", "persistent")
L2_SECTION_BYTE = 32 << 20
"""K and V of the heads that the longest-first order works on at a time (hopper/tile_scheduler.hpp: 32 MiB of L2)."""


@dataclass
class Shared:
    """What the warpgroups of one CTA share."""

    Q: Ring
    K: Ring
    V: Ring
    O: Ring  # noqa: E741 - the paper's name; lies over V
    P: list[Operand]
    turn: Turn
    consumers: Sync


@dataclass
class Fragments:
    """The register tiles of one consumer."""

    S: Operand
    S_next: Operand | None
    P: Operand | None
    O: Operand  # noqa: E741
    stats: Statistics


def tile_size(head_dim: int, masked: bool, build: str) -> tuple[int, int, bool]:
    """(BLOCK_M, BLOCK_N, P through shared memory) as hopper/tile_size.h has them; 2024-07 differs at head dim 64."""
    if head_dim <= 64:
        return (192, 128, False) if masked or build == "2024-07" else (192, 192, True)
    if head_dim <= 96:
        return (192, 128, True) if masked else (192, 144, True)
    if head_dim <= 128:
        return (128, 128, False) if masked else (128, 176, False)
    if head_dim <= 192:
        return (128, 112, False)
    return (128, 80, False)


@dataclass(frozen=True)
class FA3(Schedule):
    """FlashAttention-3, fp16, bf16 and fp8, Hopper."""

    title = "FlashAttention-3: warp specialization, ping-pong, GEMM-softmax overlap"
    source = "arXiv 2407.08608, algorithms 1 to 3; Dao-AILab/flash-attention hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp"
    architectures = ("hopper",)
    directions = ("fwd", "bwd", "fwd+bwd")
    dtypes = ("fp16", "bf16", "fp8")
    backward: ClassVar[type[FA3Backward]] = FA3Backward
    fp8: ClassVar[type[FA3FP8]] = FA3FP8
    three_stages: ClassVar[type[ThreeStages]] = ThreeStages

    build: str = switch("2025-01", "the published code that is simulated", ("2024-07", "2025-01"))
    impl: str = switch(
        PUBLISHED,
        "whose kernel, with its tiles; gluon: kernels/fa3.py, triton: kernels/fa3_triton.py",
        (PUBLISHED, "gluon", "triton"),
    )
    num_stages: int = switch(None, "slots of the K ring and of the V ring")
    warp_specialized: bool = switch(None, "loads by a producer, not by the consumers")
    pingpong: bool = switch(None, "warpgroups take turns on the tensor cores")
    intra_wg_overlap: bool = switch(None, "softmax of one tile under the PV product of the tile before")
    overlap_stages: int = switch(2, "KV tiles under way at a time: 2, or 3 as in the paper's appendix B.3")
    persistent: bool = switch(None, "as many CTAs as fit, each with many tiles")
    P_in_shared: bool = switch(None, "P goes to the PV product through shared memory, not registers")
    incoherent: str = switch(
        "off",
        "of fp8: Q and K come multiplied by a Hadamard matrix, by the kernel before or by one of their own",
        ("off", "fused", "separate"),
    )
    bwd_BLOCK_M: int = switch(None, "query rows of a tile of the backward pass")
    bwd_BLOCK_N: int = switch(None, "keys of a CTA's tile in the backward pass")
    deterministic: bool = switch(False, "CTAs add to dQ one after the other, in the order of their keys")

    def defaults(self, problem: AttentionProblem, architecture: str) -> dict[str, Any]:
        d, masked = max(self._widths(problem)), problem.mask_rule.kind != "full"
        launched = {"warp_specialized": True, "intra_wg_overlap": True} | self._launched(problem, architecture)
        known = launched | {name: given for name, given in self.options().items() if given is not None}
        overlap, specialized = known["intra_wg_overlap"], known["warp_specialized"]
        rows, keys, in_shared = tile_size(d, masked, self.build)
        if self.overlap_stages == 3:
            keys, in_shared = keys_of_three_stages(rows, d), False
        if problem.dtype == "fp8":
            (rows, keys), in_shared = fp8_tile_size(max(self._widths(problem))), False
        consumers = known.get("BLOCK_M", rows) // 64
        backward_rows, backward_keys = backward_tile_size(d, masked)
        published = {
            "BLOCK_M": rows,
            "BLOCK_N": keys,
            "num_stages": 2,
            "P_in_shared": in_shared,
            "pingpong": (consumers >= 2 and d <= 128) if overlap else (consumers == 2 and specialized),
            "persistent": specialized,
            "bwd_BLOCK_M": backward_rows,
            "bwd_BLOCK_N": backward_keys,
        }
        return published | launched

    def _launched(self, problem: AttentionProblem, architecture: str) -> dict[str, Any]:
        """What the launch table of our own kernel says of the switches."""
        if self.impl == PUBLISHED:
            return {}
        row = launch_parameters(self.impl, OUR_KERNELS[self.impl], problem, architecture)
        kinds = {switch.name: switch.type_name for switch in self.switches()}
        given = {name: bool(n) if kinds[name] == "bool" else n for name, n in row.items() if name in kinds}
        alike = {"P_in_shared": False} if self.impl == "gluon" else dict.fromkeys(NOT_IN_TRITON, False)
        return alike | given

    def complaints(self, problem: AttentionProblem) -> list[str]:
        lines = []
        if self.BLOCK_M not in (64, 128, 192):
            lines.append(f"BLOCK_M = {self.BLOCK_M}, allowed are 64, 128, 192: 64 rows for each of 1 to 3 consumers")
        if self.BLOCK_N % 16 or not 16 <= self.BLOCK_N <= 256:
            lines.append(f"BLOCK_N = {self.BLOCK_N}, allowed are the multiples of 16 from 16 to 256 (k, n of a wgmma)")
        if self.num_stages > 8:
            lines.append(f"num_stages = {self.num_stages}, allowed are 1 to 8")
        if self.overlap_stages not in (2, 3):
            lines.append(f"overlap_stages = {self.overlap_stages}, allowed are 2 and 3")
        if self.overlap_stages == 3:
            lines += self.three_stages().complaints(problem, self.options())
        if self.persistent and not self.warp_specialized:
            lines.append("persistent needs warp_specialized: the producer is what prefetches the next tile")
        if self.pingpong and not self.intra_wg_overlap and not self.warp_specialized:
            lines.append("pingpong without intra_wg_overlap needs warp_specialized: else turn and refill deadlock")
        if self.impl != PUBLISHED and (problem.dtype == "fp8" or "bwd" in problem.passes):
            lines.append(f"impl = {self.impl} is a forward pass in 16 bits; gradients come from fa2 with impl = triton")
        if problem.dtype == "fp8":
            lines += self._fp8(problem).complaints(problem, self.options())
        elif self.incoherent != "off":
            lines.append("incoherent is for fp8")
        return lines + (self._backward(problem).complaints(problem) if "bwd" in problem.passes else [])

    def _widths(self, problem: AttentionProblem) -> tuple[int, int]:
        """Head dims of the tiles (round_up_headdim in hopper/flash_api.cpp); 512 is none that fits."""
        if self.impl != PUBLISHED:
            return power_of_two(problem.head_dim), power_of_two(problem.head_dim_v)
        widths = (64, 96, 128, 192, 256, 512)
        d, dv = (next(w for w in widths if w >= given) for given in (problem.head_dim, problem.head_dim_v))
        return d, dv

    def _backward(self, problem: AttentionProblem) -> FA3Backward:
        head_dim = max(problem.head_dim, problem.head_dim_v)
        return self.backward(self.bwd_BLOCK_M, self.bwd_BLOCK_N, self.deterministic, head_dim)

    def _fp8(self, problem: AttentionProblem) -> FA3FP8:
        tile = self.BLOCK_M, self.BLOCK_N, self.num_stages
        return self.fp8(*tile, bool(self.pingpong), self.incoherent, *self._widths(problem))

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        if problem.dtype == "fp8":
            return self._fp8(problem).kernels(problem)
        d, dv = self._widths(problem)
        masked, consumers = problem.mask_rule.kind != "full", self.BLOCK_M // 64
        q_tiles = -(-problem.seqlen_q // self.BLOCK_M)
        multicast = not masked and d >= 128 and (self.build == "2024-07" or q_tiles % 2 == 0)
        multicast = multicast and self.impl == PUBLISHED
        # Registers of (consumers, producer) by the number of consumers, as the code sets them with setmaxnreg.
        limit, producer_limit = {1: (255, 56), 2: (240, 24), 3: (160, 32)}[consumers]
        # The code of 2024-07 spends a warpgroup on the producer; in both, one of its threads issues the loads.
        producer = Role("producer", self.producer, warps=4, registers_per_thread=producer_limit)
        consumer = Role("consumer", self.consumer, consumers, registers=self.registers, registers_per_thread=limit)
        order = Grid("longest_first", "dynamic", L2_SECTION_BYTE) if masked else Grid("rows", "static")
        forward = Kernel(
            name="fa3_fwd",
            roles=(producer, consumer) if self.warp_specialized else (consumer,),
            shared=self.shared,
            grid=order if self.persistent else Grid("rows", "cta"),
            BLOCK_M=self.BLOCK_M,
            BLOCK_N=self.BLOCK_N,
            mma="wgmma",
            copy="tma",
            head_dim=d,
            head_dim_v=dv,
            cluster=2 if multicast else 1,
        )
        launches: dict[str, tuple[Kernel, ...]] = {"fwd": (forward,)}
        if "bwd" in problem.passes:
            launches["bwd"] = self._backward(problem).kernels(problem)
        return tuple(kernel for name in problem.passes for kernel in launches[name])

    def shared(self, cta: CTA) -> Shared:
        consumers, d, dv = self.BLOCK_M // 64, cta.head_dim, cta.head_dim_v
        V = cta.ring("V", (self.BLOCK_N, dv), self.num_stages, consumers)
        return Shared(
            Q=cta.ring("Q", (self.BLOCK_M, d), 1, consumers),
            K=cta.ring("K", (self.BLOCK_N, d), self.num_stages, consumers),
            V=V,
            O=cta.overlay("O", (self.BLOCK_M, dv), 1, over=V),
            P=[cta.slot(f"P{i}", (64, self.BLOCK_N)) for i in range(consumers if self.P_in_shared else 0)],
            turn=cta.turn("turn", consumers if self.pingpong else 0),
            consumers=cta.sync("consumers", consumers),
        )

    def registers(self, regs: Registers) -> Fragments:
        return Fragments(
            S=regs.tile("S", (64, self.BLOCK_N)),
            S_next=regs.tile("S_next", (64, self.BLOCK_N)) if self.overlap_stages == 3 else None,
            P=None if self.P_in_shared else regs.tile("P", (64, self.BLOCK_N), regs.problem.dtype),
            O=regs.tile("O", (64, regs.head_dim_v)),
            stats=Statistics.declare(regs, 64),
        )

    def producer(self, warp: Warpgroup, s: Shared, _: Any) -> Program:
        """Algorithm 1, lines 2 to 10. K runs one tile ahead of V, since a consumer wants K_j before V_{j-1}."""
        for tile in warp.tiles():
            for j in warp.kv_tiles(tile):
                yield s.K.empty(j)  # 7: until stage j mod s is consumed
                warp.load(tile.K(j), into=s.K[j])  # 8: issue; 9: the slot is full when the load has landed
                if j == tile.first:
                    yield s.Q.empty(tile.index)
                    warp.load(tile.Q, into=s.Q[tile.index])  # 4
                    yield s.O.empty(tile.index)  # the O of the tile before has left the memory that V needs
                else:
                    yield s.V.empty(j - 1)
                    warp.load(tile.V(j - 1), into=s.V[j - 1])
            if tile.count:
                yield s.V.empty(tile.last)
                warp.load(tile.V(tile.last), into=s.V[tile.last])

    def consumer(self, wg: Warpgroup, s: Shared, r: Fragments) -> Program:
        """Algorithm 1, lines 11 to 25, one work tile after the other."""
        for tile in wg.tiles():
            start(wg, r.O, r.stats)
            if tile.count:
                yield from self.first_loads(wg, s, tile)
                if not self.intra_wg_overlap:
                    yield from self.attend_in_order(wg, s, r, tile)
                elif self.overlap_stages == 3:
                    yield from self.three_stages().attend(wg, s, r, tile)
                else:
                    yield from self.attend(wg, s, r, tile)
                yield from self.write_output(wg, s, r, tile)
            else:  # every key is masked: 0 and -inf
                finish(wg, r.O, r.stats)
                wg.store(r.O, into=tile.O.rows(64 * wg.index, 64))
                wg.store(r.stats.l, into=tile.LSE.rows(64 * wg.index, 64))

    def attend(self, wg: Warpgroup, s: Shared, r: Fragments, tile: WorkTile) -> Program:
        """Algorithm 2: the softmax of one KV tile runs under the PV product of the tile before."""
        first_in_turn = self.build == "2024-07"
        rescale_early = self.build == "2024-07" or wg.problem.head_dim > 128
        Q, P = s.Q[tile.index].rows(64 * wg.index, 64), r.P or s.P[wg.index]
        j = tile.first
        yield s.Q.full(tile.index)  # 3
        yield s.K.full(j)
        if first_in_turn:
            yield s.turn.wait()
        qk = wg.gemm(Q, s.K[j].T, into=r.S)  # 4: S_cur = Q K_0^T
        if first_in_turn:
            s.turn.pass_on()
        yield qk
        s.K.release(j)  # 5
        yield from self.refill(wg, s, tile, s.K, tile.K, j)
        online_softmax(wg, r.S, r.stats, tile, j, masked=True)  # 6: the code always masks the first tile
        wg.convert(r.S, into=P)
        for j in wg.kv_tiles(tile, start=1):  # 7
            yield s.K.full(j)  # 8
            yield s.turn.wait()
            qk = wg.gemm(Q, s.K[j].T, into=r.S)  # 9: S_next = Q K_j^T, issued and not awaited
            if rescale_early:
                rescale(wg, r.O, r.stats)
            yield s.V.full(j - 1)  # 10
            pv = wg.gemm(P, s.V[j - 1], into=r.O, accumulate=True)  # 11: O += P_cur V_{j-1}, issued and not awaited
            s.turn.pass_on()
            yield qk  # 12
            s.K.release(j)
            yield from self.refill(wg, s, tile, s.K, tile.K, j)
            online_softmax(wg, r.S, r.stats, tile, j, masked=tile.partial(j))  # 13: runs under 11
            yield pv  # 14
            s.V.release(j - 1)  # 15
            yield from self.refill(wg, s, tile, s.V, tile.V, j - 1)
            wg.convert(r.S, into=P)  # 16: P_cur = P_next
            if not rescale_early:
                rescale(wg, r.O, r.stats)  # 14
        s.Q.release(tile.index)
        if rescale_early:
            rescale(wg, r.O, r.stats)
        yield s.V.full(tile.last)  # 18
        yield wg.gemm(P, s.V[tile.last], into=r.O, accumulate=True)  # 19
        s.V.release(tile.last)

    def attend_in_order(self, wg: Warpgroup, s: Shared, r: Fragments, tile: WorkTile) -> Program:
        """Algorithm 1, lines 14 to 23: one product at a time; the PV of one tile and the QK of the next share
        a turn."""
        Q, P = s.Q[tile.index].rows(64 * wg.index, 64), r.P or s.P[wg.index]
        yield s.Q.full(tile.index)  # 14
        yield s.turn.wait()
        for j in wg.kv_tiles(tile):  # 15
            yield s.K.full(j)  # 16
            qk = wg.gemm(Q, s.K[j].T, into=r.S)  # 17
            s.turn.pass_on()
            yield qk
            s.K.release(j)
            yield from self.refill(wg, s, tile, s.K, tile.K, j)
            online_softmax(wg, r.S, r.stats, tile, j, masked=j == tile.first or tile.partial(j))  # 18, 19
            wg.convert(r.S, into=P)
            rescale(wg, r.O, r.stats)
            yield s.V.full(j)  # 20
            yield s.turn.wait()
            yield wg.gemm(P, s.V[j], into=r.O, accumulate=True)  # 21
            s.V.release(j)  # 22
            yield from self.refill(wg, s, tile, s.V, tile.V, j)
        s.turn.pass_on()
        s.Q.release(tile.index)

    def write_output(self, wg: Warpgroup, s: Shared, r: Fragments, tile: WorkTile) -> Program:
        """Lines 24 and 25: normalize; O goes to HBM through the shared memory of V, by one TMA store."""
        finish(wg, r.O, r.stats)
        wg.store(r.stats.l, into=tile.LSE.rows(64 * wg.index, 64))
        O = s.O[tile.index]  # noqa: E741
        yield s.consumers.wait()  # nobody reads V any more
        wg.convert(r.O, into=O.rows(64 * wg.index, 64))
        yield s.consumers.wait()  # all of O is there
        if wg.index == self.BLOCK_M // 64 - 1:
            yield wg.store(O, into=tile.O)
            s.O.release(tile.index)

    def first_loads(self, wg: Warpgroup, s: Shared, tile: WorkTile) -> Program:
        """Without a producer: the first consumer fills the rings before anyone starts."""
        if self.warp_specialized or wg.index:
            return
        wg.load(tile.Q, into=s.Q[tile.index])
        for j in range(tile.first, min(tile.first + self.num_stages, tile.last + 1)):
            yield s.K.empty(j)
            wg.load(tile.K(j), into=s.K[j])
            yield s.V.empty(j)
            wg.load(tile.V(j), into=s.V[j])

    def refill(
        self, wg: Warpgroup, s: Shared, tile: WorkTile, ring: Ring, source: Callable[[int], Operand], j: int
    ) -> Program:
        """Without a producer: once all consumers have released item j, the first one loads the item that follows there.

        No public kernel has warp specialization off; this is the smallest change that makes one (assumed).
        """
        if self.warp_specialized:
            return
        yield s.consumers.wait()
        following = j + self.num_stages
        if wg.index == 0 and following <= tile.last:
            yield ring.empty(following)
            wg.load(source(following), into=ring[following])
