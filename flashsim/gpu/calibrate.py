"""From the times of microbenchmarks to the numbers of a device file. Arithmetic only: no GPU is needed here.

How each number comes out of the times:

- What one thing takes is (time of 2 n turns - time of n turns) / n, so that start-up cancels; the median over all pairs
  of launches, with the distance between the quartiles as a part of it for its spread.
- A rate is a turn's work over its time. A latency is the time of a chain in which each step needs the one before.
- Two kinds of instruction share a pipe if, interleaved, they take as long as one after the other. With the times t_a
  and t_b of each alone and t of both, the overlap is (t_a + t_b - t) / min(t_a, t_b): 0 for one pipe, 1 for two. At
  most 0.2 is shared, at least 0.8 is not, and between the two nothing is said. Of the mixes that were measured, the one
  counts whose parts take the most similar times: there sum and maximum are furthest apart.
- What has a constant part is measured at several sizes, and a line is laid through them.

A number is refused, and the base's stays, if its spread is above SPREAD, if a line misses a point by more than MISS, or
if the microbenchmark did not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Final

from flashsim.devices import DeviceSpec
from flashsim.gpu.estimates import (
    SEPARATE,
    SHARED,
    Estimate,
    Overlap,
    Raw,
    Refused,
    balanced,
    line,
    mix_name,
    overlap,
    steady,
)

KINDS = ("exp", "pack", "max", "fma")
MIXES: Final[tuple[Mapping[str, int], ...]] = (
    *({kind: 1} for kind in KINDS),
    *({"exp": 1, "pack": n} for n in (1, 2, 4)),
    *({"exp": 1, "max": n} for n in (1, 4)),
    *({"pack": n, "max": m} for n, m in ((1, 1), (1, 4))),
    *({"max": 1, "fma": n} for n in (1, 2)),
)
"""Instructions in a round, by kind."""
PIPE_WARPS: Final = 16
SMEM_WARPS: Final = 8
MMA_CHAINS: Final = 8
MMA_WARPS: Final = (4, 8)
WGMMA_N: Final = (8, 16, 32, 64, 128, 256)
WGMMA_GROUPS: Final = (4, 8, 16)
TENSOR_BOUND_N: Final = 64
"""From this N on the tensor core sets the interval of m64nNk16, below it the operands' shared-memory reads: the table
that h100-sxm5.toml cites bends there."""
BOX_ROWS: Final = (64, 128, 256)
"""Of 128 bytes, of a TMA box."""
ISSUE_LOADS: Final = (4, 8, 16)
ISSUE_ROWS: Final = 8
EMPTY_CTAS: Final = (32, 64, 96)

NOT_MEASURED: Final[Mapping[str, str]] = {
    "clock.datasheet_mhz": "the datasheet's",
    "power": "the datasheet's",
    "sm": "limits of the architecture; the driver tells the number of SMs",
    "smem.reserved_per_cta_byte": "a limit of the architecture",
    "tensor.fp16_flop_per_clk": "the peak, which utilization is a part of",
    "tensor.fp16_tflops": "the datasheet's",
    "tensor.fp8_flop_per_clk": "the peak, which utilization is a part of",
    "memory.l2_share_byte": "follows from the size of the L2 that the driver tells",
    "memory.hbm_peak_byte_per_ns": "the datasheet's",
    "memory.jitter_ns": "of the model",
    "launch.cta_clk": "what a CTA does before its first load is its kernel's, which no other kernel shows",
    "library": "a framework's",
}
"""Why a number, or all of a section, is left to the base. Those of wgmma.fill_clk and drain_clk are split as there."""


@dataclass(frozen=True)
class Number:
    """One number of a device file."""

    key: str
    """section.key"""
    value: float
    note: str
    status: str = "measured"
    spread: float | None = None


@dataclass
class Findings:
    """What came out of the measurements."""

    numbers: dict[str, Number] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """By section.key."""
    overlaps: list[Overlap] = field(default_factory=list)

    def measured(self, key: str, how: str, get: Callable[[], Estimate]) -> None:
        self.attempt([key], lambda: [number(key, get(), how)])

    def attempt(self, keys: Iterable[str], compute: Callable[[], Iterable[Number]]) -> None:
        try:
            self.numbers |= {number.key: number for number in compute()}
        except Refused as refusal:
            self.refused |= dict.fromkeys(keys, str(refusal))


def number(key: str, estimate: Estimate, how: str, status: str = "measured") -> Number:
    note = f"median of {estimate.count}, spread {estimate.spread:.1%}; {how}"
    return Number(key, estimate.value, note, status, estimate.spread)


def _pipes(raw: Raw, base: DeviceSpec, found: Findings) -> None:
    for kind, key, opcode in (
        ("exp", "exp_op_per_clk", "MUFU.EX2"),
        ("pack", "pack_op_per_clk", "F2FP.PACK_AB"),
        ("max", "alu_op_per_clk", "FMNMX"),
        ("fma", "fma_op_per_clk", "FFMA"),
    ):
        how = f"{opcode} alone, {PIPE_WARPS} warps, eight in flight in each thread"
        found.measured(f"pipes.{key}", how, partial(_rate, raw.clk, kind, 32 * PIPE_WARPS))
    for mix in MIXES:
        if len(mix) == 2 and "fma" not in mix:  # which takes every issue slot by itself
            with suppress(Refused):
                found.overlaps.append(overlap(raw, mix))
    found.attempt(["pipes.pack_on_exp_pipe"], lambda: [_pack_pipe(found.overlaps)])
    mixes = [mix for mix in MIXES if len(mix) == 2 and "fma" in mix]
    how = f"the most of {', '.join(map(mix_name, mixes))}, {PIPE_WARPS} warps"
    found.measured("pipes.issue_inst_per_clk", how, lambda: max((_issue(raw, mix) for mix in mixes), key=_value))
    how = "two SHFL.BFLY, each with a FMNMX after it, in a chain"
    found.measured("pipes.row_reduce_clk", how, lambda: raw.clk("row reduction"))


def _rate(time: Callable[[str], Estimate], name: str, work: float = 1.0) -> Estimate:
    return time(name).rate(work)


def _issue(raw: Raw, mix: Mapping[str, int]) -> Estimate:
    return raw.clk(mix_name(mix)).rate(PIPE_WARPS * sum(mix.values()))


def _value(estimate: Estimate) -> float:
    return estimate.value


def _pack_pipe(overlaps: Sequence[Overlap]) -> Number:
    found = balanced(overlaps, "exp", "pack")
    if found is None:
        raise Refused("exp and pack were not measured together")
    first, second = found.alone_clk
    told = f"{mix_name(found.mix)}: {first:.4g} and {second:.4g} clk alone, {found.together_clk:.4g} together"
    told += f", overlap {found.share:.2f} +- {found.error:.2f}"
    if found.verdict == "undecided":
        raise Refused(f"{told}: neither one pipe (at most {SHARED}) nor two (at least {SEPARATE})")
    other = balanced(overlaps, "pack", "max")
    beside = f"; with max the overlap is {other.share:.2f}" if other else ""
    return Number("pipes.pack_on_exp_pipe", int(found.verdict == "shared"), f"{told}, {found.verdict}{beside}")


def _smem(raw: Raw, base: DeviceSpec, found: Findings) -> None:
    how = f"LDS.128 of {SMEM_WARPS} warps, no bank conflicts"
    found.measured("smem.byte_per_clk", how, lambda: raw.clk("shared memory rate").rate(32 * SMEM_WARPS))
    how = "chain of LDS of 32 bits, each of the address that the one before loaded"
    found.measured("smem.latency_clk", how, lambda: raw.clk("shared memory latency"))


def _barrier(raw: Raw, base: DeviceSpec, found: Findings) -> None:
    how = "hand-over between two warpgroups, BAR.ARV and BAR.SYNC of 256 threads, a WARPSYNC before each"
    found.measured("barrier.named_clk", how, lambda: raw.clk("named barrier"))
    found.measured("barrier.cta_clk", "BAR.SYNC of four warps", lambda: raw.clk("CTA barrier"))


def _tensor(raw: Raw, base: DeviceSpec, found: Findings) -> None:
    def interval() -> Estimate:
        # More warps on a sub-partition fill what one leaves free.
        return min((raw.clk(f"mma.sync, {w} warps").times(4 / w / MMA_CHAINS) for w in MMA_WARPS), key=_value)

    per_part = " or ".join(str(w // 4) for w in MMA_WARPS)
    how = f"HMMA.16816.F32, fp16, {MMA_CHAINS} accumulators, {per_part} warps on each sub-partition"
    found.measured("tensor.mma_sync_clk", how, interval)
    how = "chain of HMMA.16816.F32, fp16, through one accumulator"
    found.measured("tensor.mma_sync_latency_clk", how, lambda: raw.clk("mma.sync, 1 accumulator"))


def wgmma_name(columns: int, group: int, a_in_shared: bool = True) -> str:
    return f"wgmma N = {columns}, {group} in a group" + ("" if a_in_shared else ", A in registers")


def _wgmma(raw: Raw, base: DeviceSpec, found: Findings) -> None:
    law = base.wgmma
    if law is None:
        return
    tensor_bound = [n for n in WGMMA_N if n >= TENSOR_BOUND_N]

    def group(n: int, groups: Iterable[int], a_in_shared: bool = True) -> tuple[Estimate, Estimate]:
        """What the time of a group has beside its instructions, and the interval of those."""
        return line({float(g): raw.clk(wgmma_name(n, g, a_in_shared)) for g in groups})

    def fit(fixed: str, per_n: str, columns: Sequence[int]) -> list[Number]:
        points = {float(n): group(n, WGMMA_GROUPS)[1] for n in columns}
        constant, slope = line(points)
        how = f"issue intervals of m64nNk16, fp16, both operands in shared memory: {_table(points)}"
        if columns == tensor_bound:
            with suppress(Refused):
                in_registers = {float(n): group(n, WGMMA_GROUPS[:2], False)[1] for n in columns}
                how += f"; A in registers: {_table(in_registers)}"
        return [number(f"wgmma.{fixed}", constant, how, "fitted"), number(f"wgmma.{per_n}", slope, how, "fitted")]

    def fill_and_drain() -> list[Number]:
        # Long intervals hide the issue of the instructions.
        constants = [group(n, WGMMA_GROUPS)[0] for n in tensor_bound]
        together = Estimate(median(map(_value, constants)), max(e.spread for e in constants), constants[0].count)
        part = law.fill_clk / ((law.fill_clk + law.drain_clk) or 1)
        how = f"the two take {together.value:.1f} clk beyond the issue intervals of a group; split as in {base.name}"
        return [
            number("wgmma.fill_clk", together.times(part), how, "derived"),
            number("wgmma.drain_clk", together.times(1 - part), how, "derived"),
        ]

    operand_bound = [n for n in WGMMA_N if n < TENSOR_BOUND_N]
    for fixed, per_n, columns in (
        ("clk_fixed", "clk_per_n", tensor_bound),
        ("smem_clk_fixed", "smem_clk_per_n", operand_bound),
    ):
        found.attempt([f"wgmma.{fixed}", f"wgmma.{per_n}"], partial(fit, fixed, per_n, columns))
    found.attempt(["wgmma.fill_clk", "wgmma.drain_clk"], fill_and_drain)


def _table(points: Mapping[float, Estimate]) -> str:
    return ", ".join(f"N = {n:g}: {e.value:.1f}" for n, e in points.items()) + " clk"


def _tma(raw: Raw, base: DeviceSpec, found: Findings) -> None:
    if base.tma is None:
        return
    sizes = ", ".join(f"{rows * 128 // 1024}" for rows in BOX_ROWS)

    def latencies() -> list[Number]:
        near = {128.0 * rows: raw.ns(f"TMA from L2, {rows} rows") for rows in BOX_ROWS}
        constant, slope = line(near)
        how = f"one box of {sizes} KiB at a time, expect, issue and wait: a constant and a time a byte"
        return [
            number("tma.l2_latency_ns", constant, f"{how}; from L2", "fitted"),
            number("tma.sm_byte_per_ns", slope.rate(), f"{how}; from L2", "fitted"),
        ]

    def far() -> list[Number]:
        _, slope = line({128.0 * rows: raw.ns(f"TMA from L2, {rows} rows") for rows in BOX_ROWS})
        cold = {128.0 * rows: raw.ns(f"TMA from HBM, {rows} rows") for rows in BOX_ROWS}
        rest = [e.value - slope.value * size for size, e in cold.items()]
        if min(rest) <= 0:
            raise Refused("loads from HBM take no longer than their bytes from L2")
        spread = max(e.spread for e in cold.values())
        how = f"one box of {sizes} KiB at a time, of data not in L2, less its bytes at sm_byte_per_ns"
        estimate = Estimate(median(rest), spread, min(e.count for e in cold.values()))
        return [number("tma.hbm_latency_ns", estimate, how)]

    def issue() -> list[Number]:
        _, slope = line({float(n): raw.clk(f"{n} TMA loads on one mbarrier") for n in ISSUE_LOADS})
        how = f"{', '.join(map(str, ISSUE_LOADS))} boxes of {ISSUE_ROWS * 128} B on one mbarrier: time of one more"
        return [number("tma.issue_clk", slope, how, "fitted")]

    found.attempt(["tma.l2_latency_ns", "tma.sm_byte_per_ns"], latencies)
    found.attempt(["tma.hbm_latency_ns"], far)
    found.attempt(["tma.issue_clk"], issue)
    how = "one warp arrives at an mbarrier (SYNCS.ARRIVE) and waits for that phase (SYNCS.PHASECHK)"
    found.measured("tma.mbarrier_clk", how, lambda: raw.clk("mbarrier"))


def _memory(raw: Raw, base: DeviceSpec, found: Findings) -> None:
    loads = "LDG.128 past the L1"
    for key, name, how in (
        ("sm_byte_per_ns", "stream from L2, one SM", f"{loads}, 16 warps of one SM, data in L2"),
        ("l2_byte_per_ns", "stream from L2", f"{loads}, 16 warps of each SM, all over the same data in L2"),
        ("hbm_byte_per_ns", "stream from HBM", f"{loads}, 16 warps of each SM, data read once"),
    ):
        found.measured(f"memory.{key}", how, partial(_rate, raw.ns, name))
    chain = "chain of loads of 64 bits past the L1, in random order"
    found.measured("memory.l2_latency_ns", f"{chain}, over data in L2, near and far", lambda: raw.ns("chase in L2"))
    found.measured("memory.hbm_latency_ns", f"{chain}, of data not in L2", lambda: raw.ns("chase in HBM"))


def _launch(raw: Raw, base: DeviceSpec, found: Findings) -> None:
    def empty() -> tuple[Estimate, Estimate]:
        return line({float(ctas): raw.ns(f"empty kernels of {ctas} CTAs") for ctas in EMPTY_CTAS})

    def launches() -> list[Number]:
        constant, slope = empty()
        how = f"empty kernels of {', '.join(map(str, EMPTY_CTAS))} CTAs in a CUDA graph: a constant and a time a CTA"
        return [
            number("launch.kernel_us", constant.times(1e-3), how, "fitted"),
            number("launch.cta_interval_ns", slope, how, "fitted"),
        ]

    def gap() -> list[Number]:
        between, launch = steady("gap between kernels", Estimate.of(list(raw.gaps_ns))), empty()[0]
        how = f"{between.value:.0f} ns from a kernel's end to the start of the next, in a stream with a backlog"
        value = max(between.value - launch.value, 0.0) * 1e-3
        estimate = Estimate(value, between.spread, between.count)
        return [number("launch.gap_us", estimate, f"{how}, less kernel_us", "derived")]

    found.attempt(["launch.kernel_us", "launch.cta_interval_ns"], launches)
    found.attempt(["launch.gap_us"], gap)


SECTIONS: Final[Mapping[str, Callable[[Raw, DeviceSpec, Findings], None]]] = {
    "smem": _smem,
    "tensor": _tensor,
    "wgmma": _wgmma,
    "tma": _tma,
    "pipes": _pipes,
    "barrier": _barrier,
    "memory": _memory,
    "launch": _launch,
}
"""Those that can be measured, in the order of a device file."""


def findings(
    raw: Raw, base: DeviceSpec, only: Iterable[str] = tuple(SECTIONS), hbm_peak_byte_per_ns: float | None = None
) -> Findings:
    """The numbers of the sections `only`.

    `base` says whether there are wgmma and TMA, how fill and drain split, and the peak of HBM, where that is not given.
    """
    found = Findings()
    for section in only:
        SECTIONS[section](raw, base, found)
    rate, peak = found.numbers.get("memory.hbm_byte_per_ns"), hbm_peak_byte_per_ns or base.memory.hbm_peak_byte_per_ns
    if rate and rate.value > peak:
        del found.numbers[rate.key]
        found.refused[rate.key] = f"{rate.value:.4g} is above the peak of {peak:.4g}"
    return found
