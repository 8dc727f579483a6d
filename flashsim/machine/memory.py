"""HBM and the L2 cache behind all SMs."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Protocol

from flashsim.engine import Server, Simulation
from flashsim.machine.costs import Costs

Key = tuple[str, int, int, int, int, int]
"""Names a tile: tensor, batch, head, first row, first column, split."""


class Memory(Protocol):
    """What an SM needs to know of the memory behind it."""

    latency: int
    """Ticks from a request to data that L2 holds, the time of the bytes apart."""

    def fetch(self, key: Key, size_byte: int, sharers: int) -> int:
        """Tick from which L2 can send a tile that is asked for now; `sharers` CTAs receive what one read sends."""

    def write(self, key: Key, size_byte: int) -> int:
        """A tile arrives at L2, and goes on to HBM; returns the tick at which L2 has room for it."""

    def add(self, key: Key, size_byte: int) -> int:
        """The same for a tile that is added to what is there."""


class SharedMemory:
    """One L2 and one HBM for all SMs.

    L2 holds whole tiles, the least recently used leave first; a tile on its way from HBM is waited for, not fetched
    again. Timing assumption: HBM serves tile after tile at its achievable rate; its latency beyond L2's comes on top.
    What is written takes room in L2 and a share of the HBM rate at once, though the hardware writes it back later, and
    costs HBM nothing when it is written again while L2 has it; whoever writes waits when HBM is behind by more than L2
    holds. Atomic additions are done in L2, at its rate.
    """

    def __init__(
        self,
        sim: Simulation,
        costs: Costs,
        tma: bool,
        seed: int,
        held: OrderedDict[Key, tuple[int, int, bool]] | None = None,
    ) -> None:
        """`held` is what L2 holds from a launch before, and what it holds after this one."""
        m, t = costs.device.memory, costs.device.tma
        l2_ns, hbm_ns = (t.l2_latency_ns, t.hbm_latency_ns) if tma and t else (m.l2_latency_ns, m.hbm_latency_ns)
        self.sim = sim
        self.latency = costs.ns(l2_ns)
        self.miss = costs.ns(hbm_ns) - self.latency
        """Ticks by which a tile that L2 does not hold comes later, the time of its bytes apart."""
        self._capacity = m.l2_share_byte
        self._tiles: OrderedDict[Key, tuple[int, int, bool]] = OrderedDict() if held is None else held
        """Tile to (bytes, tick at which it is complete, is it newer than HBM's), the least recently used first."""
        for key, (size, _, newer) in self._tiles.items():
            self._tiles[key] = (size, 0, newer)
        self._held = sum(size for size, _, _ in self._tiles.values())
        self.hbm = Server(sim, "hbm")
        self.l2 = Server(sim, "l2")
        self._hbm_rate = costs.byte_rate(m.hbm_byte_per_ns)
        self._write_back = self._hbm_rate(self._capacity)
        """By how many ticks HBM may be behind with what is written: as much as L2 holds."""
        self._l2_rate = costs.byte_rate(m.l2_byte_per_ns)
        self._spread = costs.ns(m.jitter_ns)
        self._random = Random(seed)
        self.read_byte = Counter[str]()
        """By tensor."""
        self.written_byte = Counter[str]()

    def accounts(self, tensor: str) -> Counter[tuple[str, str]]:
        """Bytes of a tensor that have been read and written, and ticks for which HBM and L2 have been busy."""
        return Counter(
            {
                (tensor, "read"): self.read_byte[tensor],
                (tensor, "written"): self.written_byte[tensor],
                (tensor, "hbm"): self.hbm.busy,
                (tensor, "l2"): self.l2.busy,
            }
        )

    def account(self, tensor: str, what: str, amount: int) -> None:
        """Add to these, without any time."""
        if what in ("read", "written"):
            (self.read_byte if what == "read" else self.written_byte)[tensor] += amount
        else:
            (self.hbm if what == "hbm" else self.l2).busy += amount

    def fetch(self, key: Key, size_byte: int, sharers: int) -> int:
        now = self.sim.now
        held = self._tiles.get(key)
        if held is None:
            ready = self.hbm.serve(self._hbm_rate(size_byte)) + self.miss + self._random.randrange(self._spread + 1)
            self.read_byte[key[0]] += size_byte
            self._keep(key, size_byte, ready, newer=False)
        else:
            ready = held[1]
            self._tiles.move_to_end(key)
        return self.l2.serve_from(now, self._l2_rate(size_byte // sharers)) if ready <= now else ready

    def write(self, key: Key, size_byte: int) -> int:
        held = self._tiles.get(key)
        written = self.hbm.free
        if held is None or not held[2]:
            written = self.hbm.serve(self._hbm_rate(size_byte))
            self.written_byte[key[0]] += size_byte
        self._keep(key, size_byte, self.sim.now, newer=True)
        return max(self.sim.now, written - self._write_back)

    def add(self, key: Key, size_byte: int) -> int:
        if key not in self._tiles:
            self.hbm.serve(self._hbm_rate(size_byte))
            self.read_byte[key[0]] += size_byte
        added = self.l2.serve(self._l2_rate(size_byte))
        return max(added, self.write(key, size_byte))

    def _keep(self, key: Key, size_byte: int, ready: int, newer: bool) -> None:
        if key in self._tiles:
            self._held -= self._tiles.pop(key)[0]
        self._tiles[key] = (size_byte, ready, newer)
        self._held += size_byte
        while self._held > self._capacity:
            self._held -= self._tiles.popitem(last=False)[1][0]


class PrivateMemory:
    """Memory that no other SM uses: what work tiles have in common is in L2, what only one reads is not, and only the
    SM's own link limits the rate."""

    def __init__(self, sim: Simulation, costs: Costs, tma: bool, is_common: Callable[[str], bool]) -> None:
        m, t = costs.device.memory, costs.device.tma
        l2_ns, hbm_ns = (t.l2_latency_ns, t.hbm_latency_ns) if tma and t else (m.l2_latency_ns, m.hbm_latency_ns)
        self.sim = sim
        self.latency = costs.ns(l2_ns)
        self.miss = costs.ns(hbm_ns) - self.latency
        self._is_common = cache(is_common)

    def fetch(self, key: Key, size_byte: int, sharers: int) -> int:
        return self.sim.now + (0 if self._is_common(key[0]) else self.miss)

    def write(self, key: Key, size_byte: int) -> int:
        return self.sim.now

    def add(self, key: Key, size_byte: int) -> int:
        return self.sim.now
