"""FlashAttention-2's forward loop as Triton's compiler pipelines it: `kernels/fa2.py`.

The text of the kernel has one K and one V tile. The compiler gives each `num_stages` buffers (one less for mma.sync,
which has read a tile when the step is over), loads tiles `num_stages` - 1 steps ahead and waits for both of a step at
its begin, where the published kernel waits for V after the first product. A wgmma product O += P V is awaited in the
next step, with the QK product of that step. Read from the compiled loops (TTGIR of Triton 3.6 and 3.9).
"""

from __future__ import annotations

from dataclasses import dataclass

from flashsim.problem import AttentionProblem
from flashsim.schedules.softmax import Statistics, finish, online_softmax, rescale, start
from flashsim.schedules.verbs import CTA, Awaitable, Operand, Program, Registers, Sync, Warpgroup, WorkTile


@dataclass
class Shared:
    """What the warpgroups of one CTA share."""

    Q: Operand
    K: list[Operand]
    V: list[Operand]
    everybody: Sync


@dataclass
class Fragments:
    """The register tiles of one warpgroup."""

    S: Operand
    P: Operand
    O: Operand  # noqa: E741 - the paper's name
    stats: Statistics


@dataclass(frozen=True)
class FA2Triton:
    """Role, memory and program of the forward kernel."""

    BLOCK_M: int
    BLOCK_N: int
    num_stages: int
    warpgroups: int
    mma: str

    def complaints(self, problem: AttentionProblem) -> list[str]:
        """What the kernel does not have."""
        lines = [f"impl = triton has no {what}" for what, asked in (("dropout", problem.dropout > 0),) if asked]
        for name, value in (("BLOCK_M", self.BLOCK_M), ("BLOCK_N", self.BLOCK_N)):
            if value & (value - 1):
                lines.append(f"{name} = {value}, must be a power of two, as all tiles of Triton are")
        if not 2 <= self.num_stages <= 8:
            lines.append(f"num_stages = {self.num_stages}, allowed are 2 to 8")
        return lines

    @property
    def buffers(self) -> int:
        return self.num_stages if self.mma == "wgmma" else self.num_stages - 1

    def shared(self, cta: CTA) -> Shared:
        return Shared(
            Q=cta.slot("Q", (self.BLOCK_M, cta.head_dim)),
            K=[cta.slot(f"K[{n}]", (self.BLOCK_N, cta.head_dim)) for n in range(self.buffers)],
            V=[cta.slot(f"V[{n}]", (self.BLOCK_N, cta.head_dim_v)) for n in range(self.buffers)],
            everybody=cta.sync("everybody", self.warpgroups),
        )

    def registers(self, regs: Registers) -> Fragments:
        rows = self.BLOCK_M // self.warpgroups
        return Fragments(
            S=regs.tile("S", (rows, self.BLOCK_N)),
            P=regs.tile("P", (rows, self.BLOCK_N), regs.problem.dtype),
            O=regs.tile("O", (rows, regs.head_dim_v)),
            stats=Statistics.declare(regs, rows),
        )

    def program(self, wg: Warpgroup, s: Shared, r: Fragments) -> Program:
        """Algorithm 1 of the paper; the numbers are its lines."""
        rows, ahead = self.BLOCK_M // self.warpgroups, self.num_stages - 1
        mine = (wg.index * rows, rows)
        for tile in wg.tiles():
            start(wg, r.O, r.stats)  # 5
            kv: dict[int, tuple[Awaitable, Awaitable]] = {}
            if tile.count:
                q = wg.load(tile.Q.rows(*mine), into=s.Q.rows(*mine))  # 4
                for j in range(tile.first, min(tile.first + ahead, tile.last + 1)):
                    kv[j] = self.load(wg, s, tile, j)
                yield q
            for j in wg.kv_tiles(tile):  # 6
                K, V = s.K[j % self.buffers], s.V[j % self.buffers]
                k, v = kv.pop(j)
                yield k  # 7
                yield v
                yield s.everybody.wait()  # everyone's part of K_j and V_j is there
                yield wg.gemm(s.Q.rows(*mine), K.T, into=r.S)  # 8: S = Q K_j^T, and the PV before it: they end in order
                online_softmax(wg, r.S, r.stats, tile, j, masked=tile.partial(j))  # 9
                rescale(wg, r.O, r.stats)
                wg.convert(r.S, into=r.P)
                pv = wg.gemm(r.P, V, into=r.O, accumulate=True)  # 10: O = diag(alpha) O + P V_j
                yield s.everybody.wait()  # nobody reads the tiles any more that the loads overwrite
                if j + ahead <= tile.last:
                    kv[j + ahead] = self.load(wg, s, tile, j + ahead)
            if tile.count:
                yield pv
            finish(wg, r.O, r.stats)  # 12, 13
            wg.store(r.O, into=tile.O.rows(*mine))  # 14
            wg.store(r.stats.l, into=tile.LSE.rows(*mine))  # 15

    def load(self, wg: Warpgroup, s: Shared, tile: WorkTile, j: int) -> tuple[Awaitable, Awaitable]:
        """This warpgroup's rows of K_j and V_j, by cp.async."""
        keys = self.BLOCK_N // self.warpgroups
        mine, slot = (wg.index * keys, keys), j % self.buffers
        k = wg.load(tile.K(j).rows(*mine), into=s.K[slot].rows(*mine))
        return k, wg.load(tile.V(j).rows(*mine), into=s.V[slot].rows(*mine))
