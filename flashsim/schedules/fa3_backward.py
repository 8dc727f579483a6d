"""FlashAttention-3, backward (Shah et al., arXiv 2407.08608, algorithm 3).

One CTA for each block of keys, warp-specialized: a producer keeps rings of Q and dO full by TMA, consumer warpgroups
compute the five products of FlashAttention-2's algorithm, and another warp adds dQ to HBM, so that they do not wait for
it. What overlaps inside a warpgroup: P under dP, dS through shared memory under dV, dQ's way out under dK.

Up to head dim 128 a warpgroup has 64 keys and computes S^T = K Q^T, so that P^T and dS^T are left operands in registers
(Mma_dKV_is_RS); at 192 and 256 it has columns of every product, and P goes through shared memory as well. Layouts and
tiles are hopper/flash_bwd_launch_template.h's, the order is hopper/mainloop_bwd_sm90_tma_gmma_ws.hpp's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Grid, Kernel, Role
from flashsim.schedules.fa2_backward import WORKSPACE, FA2Backward, no_memory
from flashsim.schedules.tensors import Tensor
from flashsim.schedules.verbs import CTA, Awaitable, Operand, Order, Program, Registers, Ring, Sync, Warpgroup, WorkTile

WIDTHS = (64, 96, 128, 192, 256)
"""Head dims that have kernels; the tiles of others are wider, with zeros (round_up_headdim, flash_api.cpp)."""
SUMS = {
    "dK_accum": Tensor("keys", "head_dim", "fp32", heads="kv"),
    "dV_accum": Tensor("keys", "head_dim_v", "fp32", heads="kv"),
}
"""With grouped heads, dK and dV summed over the query heads of a group."""


def tile_size(head_dim: int, masked: bool) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) as hopper/flash_bwd_launch_template.h has them."""
    if head_dim <= 96:
        return 128 if head_dim <= 64 else 64, 128
    if head_dim <= 128:
        return 64 if masked else 80, 128
    return 64, 96 if head_dim <= 192 else 80


def product(wg: Warpgroup, a: Any, b: Any, into: Any, swapped: bool = False, accumulate: bool = False) -> Awaitable:
    """into = a b; `swapped`: as into^T = b^T a^T, since of wgmma's left operand the rows must be multiples of 64."""
    if swapped:
        a, b, into = b.T, a.T, into.T
    return wg.gemm(a, b, into=into, accumulate=accumulate)


@dataclass
class Shared:
    """What the warps of one CTA share. P is None where it stays in registers, dQ where it goes to HBM from there."""

    K: Ring
    V: Ring
    Q: Ring
    LSE: Ring
    dO: Ring
    D: Ring
    P: Any
    dS: list[Operand]
    PdS: Sync
    dQ: Any
    dQ_full: list[Sync]
    dQ_empty: list[Sync]
    order: Order
    dK: Ring
    dV: Ring
    consumers: Sync


@dataclass
class Fragments:
    """The register tiles of one consumer; those of scores are (queries, keys), however they are computed. P and dS are
    None where they go to shared memory, V but at head dim 96 (Mma_dP_is_RS)."""

    S: Operand
    dP: Operand
    P: Any
    dS: Any
    dQ: Operand
    dK: Operand
    dV: Operand
    V: Any


@dataclass(frozen=True)
class FA3Backward:
    """The launches of the backward pass. `head_dim`: the larger one of the problem."""

    BLOCK_M: int
    BLOCK_N: int
    deterministic: bool
    head_dim: int

    @property
    def width(self) -> int:
        """Columns of the tiles of Q, K, V and dO."""
        return next((width for width in WIDTHS if self.head_dim <= width), self.head_dim)

    @property
    def wide(self) -> bool:
        """SdP_swapAB and Mma_dKV_is_RS where not; dKV_swapAB, and one stage of dO, P and dS, where so."""
        return self.width > 128

    @property
    def consumers(self) -> int:
        """NumMmaWarpGroups."""
        return 3 if self.width == 192 else 2

    @property
    def dq_by_rows(self) -> bool:
        """AtomLayoutMdQ = 2: a consumer has half of the queries of dQ; otherwise some of its columns."""
        return self.width == 64

    @property
    def dq_swapped(self) -> bool:
        """dQ_swapAB: where a consumer's queries of dQ are no multiple of 64, and at head dim 256."""
        return self.BLOCK_M // (2 if self.dq_by_rows else 1) % 64 > 0 or self.width == 256

    @property
    def by_tma(self) -> bool:
        """dQacc_use_TMA: dQ has a place in shared memory; at head dim 256 the consumers themselves add it to HBM."""
        return self.width < 256

    def complaints(self, problem: AttentionProblem) -> list[str]:
        """What wgmma cannot do, one line each: 64 rows of a left operand, multiples of 16 along k and 8 of columns."""
        M, N, width = self.BLOCK_M, self.BLOCK_N, self.width
        if width not in WIDTHS:
            return [f"head dim {width}, the backward pass has tiles of up to {WIDTHS[-1]} columns"]
        lines = []
        if self.deterministic and (not self.by_tma or problem.heads_per_kv > 1):
            lines.append(f"deterministic is for head dims up to {WIDTHS[-2]}, and for heads that share no KV head")
        step = 64 if width in (96, 192, 256) else 16
        if M % step or not step <= M <= 256:
            lines.append(f"bwd_BLOCK_M = {M}, allowed at head dim {width} are the multiples of {step} up to 256")
        keys = [k for k in range(16, 257, 16) if k % (8 * self.consumers) == 0] if self.wide else [128]
        if N not in keys:
            lines.append(f"bwd_BLOCK_N = {N}, allowed at head dim {width}: {', '.join(map(str, keys))}")
        return lines

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        """What comes before and after is as in FlashAttention-2; hopper/flash_bwd_preprocess_kernel.h also writes LSE
        times log2(e), which `exp_lse` has no need of."""
        grouped = problem.heads_per_kv > 1
        d, M, N = self.width, self.BLOCK_M, self.BLOCK_N
        tile: dict[str, Any] = {"BLOCK_M": M, "BLOCK_N": N, "mma": "wgmma", "head_dim": d, "head_dim_v": d}
        kernel: Callable[..., Kernel] = partial(Kernel, workspace=WORKSPACE | (SUMS if grouped else {}), **tile)
        other = FA2Backward(M, N, 2, False, d, d, "mma.sync")

        def simple(name: str, program: Callable[..., Program], grid: Grid) -> Kernel:
            registers = other.query_rows if grid.over == "queries" else self.sum_registers
            role = Role("warps", program, 2, registers=registers)
            return kernel(f"fa3_bwd_{name}", (role,), no_memory, grid, copy="cp.async", walk="none")

        # Registers of a thread, as the code sets them with setmaxnreg. Of the producer's warpgroup, one warp loads, one
        # adds dQ, and two do nothing.
        limit, low = {2: (240, 24), 3: (160, 32)}[self.consumers]
        consumer = Role("consumer", self.consumer, self.consumers, 4, self.registers, limit)
        producer = Role("producer", self.producer, warps=2, registers_per_thread=low)
        writer = Role("dQ writer", self.dq_writer, warps=2, registers_per_thread=low)
        roles = (producer, writer, consumer) if self.by_tma else (producer, consumer)
        main = kernel("fa3_bwd", roles, self.shared, Grid(over="keys"), copy="tma")
        before, after = simple("preprocess", other.preprocess, Grid()), simple("convert_dq", other.convert_dq, Grid())
        launches, by_head = [before, main, after], Grid(over="keys", heads="kv")
        for name in ("dK", "dV") if grouped else ():
            launches.insert(1, simple(f"clear_{name.lower()}", partial(self.clear, name), by_head))
            launches.append(simple(f"convert_{name.lower()}", partial(self.convert, name), by_head))
        return tuple(launches)

    # What is kept in shared memory and registers.

    def shared(self, cta: CTA) -> Shared:
        M, N, d, warpgroups = self.BLOCK_M, self.BLOCK_N, self.width, self.consumers
        stages = 1 if self.wide else 2  # of dO, of dS; Q has two
        writers = range(warpgroups if self.by_tma else 0)
        return Shared(
            K=(K := cta.ring("K", (N, d), 1, warpgroups)),
            V=(V := cta.ring("V", (N, d), 1, warpgroups)),
            Q=cta.ring("Q", (M, d), 2, warpgroups),
            LSE=cta.ring("LSE", (M, 1), 2, warpgroups, "fp32"),
            dO=cta.ring("dO", (M, d), stages, warpgroups),
            D=cta.ring("D", (M, 1), stages, warpgroups, "fp32"),
            P=cta.slot("P", (M, N)) if self.wide else None,
            dS=[cta.slot(f"dS[{n}]", (M, N)) for n in range(stages)],
            PdS=cta.sync("PdS", warpgroups),
            dQ=cta.slot("dQ", (M, d), "fp32") if self.by_tma else None,
            dQ_full=[cta.sync(f"dQ{n}.full", 2) for n in writers],
            dQ_empty=[cta.sync(f"dQ{n}.empty", 2) for n in writers],
            order=cta.order("dQ", 1),
            dK=cta.overlay("dK", (N, d), 1, over=K),
            dV=cta.overlay("dV", (N, d), 1, over=V),
            consumers=cta.sync("consumers", warpgroups),
        )

    def registers(self, regs: Registers) -> Fragments:
        M, N, d, parts = self.BLOCK_M, self.BLOCK_N // self.consumers, self.width, self.consumers
        dQ = (M // parts, d) if self.dq_by_rows else (M, d // parts // (1 if self.by_tma else 2))
        if self.wide:
            # S and dP are dead when P and dS are in shared memory, and dQ takes their place: 32 registers, of which the
            # two have 32 and, at head dim 256, where there are some to spare, 40.
            both = regs.tile("dQ", dQ)
            S, dP = regs.tile("S", (M, N), over=both), regs.tile("dP", (M, N), over=both)
            dK, dV = (regs.tile(name, (self.BLOCK_N, d // parts)) for name in ("dK", "dV"))
            return Fragments(S, dP, None, None, both, dK, dV, None)
        S, dP = regs.tile("S", (M, N)), regs.tile("dP", (M, N))
        # P and dS together are as large as dP.
        P, dS = (regs.tile(name, (M, N), regs.problem.dtype, over=dP) for name in ("P", "dS"))
        dK, dV = (regs.tile(name, (N, d)) for name in ("dK", "dV"))
        V = regs.tile("V", (N, d), regs.problem.dtype) if d == 96 else None
        return Fragments(S, dP, P, dS, regs.tile("dQ", dQ, over=S), dK, dV, V)

    # The five products: algorithm 3, one block of keys.

    def producer(self, warp: Warpgroup, s: Shared, _: Any) -> Program:
        """Lines 2 to 9. A slot of LSE is free when that of Q is, one of D when that of dO is."""
        for tile in warp.tiles():
            for i in warp.q_tiles(tile):
                yield s.Q.empty(i)
                warp.load(tile.Q(i), into=s.Q[i])
                warp.load(tile.LSE(i), into=s.LSE[i])
                if i == tile.first:
                    warp.load(tile.K, into=s.K[tile.index])
                    warp.load(tile.V, into=s.V[tile.index])
                yield s.dO.empty(i)
                warp.load(tile.dO(i), into=s.dO[i])
                warp.load(tile.D(i), into=s.D[i])

    def consumer(self, wg: Warpgroup, s: Shared, r: Fragments) -> Program:
        """Lines 10 to 26."""
        keys = (wg.index * self.BLOCK_N // self.consumers, self.BLOCK_N // self.consumers)
        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r.dK)
            wg.map("fill", 0.0, into=r.dV)
            K, V = s.K[tile.index], s.V[tile.index].rows(*keys)
            if tile.count:
                yield s.K.full(tile.index)
                yield s.V.full(tile.index)
                if r.V:
                    wg.map("copy", V, into=r.V)
                    V = r.V
            for i in wg.q_tiles(tile):
                yield s.Q.full(i)
                S = product(wg, s.Q[i], K.rows(*keys).T, r.S, not self.wide)  # S = Q K^T, issued and not awaited
                yield s.dO.full(i)
                dP = product(wg, s.dO[i], V.T, r.dP, not self.wide)  # dP = dO V^T, issued and not awaited
                yield S
                yield s.LSE.full(i)
                if tile.partial(i):
                    wg.map("mask", r.S, tile, i, 0, keys[0], into=r.S)
                wg.map("exp_lse", r.S, s.LSE[i], into=r.S)  # P = exp(S - LSE), under dP
                if self.wide:
                    yield s.PdS.wait()  # nobody reads P of the step before any more
                    wg.convert(r.S, into=s.P.columns(*keys))
                yield dP
                yield s.D.full(i)
                wg.map("sub", r.dP, s.D[i], into=r.dP)
                wg.map("mul", r.dP, r.S, into=r.dP)  # dS = P o (dP - D)
                dS = s.dS[i % len(s.dS)]
                if not self.wide:
                    # The code converts P before it waits for dP. There, S, dP and both of 16 bits take more registers
                    # than there are at head dims 64 and 128: the compiler has to convert P here.
                    wg.convert(r.dP, into=r.dS)
                    wg.convert(r.S, into=r.P)
                    wg.convert(r.dS, into=dS.columns(*keys))
                else:
                    yield s.PdS.wait()  # all of P is there
                    wg.convert(r.dP, into=dS.columns(*keys))
                yield from (self.rest_of_step if self.by_tma else self.rest_of_step_in_slices)(wg, s, r, tile, i)
                s.LSE.release(i)
                s.Q.release(i)
            if tile.count:
                s.K.release(tile.index)
                s.V.release(tile.index)
            wg.map("scale", r.dK, into=r.dK)
            yield from self.write_output(wg, s, r, tile)

    def rest_of_step(self, wg: Warpgroup, s: Shared, r: Fragments, tile: WorkTile, i: int) -> Program:
        """dV, dQ and dK, each issued before the one before it is awaited."""
        columns, all_dS, K = self.my_columns(wg.index), s.dS[i % len(s.dS)], s.K[tile.index]
        P, dS = (s.P, all_dS) if self.wide else (r.P, r.dS)
        dV = product(wg, P.T, s.dO[i].columns(*columns), r.dV, self.wide, accumulate=True)  # dV += P^T dO
        yield s.PdS.wait()  # all of dS is there
        a, b = (self.my_dq(wg.index, all_dS), K) if self.dq_by_rows else (all_dS, self.my_dq(wg.index, K))
        dQ = product(wg, a, b, r.dQ, self.dq_swapped)  # dQ = dS K
        yield dV
        s.D.release(i)
        s.dO.release(i)
        dK = product(wg, dS.T, s.Q[i].columns(*columns), r.dK, self.wide, accumulate=True)  # dK += dS^T Q
        yield dQ
        if i > tile.first:
            yield s.dQ_empty[wg.index].wait()  # dQ of the step before is on its way
        wg.convert(r.dQ, into=self.my_dq(wg.index, s.dQ))
        s.dQ_full[wg.index].wait()  # says so, and goes on
        yield dK

    def rest_of_step_in_slices(self, wg: Warpgroup, s: Shared, r: Fragments, tile: WorkTile, i: int) -> Program:
        """The same for half of a consumer's columns at a time (Slice_dQKV_Mma): there is no room for all of dQ."""
        (first, count), (dS,) = self.my_columns(wg.index), s.dS

        def half(n: int, operand: Any, first: int = first) -> Any:
            return operand.columns(first + n * count // 2, count // 2)

        def dV(n: int) -> Awaitable:  # noqa: N802
            return product(wg, s.P.T, half(n, s.dO[i]), half(n, r.dV, 0), swapped=True, accumulate=True)

        def dQ(n: int) -> Awaitable:  # noqa: N802
            return product(wg, dS, half(n, s.K[tile.index]), r.dQ, self.dq_swapped)

        def dK(n: int) -> Awaitable:  # noqa: N802
            return product(wg, dS.T, half(n, s.Q[i]), half(n, r.dK, 0), swapped=True, accumulate=True)

        dV(0)
        yield s.PdS.wait()  # all of dS is there
        first_dQ, last_dV = dQ(0), dV(1)
        yield first_dQ
        wg.atomic_add(r.dQ, into=half(0, tile.dQ_accum(i)))
        dK(0)
        yield last_dV
        s.D.release(i)
        s.dO.release(i)
        yield dQ(1)
        wg.atomic_add(r.dQ, into=half(1, tile.dQ_accum(i)))
        yield dK(1)

    def my_columns(self, index: int) -> tuple[int, int]:
        """Those of dK and dV that a consumer has: all of its keys, or some of all keys."""
        return (index * self.width // self.consumers, self.width // self.consumers) if self.wide else (0, self.width)

    def my_dq(self, index: int, tile: Any) -> Any:
        """The part of dQ that a consumer has: some rows of the queries, or some columns."""
        size = (self.BLOCK_M if self.dq_by_rows else self.width) // self.consumers
        return (tile.rows if self.dq_by_rows else tile.columns)(index * size, size)

    def dq_writer(self, warp: Warpgroup, s: Shared, _: Any) -> Program:
        """Line 25: adds each consumer's part of dQ to HBM, as soon as it is there."""
        for tile in warp.tiles():
            for i in warp.q_tiles(tile):
                if self.deterministic:
                    yield s.order.turn(tile, i)  # after the blocks of keys before this one
                added = []
                for index, full in enumerate(s.dQ_full):
                    yield full.wait()
                    added.append(warp.atomic_add(self.my_dq(index, s.dQ), into=self.my_dq(index, tile.dQ_accum(i))))
                for index, empty in enumerate(s.dQ_empty):
                    yield added[index]
                    if i < tile.last:
                        empty.wait()  # says so, and goes on
                if self.deterministic:
                    s.order.pass_on(tile, i)

    def write_output(self, wg: Warpgroup, s: Shared, r: Fragments, tile: WorkTile) -> Program:
        """dK and dV go to HBM through the shared memory of K and V, by TMA."""

        def mine(whole: Any) -> Any:
            rows = self.BLOCK_N // self.consumers
            return whole.columns(*self.my_columns(wg.index)) if self.wide else whole.rows(wg.index * rows, rows)

        if wg.problem.heads_per_kv > 1:
            if tile.count:  # the code adds from shared memory: 32 bits, for which there is room where K and V were
                wg.atomic_add(r.dV, into=mine(tile.dV_accum))
                wg.atomic_add(r.dK, into=mine(tile.dK_accum))
            return
        if not tile.count:  # no query sees these keys
            wg.store(r.dV, into=mine(tile.dV))
            wg.store(r.dK, into=mine(tile.dK))
            return
        yield s.consumers.wait()  # nobody reads K and V any more
        wg.convert(r.dV, into=mine(s.dV[tile.index]))
        wg.convert(r.dK, into=mine(s.dK[tile.index]))
        yield s.consumers.wait()  # all of dK and dV is there
        if wg.index == self.consumers - 1:
            wg.store(s.dV[tile.index], into=tile.dV)
            yield wg.store(s.dK[tile.index], into=tile.dK)
            s.dV.release(tile.index)
            s.dK.release(tile.index)

    # The sums over the query heads of a group, before and after.

    def sum_registers(self, regs: Registers) -> Operand:
        return regs.tile("sum", (self.BLOCK_N // 2, self.width))

    def clear(self, name: str, wg: Warpgroup, s: None, r: Operand) -> Program:
        """torch.zeros in mha_bwd, hopper/flash_api.cpp."""
        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r)
            yield wg.store(r, into=getattr(tile, f"{name}_accum").rows(wg.index * r.shape[0], r.shape[0]))

    def convert(self, name: str, wg: Warpgroup, s: None, r: Operand) -> Program:
        """hopper/flash_bwd_postprocess_kernel.h."""
        for tile in wg.tiles():
            yield wg.load(getattr(tile, f"{name}_accum").rows(wg.index * r.shape[0], r.shape[0]), into=r)
            wg.store(r, into=getattr(tile, name).rows(wg.index * r.shape[0], r.shape[0]))
