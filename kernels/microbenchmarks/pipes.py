"""Exponentials, packs, maxima and multiply-adds: how many an SM does in a cycle, and which of them share a pipe."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashsim_kernels.microbenchmarks.clocks import read_clocks, start_together, thread_indices, write_readings

CHAINS = 8
"""Registers of each kind that a thread works on in turn: an instruction waits for the one eight before it."""
BODY = 256
"""About so many instructions a turn of the loop, of which it takes two or three."""
# In place, on registers of 32 bits: PTX lets these be read as fp32 and written as fp16x2. No instruction undoes or
# repeats the one before it, so that none can be left out: each maximum is with the next register.
INSTRUCTIONS = {
    "exp": "ex2.approx.ftz.f32 {x}, {x};",
    "pack": "cvt.rn.f16x2.f32 {x}, {x}, {x};",
    "max": "max.f32 {x}, {x}, {next};",
    "fma": "fma.rn.ftz.f32 {x}, {x}, {x}, {x};",
}
STEPS = 8
REGISTERS = CHAINS * len(INSTRUCTIONS)


def body(counts: dict[str, int]) -> tuple[str, int]:
    """PTX of one turn, in rounds of so many instructions of each kind, and the number of rounds."""
    rounds = BODY // sum(counts.values()) // CHAINS * CHAINS
    lines = [f"mov.b32 ${r}, ${REGISTERS + r};" for r in range(REGISTERS)]
    done = dict.fromkeys(counts, 0)
    for _ in range(rounds):
        for number, (kind, instruction) in enumerate(INSTRUCTIONS.items()):
            for _ in range(counts.get(kind, 0)):
                first, chain = CHAINS * number, done[kind] % CHAINS
                x, neighbor = first + chain, first + (chain + 1) % CHAINS
                lines.append(instruction.format(x=f"${x}", next=f"${neighbor}"))
                done[kind] += 1
    return "\n".join(lines), rounds


@gluon.jit
def arithmetic_kernel(readings, sink, n, ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, REGISTERS: gl.constexpr):
    threads = thread_indices()
    layout: gl.constexpr = gl.BlockedLayout([REGISTERS], [32], [gl.num_warps()], [0])
    places = gl.arange(0, REGISTERS * 32 * gl.num_warps(), layout)
    x = gl.load(sink + places)
    start = start_together(threads)
    for _ in range(n):
        x = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [x], gl.int32, is_pure=False, pack=REGISTERS)
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)
    gl.store(sink + places, x)  # or ptxas would leave all of it out


def arithmetic(
    readings: torch.Tensor, sink: torch.Tensor, n: int, *, exp: int = 0, pack: int = 0, max: int = 0, fma: int = 0
) -> int:
    """n turns of a loop of MUFU.EX2, F2FP.PACK_AB, FMNMX and FFMA, interleaved in rounds of so many of each.

    Returns the number of rounds in a turn. `sink`: int32, REGISTERS numbers for each thread; `readings`: one CTA.
    """
    counts = {"exp": exp, "pack": pack, "max": max, "fma": fma}
    text, rounds = body(counts)
    constraints = ",".join(["=&r"] * REGISTERS + ["r"] * REGISTERS)
    num_warps = readings.shape[2] // 32
    arithmetic_kernel[(readings.shape[0],)](readings, sink, n, text, constraints, REGISTERS, num_warps=num_warps)
    return rounds


@gluon.jit
def row_reduce_kernel(readings, sink, n, STEPS: gl.constexpr):
    threads = thread_indices()
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, 8 * gl.num_warps(), gl.SliceLayout(1, layout))
    columns = gl.arange(0, 4, gl.SliceLayout(0, layout))
    places = gl.expand_dims(rows, 1) * 4 + gl.expand_dims(columns, 0)
    x = gl.load(sink + places)
    start = start_together(threads)
    for _ in range(n):
        for _ in gl.static_range(STEPS):
            x = gl.expand_dims(gl.max(x, 1), 1).broadcast_to(x.shape)
    stop = read_clocks(threads)
    write_readings(readings, threads, start, stop)
    gl.store(sink + places, x)


def row_reduce(readings: torch.Tensor, sink: torch.Tensor, n: int) -> int:
    """n turns of row maxima that need each other: four threads share a row, as in the layouts of MMA accumulators.

    Returns the row maxima in a turn; each is two rounds of SHFL.BFLY and FMNMX. `sink`: fp32, one for each thread.
    """
    row_reduce_kernel[(readings.shape[0],)](readings, sink, n, STEPS, num_warps=readings.shape[2] // 32)
    return STEPS
