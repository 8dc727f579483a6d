"""What each verb costs on a device at a clock: work for the units of an SM, in ticks.

A warpgroup is four warps, one on each sub-partition, that do the same on different rows. A register tile of r x c is
spread over its 128 threads, r c / 128 values each; a row vector gives each thread r / 32 values (the four threads of a
quad hold the same row). A rate of n thread instructions per clock and SM lets one instruction of all 128 threads
through in 128 / n clocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from flashsim.devices import DeviceSpec
from flashsim.units import Rate, clk_of_ns, ticks

THREADS = 128
"""Of a warpgroup."""
LDSM_BYTE = 512
"""What ldmatrix.x4 reads for one warp: four 8 x 8 matrices of 16-bit elements."""
EXP_CHUNKS = 4
"""Pieces in which a tile's exponentials are issued, so that another warpgroup's can come in between (assumed)."""
MASK_INSTRUCTIONS = 5
"""ALU instructions per element of a masked tile. The compiled loops show two (compare, select); 5 is fitted to the
causal rows of the locked-clock session, where it may stand for other costs of a query tile."""

DROPOUT_INSTRUCTIONS = 9
"""Integer instructions per element of Philox4x32-10, compare and select: ten rounds of two wide multiplications and
four exclusive ors a call, shared by the elements that use its bits. What dropout costs FlashAttention-1's rows."""

PERMUTE_INSTRUCTIONS = 1
"""Per element: two selects, two shuffles and two byte permutes for eight (hopper/utils.h, permute_Aregs_fp8), rounded
up. Shuffles are counted as ALU work (assumed)."""
TRANSPOSE_INSTRUCTIONS = 0.5
"""Byte permutes per element of 8 bits that is transposed between shared memory and shared memory: two for each register
of four (hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp, transpose of V by LDSM.T, PRMT and STSM)."""


class Count(NamedTuple):
    """Thread instructions per element."""

    fma: float = 0
    exp: float = 0
    alu: float = 0


MAP_COUNT = {
    "mask": Count(alu=MASK_INSTRUCTIONS),
    "scale": Count(fma=1),
    "dropout": Count(fma=1, alu=DROPOUT_INSTRUCTIONS),
    "exp": Count(fma=1, exp=1),  # one FFMA scales and subtracts the maximum, one EX2
    "exp_lse": Count(fma=1, exp=1),
    "rescale_factor": Count(fma=1, exp=1),
    "add": Count(fma=1),
    "sub": Count(fma=1),
    "mul": Count(fma=1),
    "div": Count(fma=1),
    "lse": Count(fma=1, exp=1),
    "permute": Count(alu=PERMUTE_INSTRUCTIONS),
    "hadamard": Count(fma=1),  # for each of the log2(columns) steps
    "copy": Count(),  # a renaming
    "fill": Count(),  # the first product of a chain does not read its accumulator
}
REDUCE_COUNT = {"max": Count(alu=1), "abs_max": Count(alu=1), "sum": Count(fma=1)}


@dataclass
class Phase:
    """Work that the units of an SM do side by side, each element passing from one to the next, then `latency`."""

    work: dict[str, int] = field(default_factory=dict)
    """Unit name to ticks, the exp pipe apart."""
    exp: int = 0
    latency: int = 0


class Costs:
    """The costs of verbs on one device at one clock."""

    def __init__(self, device: DeviceSpec, clock_mhz: float) -> None:
        d = self.device = device
        self.clock_mhz = clock_mhz
        pipes = d.pipes
        self.clk_per_instruction = {
            "fma": THREADS / pipes.fma_op_per_clk,
            "exp": THREADS / pipes.exp_op_per_clk,
            "alu": THREADS / pipes.alu_op_per_clk,
            "pack": THREADS / pipes.pack_op_per_clk,
            "issue": THREADS / 32 / pipes.issue_inst_per_clk,
        }
        self.pack_unit = "exp" if pipes.pack_on_exp_pipe else "pack"
        self.row_reduce = ticks(pipes.row_reduce_clk)
        self.mma_latency = ticks(d.tensor.mma_sync_latency_clk)
        self.smem_latency = ticks(d.smem.latency_clk)
        self.smem = Rate(1 / d.smem.byte_per_clk)
        self.named_barrier = ticks(d.barrier.named_clk)
        self.cta_barrier = ticks(d.barrier.cta_clk)
        self.mbarrier = ticks(d.tma.mbarrier_clk) if d.tma else 0
        self.wgmma_fill = ticks(d.wgmma.fill_clk) if d.wgmma else 0
        self.wgmma_drain = ticks(d.wgmma.drain_clk) if d.wgmma else 0

    def ns(self, ns: float) -> int:
        """Ticks in `ns` nanoseconds at this clock."""
        return ticks(clk_of_ns(ns, self.clock_mhz))

    def byte_rate(self, byte_per_ns: float) -> Rate:
        """Ticks for bytes at `byte_per_ns`."""
        return Rate(clk_of_ns(1 / byte_per_ns, self.clock_mhz))

    def add(self, phase: Phase, count: Count, per_thread: float) -> None:
        """Let `phase` do `count` instructions on each of `per_thread` elements."""
        issued = 0.0
        for unit, instructions in zip(Count._fields, count, strict=True):
            if instructions:
                issued += instructions * per_thread
                self._work(phase, unit, instructions * per_thread)
        self._work(phase, "issue", issued)

    def add_pack(self, phase: Phase, per_thread: float) -> None:
        """Let `phase` convert `per_thread` fp32 elements of each thread to 16 bits, two an instruction."""
        self._work(phase, self.pack_unit, per_thread / 2)
        self._work(phase, "issue", per_thread / 2)

    def _work(self, phase: Phase, unit: str, instructions: float) -> None:
        duration = ticks(instructions * self.clk_per_instruction[unit])
        if unit == "exp":
            phase.exp += duration
        else:
            phase.work[unit] = phase.work.get(unit, 0) + duration

    def wgmma(self, m: int, n: int, k_byte: int, a_in_shared: bool) -> tuple[int, int]:
        """(tensor core ticks, bytes read from shared memory) of an m x n x k product by one warpgroup.

        Instructions of 64 rows, n columns and 32 bytes along k: 16 elements of fp16, 32 of fp8, at the same rate of
        bytes. Law of the issue interval as in `devices.spec.Wgmma`.
        """
        law = self.device.wgmma
        assert law is not None
        interval = law.clk_fixed + law.clk_per_n * n
        if a_in_shared:
            interval = max(interval, law.smem_clk_fixed + law.smem_clk_per_n * n)
        instructions = -(-m // 64) * -(-k_byte // 32)
        read = instructions * (n * 32 + (64 * 32 if a_in_shared else 0))
        return ticks(instructions * interval), read

    def mma_sync(
        self, m: int, n: int, k: int, in_shared: tuple[bool, bool], warps: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        """m x n x k by warps that share rows and columns: (steps of 16 along k, tensor ticks a step, requests to the
        port a step, port ticks a request).

        m16n8k16 instructions; of A and B, those that are `in_shared` are read: each warp its own rows of A and its own
        columns of B, 512 bytes an LDSM. A request is one LDSM of four warps, or up to four of one. Four warps have the
        tensor cores of a sub-partition each, fewer leave the rest to others.
        """
        along_m, along_n = warps
        count = along_m * along_n
        instructions = -(-m // (16 * along_m)) * -(-n // (8 * along_n))
        read = (m * along_n * in_shared[0] + n * along_m * in_shared[1]) * 32
        requests = -(-read // (max(count, 4) * LDSM_BYTE))
        duration = ticks(instructions * self.device.tensor.mma_sync_clk * count / 4)
        return -(-k // 16), duration, requests, self.smem(read) // max(requests, 1)
