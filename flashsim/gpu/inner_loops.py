"""What inner loops do for one tile: the loops of a kernel's roles put together, and counted.

Counts are warp instructions of a whole CTA; packed arithmetic counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flashsim.analysis.charges import Charges
from flashsim.gpu.compile import Compiled, Role
from flashsim.gpu.kernels import Need
from flashsim.gpu.sass import KINDS, MMA_NAMES, Code, Loop

COUNTED = {
    "max": ("FMNMX", "FMNMX3"),
    "shared_loads": ("LDS", "LDSM"),
    "shared_stores": ("STS", "STSM"),
    "copies": ("LDGSTS", "LDG"),
    "barriers": ("SYNCS", "BAR"),
    "shuffles": ("SHFL",),
}
"""What is counted beside KINDS, which `max` is a part of."""
TMA = ("UTMALDG", "UTMASTG")
"""Counted as they stand, as "tma": one thread of the CTA issues a copy."""
CHARGED_AS = {"pack": "convert"}
"""The simulator's names for instructions, where they are others than those of KINDS."""
OVERLAP_LEAST = 0.5
"""Of a loop's exponentials must stand between asynchronous products and the wait for them, to be called overlap."""
TILE_LOAD = 16
"""Bytes a lane of the loads that are counted as a tile's. Narrower ones are those of vectors, one value a row."""
THREADS = 32
"""Of a warp."""

Turn = list[tuple[Loop, int]]
"""Loops that run side by side, with the number of warps that run each."""


@dataclass(frozen=True)
class LoopReport:
    """One turn of an inner loop, divided by the tiles that it handles, summed over the warps of a CTA."""

    masked: bool
    """Tiles of which some scores do not count."""
    tiles: int
    """That one turn handles: more than 1 where a loop is unrolled."""
    mma: Mapping[str, float]
    """Tensor core instructions by name, as often as they are issued: by a warp, a warpgroup, or once."""
    flop: int
    """Of products."""
    exps: int
    """Exponentials, of all threads."""
    bytes: int
    """Loaded from global memory in tiles."""
    shared_bytes: int
    """Moved into shared memory and out of it: by copies, to registers, to tensor cores."""
    counts: Mapping[str, float]
    """Warp instructions by KINDS, "other", COUNTED and "tma"; "issue": all."""
    computing_warps: int
    """Those that have exponentials; products, where nobody has."""
    per_warp: Mapping[str, float]
    """Instructions of each of them, by KINDS, and "other"."""
    exps_in_flight: int | None
    """A thread's exponentials between the last MMA of a group and the wait that completes it, at the group of the loop
    that has most. None where products are not asynchronous in this sense (mma.sync, tcgen05)."""
    exps_in_loop: int
    """A thread's, to compare."""
    need: Need
    charged: Charges | None
    """What the simulator charges for a tile that is seen whole; None where it has no model of this kernel."""

    @property
    def overlap(self) -> str | None:
        """ "present" or "absent"; None where there is nothing to overlap with."""
        if self.exps_in_flight is None or not self.exps_in_loop:
            return None
        return "present" if self.exps_in_flight >= OVERLAP_LEAST * self.exps_in_loop else "absent"

    @property
    def ratios(self) -> dict[str, float]:
        """Counted over charged."""
        if self.charged is None:
            return {}
        told = {CHARGED_AS.get(name, name): n * self.charged.warps for name, n in self.charged.instructions.items()}
        told |= {"mma_flop": self.charged.mma_flop, "load_byte": self.charged.load_byte}
        told |= {"smem_byte": self.charged.smem_byte, "tma": self.charged.copies}
        counted = {"mma_flop": self.flop, "load_byte": self.bytes, "smem_byte": self.shared_bytes, **self.counts}
        return {name: counted[name] / value for name, value in told.items() if value}


def turns_of(kernel: Compiled, need: Need) -> list[Turn]:
    """Inner loops that belong together: one of each role of a warp-specialized kernel, else one.

    A kernel has several turns if it has loops of their own for masked tiles. A kernel without any loop is one turn.
    Raises ValueError if loops cannot be matched to roles.
    """
    code = kernel.code
    if not code.loops:
        return [[(code.whole(), kernel.num_warps)]]
    if len(kernel.roles) == 1:
        loops = [loop for loop in code.loops if ("mma" if need.flop else "exp") in _features(loop)]
        return [[(loop, kernel.num_warps)] for loop in loops or code.loops]
    groups: dict[frozenset[str], list[Loop]] = {}
    for loop in code.loops:
        able = [role.features for role in kernel.roles if role.features >= _features(loop)]
        if not able:
            raise ValueError(f"no role of the kernel has what an inner loop has: {_words(_features(loop))}")
        groups.setdefault(min(able, key=len), []).append(loop)
    roles = {features: [role for role in kernel.roles if role.features == features] for features in groups}
    for features, found in groups.items():
        if len(found) % len(roles[features]):
            raise ValueError(
                f"{len(found)} inner loops with {_words(features)} do not divide among {len(roles[features])} roles"
            )
    each = {features: len(found) // len(roles[features]) for features, found in groups.items()}
    count = max((n for features, n in each.items() if "mma" in features), default=1)
    if odd := [features for features, n in each.items() if n not in (1, count)]:
        raise ValueError(f"a role with {_words(odd[0])} has {each[odd[0]]} inner loops, one with products {count}")
    return [
        [one for features, found in groups.items() for one in _share(found, roles[features], turn)]
        for turn in range(count)
    ]


def _share(loops: Sequence[Loop], roles: Sequence[Role], turn: int) -> list[tuple[Loop, int]]:
    """Of each role the loop number `turn`, or its only one. A role's loops are neighbors.

    Roles that have the same, but other numbers of warps (on Blackwell one for the softmax, one that rescales O), are
    told apart by how many exponentials a thread has.
    """
    each = len(loops) // len(roles)
    if len({role.warps for role in roles}) > 1:
        if each > 1:
            raise ValueError(f"{len(loops)} inner loops cannot be told apart among {len(roles)} roles")
        loops = sorted(loops, key=lambda loop: loop.counts["MUFU.EX2"])
        roles = sorted(roles, key=lambda role: role.exps / role.warps)
    return [(loops[number * each + min(turn, each - 1)], role.warps) for number, role in enumerate(roles)]


def _features(loop: Loop) -> frozenset[str]:
    """What a role must have, to have the loop: see `compile.Role`."""
    counts = loop.counts
    found = {"mma": any(counts[name] for name in MMA_NAMES), "exp": counts["MUFU.EX2"], "tma": counts["UTMALDG"]}
    return frozenset(name for name, there in found.items() if there)


def _words(features: Iterable[str]) -> str:
    return ", ".join(sorted(features)) or "nothing known"


def loop_report(kernel: Compiled, turn: Turn, need: Need, charged: Charges | None) -> LoopReport:
    """Counts one turn. Raises ValueError if the shape of an MMA or the size of a copy cannot be told."""
    mma: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    flop = loaded = moved = 0
    for loop, warps in turn:
        times = {"warp": warps, "warpgroup": warps // 4, "cta": 1}
        for i in loop.instructions:
            moved += i.shared_bytes * warps
            loaded += i.load_width * THREADS * warps if i.load_width >= TILE_LOAD else 0
            if i.name in MMA_NAMES:
                shape = kernel.code.mma(i)
                mma[i.name] += times[shape.issuer]
                flop += shape.flop * times[shape.issuer]
                moved += shape.shared_bytes(i) * times[shape.issuer]
        by_tma = _expected_bytes(kernel.code, loop)
        loaded, moved = loaded + by_tma, moved + by_tma
        counts["issue"] += len(loop.instructions) * warps
        for name, count in _by_kind(loop).items():
            counts[name] += count * warps
        for name, opcodes in COUNTED.items():
            counts[name] += sum(loop.counts[opcode] for opcode in opcodes) * warps
        counts["tma"] += sum(loop.counts[opcode] for opcode in TMA)
    # Whoever unrolls loads, multiplies and exponentiates more in the same measure: that products and exponentials are
    # those of the tiles that are loaded is what the audit asks.
    tiles = max(1, round(loaded / need.bytes)) if need.bytes else 1
    computing = [one for one in turn if one[0].counts["MUFU.EX2"]] or [
        one for one in turn if "mma" in _features(one[0])
    ]
    computing_warps = sum(warps for _, warps in computing) or kernel.num_warps
    per_warp: Counter[str] = Counter()
    for loop, warps in computing:
        for name, count in _by_kind(loop).items():
            per_warp[name] += count * warps
    groups = [[group.exps for group in loop.groups()] for loop, _ in turn]
    return LoopReport(
        masked=any(loop.masked for loop, _ in turn),
        tiles=tiles,
        mma={name: count / tiles for name, count in mma.items()},
        flop=flop // tiles,
        exps=counts["exp"] * THREADS // tiles,
        bytes=loaded // tiles,
        shared_bytes=moved // tiles,
        counts={name: count / tiles for name, count in counts.items()},
        computing_warps=computing_warps,
        per_warp={name: count / computing_warps / tiles for name, count in per_warp.items()},
        exps_in_flight=min((max(exps) for exps in groups if exps), default=None),
        exps_in_loop=max((loop.counts["MUFU.EX2"] for loop, _ in turn), default=0),
        need=need,
        charged=charged,
    )


def _by_kind(loop: Loop) -> dict[str, int]:
    return {**{name: loop.kind(name) for name in KINDS}, "other": loop.other}


def _expected_bytes(code: Code, loop: Loop) -> int:
    if not loop.counts["UTMALDG"]:
        return 0
    found = code.expected_bytes(loop)
    if found is None:
        raise ValueError("the bytes that an mbarrier expects are no constant")
    return found
