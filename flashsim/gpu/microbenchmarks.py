"""Runs the microbenchmarks of `flashsim_kernels.microbenchmarks` on the GPU of this process.

Each is launched with n turns and with 2 n turns in turn, REPEATS times, after launches that warm it up and choose n so
that a run is long beside the resolution of the clock that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Final

from flashsim.devices import DeviceSpec
from flashsim.errors import FlashsimError
from flashsim.gpu import calibrate as c
from flashsim.gpu.device_file import Facts
from flashsim.gpu.estimates import Raw, Reading, Timing, mix_name

REPEATS: Final = 50
CYCLES: Final = 50_000
"""At least, of a run that is measured in cycles; reading the clock takes some tens."""
NS: Final = 400_000
"""At least, of one that is measured in ns: the timer may move in steps of 1 us."""
MOST_TURNS: Final = 1 << 20
NEAR_BYTE: Final = 4 << 20
"""Of data that stay in L2."""
FAR_FACTOR: Final = 8
"""Data of so many times the L2 are not in it when their turn comes again."""
WARM_UP_S: Final = 1.0
GAP_KERNELS: Final = 100
GAP_REPEATS: Final = 10
LONGEST_HOLD: Final = 2_000_000_000
"""Cycles for which the GPU is kept from what is launched, so that it has a backlog."""
GRAPH_KERNELS: Final = 100

Run = Callable[[Any, int], float | None]
"""Launches one microbenchmark with readings and turns; the units of a turn, None for 1."""


def facts() -> Facts:
    """Of the GPU of this process. Raises FlashsimError if there is none, or nothing to compile for it with."""
    try:
        import torch
        import triton
    except ImportError as error:
        raise FlashsimError(f"calibrate measures on a GPU with PyTorch and Triton: {error}") from None
    if not torch.cuda.is_available():
        raise FlashsimError("calibrate needs a CUDA GPU, and PyTorch finds none here: nothing was measured")
    if triton.knobs.runtime.interpret:
        raise FlashsimError("calibrate needs compiled kernels: unset TRITON_INTERPRET")
    device = torch.cuda.current_device()
    p = torch.cuda.get_device_properties(device)
    told = triton.runtime.driver.active.utils.get_device_properties(device)
    cuda = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    versions = [f"PyTorch {torch.__version__}", f"Triton {triton.__version__}"]
    if cuda:
        versions.insert(0, f"driver for CUDA {cuda // 1000}.{cuda % 1000 // 10}")
    # Clocks are in kHz, the bus in bits; two transfers a cycle.
    peak = 2e-6 * told.get("mem_clock_rate", 0) * told.get("mem_bus_width", 0) / 8
    return Facts(
        name=p.name,
        compute_capability=f"{p.major}.{p.minor}",
        software=", ".join(versions),
        sm_count=p.multi_processor_count,
        l2_byte=p.L2_cache_size,
        hbm_byte=p.total_memory,
        smem_per_sm_byte=getattr(p, "shared_memory_per_multiprocessor", None),
        smem_per_cta_byte=told.get("max_shared_mem"),
        max_mhz=told["sm_clock_rate"] / 1000 if told.get("sm_clock_rate") else None,
        hbm_peak_byte_per_ns=peak or None,
    )


class Bench:
    """Measures one microbenchmark after the other; what fails is noted, and the rest goes on."""

    def __init__(self, advance: Callable[[str], None]) -> None:
        self.timings: dict[str, Timing] = {}
        self.failed: dict[str, str] = {}
        self.gaps_ns: list[float] = []
        self._advance = advance

    def tensor(self, *shape: int, dtype: str = "int32") -> Any:
        import torch

        return torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda")

    def clk(self, name: str, run: Run, num_warps: int) -> None:
        """Measured in cycles, in one CTA."""
        self._measure(name, run, num_warps, 1, lambda reading: reading.clk >= CYCLES)

    def ns(self, name: str, run: Run, num_warps: int, ctas: int = 1, most: int = MOST_TURNS) -> None:
        """Measured in ns, in `ctas` CTAs together, with at most `most` turns."""
        self._measure(name, run, num_warps, ctas, lambda reading: reading.ns >= NS, most)

    def _measure(
        self,
        name: str,
        run: Run,
        num_warps: int,
        ctas: int,
        long_enough: Callable[[Reading], bool],
        most: int = MOST_TURNS,
    ) -> None:
        import torch

        from flashsim_kernels.microbenchmarks.clocks import new_readings

        def launch(turns: int) -> Any:
            readings = new_readings(ctas, num_warps, "cuda")
            return readings, run(readings, turns)

        def attempt() -> None:
            turns = min(16, most)
            launch(turns)  # compiles
            while not long_enough(reading(launch(turns)[0])) and 2 * turns <= most:
                turns *= 2
            units, launched = 1.0, []
            for number in range(2 * REPEATS):
                readings, given = launch(turns * (1 + number % 2))
                units = given or 1.0
                launched.append(readings)
            torch.cuda.synchronize()
            read = [reading(readings) for readings in launched]
            self.timings[name] = Timing(turns, units, read[::2], read[1::2])

        self.attempt(name, attempt)

    def attempt(self, name: str, run: Callable[[], None]) -> None:
        self._advance(name)
        try:
            run()
        # The next microbenchmark would fail on a context that is lost, too, and says so.
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]


def reading(readings: Any) -> Reading:
    """Of readings (CTAs, 4, threads): the longest CTA's cycles, and the ns from the first start to the last stop."""
    clk = (readings[:, 1].amax(1) - readings[:, 0].amin(1)).max().item()
    return Reading(float(clk), float((readings[:, 3].max() - readings[:, 2].min()).item()))


def measure(sections: Iterable[str], gpu: Facts, base: DeviceSpec, advance: Callable[[str], None]) -> Raw:
    """Run the microbenchmarks of the sections; `advance` is told the name of each before it runs."""
    bench = Bench(advance)
    _warm_up(bench)
    for section in sections:
        _RUNS[section](bench, gpu, base)
    return Raw(bench.timings, bench.gaps_ns, bench.failed)


def _warm_up(bench: Bench) -> None:
    """Until the clock has come up."""
    import time

    import torch

    x = bench.tensor(2048, 2048, dtype="float16")
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_UP_S:
        for _ in range(100):
            x @ x
        torch.cuda.synchronize()


def _pipes(bench: Bench, gpu: Facts, base: DeviceSpec) -> None:
    from flashsim_kernels.microbenchmarks import pipes

    sink = bench.tensor(pipes.REGISTERS * 32 * c.PIPE_WARPS)

    def of(mix: Mapping[str, int]) -> Run:
        return lambda readings, turns: pipes.arithmetic(readings, sink, turns, **mix)

    for mix in c.MIXES:
        bench.clk(mix_name(mix), of(mix), c.PIPE_WARPS)
    row = bench.tensor(128, dtype="float32")
    bench.clk("row reduction", lambda r, n: pipes.row_reduce(r, row, n), 4)


def _smem(bench: Bench, gpu: Facts, base: DeviceSpec) -> None:
    from flashsim_kernels.microbenchmarks import shared_memory

    sink = bench.tensor(4 * 32 * c.SMEM_WARPS)
    bench.clk("shared memory rate", lambda r, n: shared_memory.shared_rate(r, sink, n), c.SMEM_WARPS)
    bench.clk("shared memory latency", shared_memory.shared_latency, 1)


def _barrier(bench: Bench, gpu: Facts, base: DeviceSpec) -> None:
    from flashsim_kernels.microbenchmarks import barriers

    bench.clk("CTA barrier", barriers.cta_barrier, 4)
    bench.clk("named barrier", barriers.named_barrier, 8)


def _tensor(bench: Bench, gpu: Facts, base: DeviceSpec) -> None:
    from flashsim_kernels.microbenchmarks.tensor_cores import mma_sync

    a, sink = bench.tensor(128, 64, dtype="float16"), bench.tensor(128, 64, dtype="float32")
    for warps in c.MMA_WARPS:
        bench.clk(f"mma.sync, {warps} warps", lambda r, n: mma_sync(r, a, sink, n, chains=c.MMA_CHAINS), warps)
    bench.clk("mma.sync, 1 accumulator", lambda r, n: mma_sync(r, a, sink, n, chains=1), 4)


def _wgmma(bench: Bench, gpu: Facts, base: DeviceSpec) -> None:
    if base.wgmma is None:
        return
    from flashsim_kernels.microbenchmarks.tensor_cores import wgmma

    a, sink = bench.tensor(64, 256, dtype="float16"), bench.tensor(64, 256, dtype="float32")

    def of(**given: Any) -> Run:
        return lambda readings, turns: wgmma(readings, a, sink, turns, **given)

    for shared, columns, groups in (
        (True, c.WGMMA_N, c.WGMMA_GROUPS),
        (False, [n for n in c.WGMMA_N if n >= c.TENSOR_BOUND_N], c.WGMMA_GROUPS[:2]),
    ):
        for n in columns:
            for group in groups:
                bench.clk(c.wgmma_name(n, group, shared), of(columns=n, group=group, a_in_shared=shared), 4)


def _tma(bench: Bench, gpu: Facts, base: DeviceSpec) -> None:
    if base.tma is None:
        return
    from flashsim_kernels.microbenchmarks import barriers
    from flashsim_kernels.microbenchmarks.global_memory import tma_loads

    near = bench.tensor(NEAR_BYTE // 128, 64, dtype="float16")
    far = bench.tensor(_power_of_two(FAR_FACTOR * gpu.l2_byte) // 128, 64, dtype="float16")
    first = 0

    def one_box(x: Any, rows: int) -> Run:
        def run(readings: Any, turns: int) -> None:
            nonlocal first
            tma_loads(readings, x, turns, first=first, rows=rows, loads=1)
            # Every launch goes on where the one before ended.
            first = (first + turns * rows) % x.shape[0]

        return run

    for rows in c.BOX_ROWS:
        bench.ns(f"TMA from L2, {rows} rows", one_box(near, rows), 1)
        bench.ns(f"TMA from HBM, {rows} rows", one_box(far, rows), 1)
    for loads in c.ISSUE_LOADS:

        def several(readings: Any, turns: int, loads: int = loads) -> None:
            tma_loads(readings, near, turns, first=0, rows=c.ISSUE_ROWS, loads=loads)

        bench.clk(f"{loads} TMA loads on one mbarrier", several, 1)
    bench.clk("mbarrier", barriers.mbarrier_round, 1)


def _memory(bench: Bench, gpu: Facts, base: DeviceSpec) -> None:
    from flashsim_kernels.microbenchmarks.global_memory import chase, stream

    warps = 16
    sink = bench.tensor(4 * 32 * warps)

    def over(x: Any) -> Run:
        return lambda readings, turns: stream(readings, x, sink, turns)

    bench.ns("stream from L2, one SM", over(bench.tensor(NEAR_BYTE // 4)), warps)
    # No two SMs read the same lines at a time if there are 64 KiB for each.
    near = _power_of_two(base.memory.l2_share_byte * 2 // 3)
    bench.ns("stream from L2", over(bench.tensor(near // 4)), warps, gpu.sm_count)
    far = min(_power_of_two(gpu.hbm_byte // 8), 1 << 32)
    turns = far // (2 * gpu.sm_count * (64 << 10))  # the double of which reads all of it, once
    bench.ns("stream from HBM", over(bench.tensor(far // 4)), warps, gpu.sm_count, turns)
    for name, size in (("chase in L2", NEAR_BYTE), ("chase in HBM", FAR_FACTOR * gpu.l2_byte)):
        place, table = _chain(bench, size)
        if size > gpu.l2_byte:
            bench.tensor(gpu.l2_byte // 2)  # twice the L2, where the end of the chain may still be
        bench.ns(name, partial(_from, chase, place, table), 1)


def _chain(bench: Bench, size: int) -> tuple[Any, Any]:
    """The first address, and memory in which each line of 128 bytes holds the address of another, in random order."""
    import torch

    table = bench.tensor(size // 128, 16, dtype="int64")
    order = torch.randperm(len(table), device="cuda")
    table[order, 0] = table.data_ptr() + 128 * order.roll(-1)
    return torch.full((1,), table.data_ptr(), dtype=torch.int64, device="cuda"), table


def _from(chase: Callable[..., int], place: Any, table: Any, readings: Any, turns: int) -> int:
    """A chase; `table` is only kept alive."""
    return chase(readings, place, turns)


def _launch(bench: Bench, gpu: Facts, base: DeviceSpec) -> None:
    from flashsim_kernels.microbenchmarks.launches import empty

    def graphs(name: str, ctas: int) -> None:
        empty(ctas)  # compiles
        short, long = (_graph_ns(lambda: empty(ctas), n * GRAPH_KERNELS) for n in (1, 2))
        read = [(Reading(0.0, short()), Reading(0.0, long())) for _ in range(REPEATS)]
        bench.timings[name] = Timing(GRAPH_KERNELS, 1, [a for a, _ in read], [b for _, b in read])

    for ctas in c.EMPTY_CTAS:
        name = f"empty kernels of {ctas} CTAs"
        bench.attempt(name, partial(graphs, name, ctas))
    bench.attempt("gap between kernels", lambda: _gaps(bench, gpu))


def _graph_ns(run: Callable[[], None], kernels: int) -> Callable[[], float]:
    """A function that replays so many kernels, in a CUDA graph, and returns the ns that they took."""
    import torch

    graph, start, stop = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            run()
    graph.replay()

    def replay() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e6

    return replay


def _gaps(bench: Bench, gpu: Facts) -> None:
    import torch

    from flashsim_kernels.microbenchmarks.clocks import new_readings
    from flashsim_kernels.microbenchmarks.launches import stamp

    stamp(new_readings(gpu.sm_count, 4, "cuda"))  # compiles
    held = torch.cuda.Event()
    cycles = 20_000_000
    while len(bench.gaps_ns) < GAP_REPEATS:
        launched = [new_readings(gpu.sm_count, 4, "cuda") for _ in range(GAP_KERNELS)]
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        held.record()
        for readings in launched:
            stamp(readings)
        host_was_late = held.query()
        torch.cuda.synchronize()
        if host_was_late:
            cycles *= 2
            if cycles > LONGEST_HOLD:
                raise TimeoutError("the host launches too slowly for a backlog")
            continue
        bench.gaps_ns.append(gap_ns(launched))


def gap_ns(launched: Iterable[Any]) -> float:
    """The mean time from the last stop of a kernel to the first start of the next, of readings (CTAs, 4, threads)."""
    # Not as floats: ns since 1970 have more digits.
    spans = [(int(r[:, 2].min().item()), int(r[:, 3].max().item())) for r in launched]
    between = [after[0] - before[1] for before, after in pairwise(spans)]
    return sum(between) / len(between)


def _power_of_two(size: int) -> int:
    """The largest that is not larger."""
    return 1 << (size.bit_length() - 1)


_RUNS: Final[dict[str, Callable[[Bench, Facts, DeviceSpec], None]]] = {
    "smem": _smem,
    "tensor": _tensor,
    "wgmma": _wgmma,
    "tma": _tma,
    "pipes": _pipes,
    "barrier": _barrier,
    "memory": _memory,
    "launch": _launch,
}
