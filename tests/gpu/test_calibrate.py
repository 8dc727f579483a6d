"""`flashsim calibrate` without a GPU: the numbers of a known device come back out of the times that it would give."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashsim.cli import main
from flashsim.devices import DeviceSpec, load_device
from flashsim.devices.spec import Citation
from flashsim.errors import FlashsimError, InputError
from flashsim.gpu import calibrate as c
from flashsim.gpu import microbenchmarks
from flashsim.gpu.device_file import Facts, as_entries, check_base, device_text, nearest, told_by_driver
from flashsim.gpu.estimates import Estimate, Overlap, Raw, Reading, Refused, Timing, line, mix_name

DEVICES = ("a100-sxm4-80gb", "h100-sxm5", "h200-sxm", "l4")
CLOCK = 1.755
"""SM cycles a ns."""


def facts_of(device: DeviceSpec, **changes: object) -> Facts:
    facts = Facts(
        name=device.title,
        compute_capability=device.compute_capability,
        software="driver for CUDA 12.4, Triton 3.6.0",
        sm_count=device.sm.count,
        l2_byte=device.memory.l2_byte,
        hbm_byte=int(device.memory.hbm_byte * 0.99),
        smem_per_sm_byte=device.smem.per_sm_byte,
        smem_per_cta_byte=device.smem.per_cta_max_byte,
        max_mhz=device.clock.max_mhz,
        hbm_peak_byte_per_ns=device.memory.hbm_peak_byte_per_ns * 1.02,
    )
    return replace(facts, **changes)


class Times:
    """What the microbenchmarks of a device take, with noise: by the meaning of its numbers, not by `calibrate`."""

    def __init__(self, device: DeviceSpec, noise: float = 0.002, seed: int = 0) -> None:
        self.device = device
        self.noise = noise
        self.random = random.Random(seed)
        self.timings: dict[str, Timing] = {}
        self._pipes()
        self._tensor()
        self._memory()
        self._rest()

    def put(self, name: str, clk: float, units: float = 8, turns: int = 4096) -> None:
        """A microbenchmark with so many cycles a unit."""

        def reading(turns: int) -> Reading:
            time = 700 + turns * units * clk * self.random.gauss(1, self.noise / 2)
            return Reading(time, time / CLOCK)

        pairs = [(reading(turns), reading(2 * turns)) for _ in range(50)]
        self.timings[name] = Timing(turns, units, [a for a, _ in pairs], [b for _, b in pairs])

    def raw(self) -> Raw:
        launch = self.device.launch
        gap = 1000 * (launch.gap_us + launch.kernel_us)
        return Raw(dict(self.timings), [gap * self.random.gauss(1, self.noise) for _ in range(10)])

    def _pipes(self) -> None:
        p = self.device.pipes
        rates = {"exp": p.exp_op_per_clk, "pack": p.pack_op_per_clk, "max": p.alu_op_per_clk, "fma": p.fma_op_per_clk}
        for mix in c.MIXES:
            busy = {kind: 512 * n / rates[kind] for kind, n in mix.items()}
            if p.pack_on_exp_pipe and {"exp", "pack"} <= busy.keys():
                busy["exp"] += busy.pop("pack")
            self.put(mix_name(mix), max(*busy.values(), 16 * sum(mix.values()) / p.issue_inst_per_clk), units=256)
        self.put("row reduction", p.row_reduce_clk)

    def _tensor(self) -> None:
        d = self.device
        self.put("mma.sync, 4 warps", 8 * max(d.tensor.mma_sync_clk, d.tensor.mma_sync_latency_clk / 8))
        self.put("mma.sync, 8 warps", 2 * 8 * d.tensor.mma_sync_clk)
        self.put("mma.sync, 1 accumulator", d.tensor.mma_sync_latency_clk)
        if law := d.wgmma:
            for n in c.WGMMA_N:
                tensor, operands = law.clk_fixed + law.clk_per_n * n, law.smem_clk_fixed + law.smem_clk_per_n * n
                for group in c.WGMMA_GROUPS:
                    rest = law.fill_clk + law.drain_clk
                    self.put(c.wgmma_name(n, group), rest + group * max(tensor, operands), units=1)
                    self.put(c.wgmma_name(n, group, False), rest + group * tensor, units=1)

    def _memory(self) -> None:
        m = self.device.memory
        for name, rate in (
            ("stream from L2, one SM", m.sm_byte_per_ns),
            ("stream from L2", m.l2_byte_per_ns),
            ("stream from HBM", m.hbm_byte_per_ns),
        ):
            self.put(name, CLOCK / rate, units=65536)
        self.put("chase in L2", CLOCK * m.l2_latency_ns)
        self.put("chase in HBM", CLOCK * m.hbm_latency_ns)
        if tma := self.device.tma:
            for rows in c.BOX_ROWS:
                flight = 128 * rows / tma.sm_byte_per_ns
                self.put(f"TMA from L2, {rows} rows", CLOCK * (tma.l2_latency_ns + flight), units=1)
                self.put(f"TMA from HBM, {rows} rows", CLOCK * (tma.hbm_latency_ns + flight), units=1)
            for loads in c.ISSUE_LOADS:
                self.put(f"{loads} TMA loads on one mbarrier", 500 + loads * tma.issue_clk, units=1)
            self.put("mbarrier", tma.mbarrier_clk, units=1)

    def _rest(self) -> None:
        d = self.device
        self.put("shared memory rate", 8 * 32 / d.smem.byte_per_clk, units=128)
        self.put("shared memory latency", d.smem.latency_clk)
        self.put("CTA barrier", d.barrier.cta_clk)
        self.put("named barrier", d.barrier.named_clk)
        for ctas in c.EMPTY_CTAS:
            ns = 1000 * d.launch.kernel_us + ctas * d.launch.cta_interval_ns
            self.put(f"empty kernels of {ctas} CTAs", CLOCK * ns, units=1, turns=100)


def with_pack(rate: float, on_exp_pipe: int) -> DeviceSpec:
    device = load_device("h100-sxm5")
    return replace(device, pipes=replace(device.pipes, pack_op_per_clk=rate, pack_on_exp_pipe=on_exp_pipe))


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("seed", range(3))
def test_known_numbers_come_back(name: str, seed: int) -> None:
    device = load_device(name)
    found = c.findings(Times(device, seed=seed).raw(), device)
    assert found.refused == {}
    known = device.numbers()
    # Constants of lines are uncertain by more than the points are.
    loose = {"wgmma.clk_fixed": 0.3, "wgmma.smem_clk_fixed": 0.1, "launch.gap_us": 0.02, "launch.cta_interval_ns": 0.02}
    for key, number in found.numbers.items():
        assert number.value == pytest.approx(known[key], rel=loose.get(key, 0.01), abs=loose.get(key, 0)), key


@pytest.mark.parametrize("name", DEVICES)
def test_without_noise_they_come_back_exactly(name: str) -> None:
    device = load_device(name)
    for key, number in c.findings(Times(device, noise=0).raw(), device).numbers.items():
        assert number.value == pytest.approx(device.numbers()[key], rel=1e-6), key
        assert number.spread in (None, pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize("name", DEVICES)
def test_every_number_is_measured_told_by_the_driver_or_left_to_the_base_for_a_reason(name: str) -> None:
    device = load_device(name)
    measured = set(c.findings(Times(device).raw(), device).numbers)
    other = facts_of(device, sm_count=7, l2_byte=7, hbm_byte=7, smem_per_sm_byte=7, smem_per_cta_byte=7, max_mhz=7.0)
    told = set(told_by_driver(device, other))
    for key in device.numbers():
        left = key in c.NOT_MEASURED or key.partition(".")[0] in c.NOT_MEASURED
        assert key in measured or key in told or left, key
        assert not (key in measured and left), key


@pytest.mark.parametrize("rate", [16, 32, 64])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_whether_pack_is_on_the_exp_pipe(rate: float, shared: int, seed: int) -> None:
    device = with_pack(rate, shared)
    found = c.findings(Times(device, noise=0.004, seed=seed).raw(), device, ["pipes"])
    assert found.numbers["pipes.pack_on_exp_pipe"].value == shared
    assert found.numbers["pipes.pack_op_per_clk"].value == pytest.approx(rate, rel=0.01)


def test_the_mix_that_decides_has_parts_of_similar_times() -> None:
    device = with_pack(64, 1)
    note = c.findings(Times(device).raw(), device, ["pipes"]).numbers["pipes.pack_on_exp_pipe"].note
    assert note.startswith("exp + 4 pack: ")
    assert "shared" in note


@pytest.mark.parametrize(
    ("together", "error", "verdict"),
    [
        (20, 0, "shared"),
        (18.1, 0, "shared"),
        (17.9, 0, "undecided"),
        (12.1, 0, "undecided"),
        (11.9, 0, "separate"),
        (10, 0.09, "separate"),
        (10, 0.11, "undecided"),
        (25, 0, "undecided"),
        (7, 0, "undecided"),
    ],
)
def test_the_rule_for_one_pipe_or_two(together: float, error: float, verdict: str) -> None:
    assert Overlap({"exp": 1, "pack": 1}, (10, 10), together, error).verdict == verdict


def test_an_undecided_pack_pipe_is_left_to_the_base() -> None:
    times = Times(with_pack(16, 1))
    for n in (1, 2, 4):
        times.put(f"exp + {n if n > 1 else ''} pack".replace("  ", " "), 32 * (1 + n) - 16, units=256)
    found = c.findings(times.raw(), times.device, ["pipes"])
    assert "pipes.pack_on_exp_pipe" not in found.numbers
    assert "neither one pipe (at most 0.2) nor two (at least 0.8)" in found.refused["pipes.pack_on_exp_pipe"]


def test_times_that_vary_are_refused() -> None:
    times = Times(load_device("h100-sxm5"))
    times.noise = 0.2
    times.put("exp", 32)
    found = c.findings(times.raw(), times.device, ["pipes"])
    assert {"pipes.exp_op_per_clk", "pipes.pack_on_exp_pipe"} == set(found.refused)
    assert "above 5%" in found.refused["pipes.exp_op_per_clk"]


def test_times_that_do_not_grow_are_refused() -> None:
    same = [Reading(100.0, 57.0)] * 10
    with pytest.raises(Refused, match="not measurably longer"):
        Timing(16, 1, same, same).clk()
    with pytest.raises(Refused, match="too few"):
        Estimate.of([1.0, 1.0, 1.0])


def test_start_up_cancels() -> None:
    short, long = [Reading(1e6 + 160, 0)] * 4, [Reading(1e6 + 320, 0)] * 4
    assert Timing(16, 5, short, long).clk() == Estimate(2.0, 0.0, 4)


def test_points_that_lie_on_no_line_are_refused() -> None:
    times = Times(load_device("h100-sxm5"))
    times.put(c.wgmma_name(128, 16), 2000, units=1)
    found = c.findings(times.raw(), times.device, ["wgmma"])
    assert set(found.refused) == {"wgmma.clk_fixed", "wgmma.clk_per_n", "wgmma.fill_clk", "wgmma.drain_clk"}
    assert "no line" in found.refused["wgmma.clk_per_n"]
    assert "wgmma.smem_clk_per_n" in found.numbers


def test_neither_part_of_a_line_is_negative() -> None:
    def points(*y: float) -> dict[float, Estimate]:
        return {float(x): Estimate(v, 0.0, 9) for x, v in zip((64, 128, 256), y, strict=True)}

    constant, slope = line(points(31.9, 63.95, 128.05))
    assert constant.value == 0
    assert slope.value == pytest.approx(0.5, rel=0.01)
    constant, slope = line(points(100, 99.9, 99.8))
    assert slope.value == 0
    assert constant.value == pytest.approx(99.9)


def test_what_did_not_run_is_refused_with_its_reason() -> None:
    device = load_device("h100-sxm5")
    raw = Times(device).raw()
    timings = {name: timing for name, timing in raw.timings.items() if name != "mbarrier"}
    found = c.findings(replace(raw, timings=timings, failed={"mbarrier": "OutOfResources: x"}), device, ["tma"])
    assert found.refused == {"tma.mbarrier_clk": "mbarrier: OutOfResources: x"}


def test_a_rate_above_the_peak_is_refused() -> None:
    device = load_device("h100-sxm5")
    slow = replace(device, memory=replace(device.memory, hbm_peak_byte_per_ns=1000.0))
    found = c.findings(Times(device).raw(), slow, ["memory"])
    assert "above the peak of 1000" in found.refused["memory.hbm_byte_per_ns"]
    assert "memory.hbm_byte_per_ns" in c.findings(Times(device).raw(), slow, ["memory"], 5000.0).numbers


def test_the_clock_is_cycles_over_ns() -> None:
    assert Times(load_device("l4")).raw().clock_mhz() == pytest.approx(1755, rel=1e-6)
    assert Raw({}).clock_mhz() is None


@pytest.mark.parametrize(
    ("name", "capability", "sms", "gigabytes", "base"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", 132, 85.0, "h100-sxm5"),
        ("NVIDIA H100 PCIe", "9.0", 114, 84.9, "h100-pcie"),
        ("NVIDIA H200", "9.0", 132, 150.1, "h200-sxm"),
        ("NVIDIA A100-SXM4-80GB", "8.0", 108, 84.9, "a100-sxm4-80gb"),
        ("NVIDIA A100-SXM4-40GB", "8.0", 108, 42.3, "a100-sxm4-40gb"),
        ("NVIDIA A100 80GB PCIe", "8.0", 108, 85.0, "a100-pcie-80gb"),
        ("NVIDIA L4", "8.9", 58, 23.6, "l4"),
        ("NVIDIA GeForce RTX 4090", "8.9", 128, 25.3, "l4"),
        ("NVIDIA A10", "8.6", 72, 24.0, "a100-sxm4-40gb"),
    ],
)
def test_the_nearest_device(name: str, capability: str, sms: int, gigabytes: float, base: str) -> None:
    assert nearest(Facts(name, capability, "", sms, 50 << 20, int(gigabytes * 1e9))) == base


def test_a_gpu_of_an_architecture_without_device_files() -> None:
    facts = Facts("NVIDIA B200", "10.0", "", 148, 126 << 20, 192 * 10**9)
    with pytest.raises(InputError, match=r"NVIDIA B200, of compute capability 10.0: .* ampere or ada or hopper"):
        nearest(facts)
    with pytest.raises(InputError, match="h100-sxm5 is of another architecture"):
        check_base(load_device("h100-sxm5"), facts)


def written(tmp_path: Path, base: DeviceSpec, facts: Facts, entries: dict[str, Citation]) -> DeviceSpec:
    path = tmp_path / "my_gpu.toml"
    path.write_text(device_text(base, facts, entries, ['a "comment"\nof two lines']), encoding="utf-8")
    return load_device(path)


@pytest.mark.parametrize("name", DEVICES)
def test_the_file_is_read_back(tmp_path: Path, name: str) -> None:
    base, truth = load_device(name), load_device(name)
    pipes = replace(truth.pipes, exp_op_per_clk=15.9, row_reduce_clk=61.25)
    truth = replace(truth, pipes=pipes)
    raw = Times(truth, noise=0.001).raw()
    numbers = c.findings(raw, base).numbers
    entries = as_entries(numbers.values(), facts_of(base), raw.clock_mhz())
    device = written(tmp_path, base, facts_of(base), entries)
    assert device.pipes.row_reduce_clk == pytest.approx(61.25, rel=0.003)
    for key, cited in device.citations.items():
        if key in numbers:
            assert cited.value == float(f"{numbers[key].value:.4g}")
            assert cited.status in ("measured", "fitted", "derived")
            assert cited.source.startswith("flashsim calibrate ")
            assert base.title in cited.source
            assert "SM clock 1755 MHz" in cited.source
            assert cited.note == numbers[key].note
        else:
            assert cited == base.citations[key]
    assert device.citations["pipes.exp_op_per_clk"].status == "measured"
    assert device.device_hash != base.device_hash


@pytest.mark.parametrize("name", DEVICES)
def test_nothing_measured_is_the_base(tmp_path: Path, name: str) -> None:
    base = load_device(name)
    device = written(tmp_path, base, facts_of(base), told_by_driver(base, facts_of(base)))
    assert device.citations == base.citations
    assert device.device_hash == base.device_hash


def test_what_the_driver_tells_of_another_gpu(tmp_path: Path) -> None:
    base = load_device("h100-sxm5")
    facts = facts_of(
        base, name="NVIDIA GH200 480GB", sm_count=114, l2_byte=60 << 20, hbm_byte=96 * 10**9, max_mhz=1700.0
    )
    told = told_by_driver(base, facts)
    assert set(told) == {
        *("sm.count", "memory.l2_byte", "memory.l2_share_byte", "memory.hbm_byte"),
        *("clock.max_mhz", "clock.datasheet_mhz", "tensor.fp16_tflops"),
    }
    device = written(tmp_path, base, facts, told)
    assert device.name == "nvidia-gh200-480gb"
    assert device.memory.l2_share_byte == 30 << 20
    assert device.tensor.fp16_tflops == pytest.approx(114 * 4096 * 1700e-6, abs=0.1)


def test_texts_that_toml_must_quote(tmp_path: Path) -> None:
    base = load_device("l4")
    odd = 'a "quoted" \\ back\nslash \t µ'
    entry = {"smem.latency_clk": Citation(31.5, "measured", odd, odd)}
    device = written(tmp_path, base, facts_of(base, name='GPU "X" \\ 1'), entry)
    assert device.citations["smem.latency_clk"].source == 'a "quoted" \\ back slash µ'
    assert device.title == 'GPU "X" \\ 1'


class Recording(microbenchmarks.Bench):
    """Measures nothing and keeps the names."""

    def tensor(self, *shape: int, dtype: str = "int32") -> None:
        return None

    def clk(self, name: str, *_: object) -> None:
        self.timings[name] = None  # type: ignore[assignment]

    ns = clk
    attempt = clk


@pytest.mark.parametrize("name", DEVICES)
def test_what_is_run_is_what_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(microbenchmarks, "_chain", lambda *_: (None, None))
    device = load_device(name)
    bench = Recording(lambda _: None)
    for run in microbenchmarks._RUNS.values():
        run(bench, facts_of(device), device)
    unread = {c.wgmma_name(n, 16, False) for n in c.WGMMA_N} | {
        c.wgmma_name(n, g, False) for n in (8, 16, 32) for g in c.WGMMA_GROUPS
    }
    assert bench.timings.keys() - {"gap between kernels"} == Times(device).timings.keys() - unread
    assert microbenchmarks._RUNS.keys() == c.SECTIONS.keys()


def test_a_microbenchmark_that_fails_does_not_end_the_others() -> None:
    told: list[str] = []
    bench = microbenchmarks.Bench(told.append)

    def fail() -> None:
        raise RuntimeError("out of something\nand more")

    bench.attempt("x", fail)
    bench.attempt("y", lambda: None)
    assert bench.failed == {"x": "RuntimeError: out of something"}
    assert told == ["x", "y"]


def test_readings_of_several_ctas() -> None:
    torch = pytest.importorskip("torch")
    one = [[10, 12], [110, 115], [1000, 1001], [2000, 2002]]
    other = [[500, 500], [700, 640], [990, 1001], [1900, 1901]]
    assert microbenchmarks.reading(torch.tensor([one, other])) == Reading(200.0, 1012.0)


def test_gaps_between_kernels() -> None:
    """Times since 1970, of which a float would lose hundreds of ns."""
    torch = pytest.importorskip("torch")
    now = 1_750_000_000_000_000_000
    starts, stops = [[0, 7], [1100, 1033], [2300, 2301]], [[50, 33], [1200, 1150], [2500, 2400]]
    kernels = [
        torch.tensor([[[0], [0], [now + start], [now + stop]] for start, stop in zip(*pair, strict=True)])
        for pair in zip(starts, stops, strict=True)
    ]
    assert microbenchmarks.gap_ns(kernels) == ((1033 - 50) + (2300 - 1200)) / 2


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DeviceSpec:
    """A machine with an H200, of which the exp pipe is a little slow."""
    known = load_device("h200-sxm")
    device = replace(known, pipes=replace(known.pipes, exp_op_per_clk=15.5))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(microbenchmarks, "facts", lambda: facts_of(device, name="NVIDIA H200"))
    monkeypatch.setattr(microbenchmarks, "measure", lambda *_: Times(device).raw())
    return device


OPTIONS = ("--batch", "1", "--seqlen", "1024", "--heads", "8", "--head-dim", "128")


@pytest.mark.usefixtures("gpu")
def test_the_command_writes_a_device_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate"]) == 0
    out = capsys.readouterr().out
    assert "pipes.exp_op_per_clk" in out
    assert out.splitlines()[-1] == "wrote my_gpu.toml"
    device = load_device("./my_gpu.toml")
    assert (device.name, device.title) == ("nvidia-h200", "NVIDIA H200")
    assert device.pipes.exp_op_per_clk == pytest.approx(15.5, rel=0.01)
    assert main(["simulate", "--gpu", "./my_gpu.toml", "--schedule", "fa3", *OPTIONS]) == 0
    capsys.readouterr()
    assert main(["calibrate"]) == 2
    assert "--output: my_gpu.toml exists; name it to replace it" in capsys.readouterr().err
    assert main(["calibrate", "--output", "my_gpu.toml"]) == 0


@pytest.mark.usefixtures("gpu")
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--only", "pipes, smem", "--output", "x.toml", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["output", "base", "clock_mhz", "numbers", "refused", "kept", "overlaps"]
    assert (report["output"], report["base"]) == ("x.toml", "h200-sxm")
    assert {key.partition(".")[0] for key in report["numbers"]} == {"pipes", "smem"}
    exp = report["numbers"]["pipes.exp_op_per_clk"]
    assert exp["base"] == 16
    assert exp["status"] == "measured"
    assert exp["spread"] < 0.05
    assert set(report["kept"]) | set(report["numbers"]) == set(load_device("h200-sxm").numbers())
    assert report["overlaps"][0].keys() == {"mix", "alone_clk", "together_clk", "overlap", "verdict"}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "pipe,smem"], "--only: unknown section 'pipe', did you mean 'pipes'?"),
        (["--base", "l4"], "--base: l4 is of another architecture, ada; NVIDIA H200 has compute capability 9.0"),
        (["--base", "h100"], "unknown GPU 'h100'"),
        (["--output", "nowhere/x.toml"], "--output: cannot write nowhere/x.toml"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["calibrate", *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("gpu")
def test_nothing_is_written_if_nothing_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(microbenchmarks, "measure", lambda *_: Raw({}, failed={"shared memory rate": "no luck"}))
    assert main(["calibrate", "--only", "smem"]) == 1
    assert "nothing could be measured: shared memory rate: no luck" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_section_that_the_gpu_does_not_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = load_device("a100-sxm4-80gb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(microbenchmarks, "facts", lambda: facts_of(device))
    monkeypatch.setattr(microbenchmarks, "measure", lambda *_: Times(device).raw())
    assert main(["calibrate", "--only", "smem,tma"]) == 2
    assert "--only: a GPU like a100-sxm4-80gb has no tma" in capsys.readouterr().err
    assert main(["calibrate"]) == 0
    assert load_device("./my_gpu.toml").tma is None


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ([], ["--only", "nonsense"], ["--base", "nowhere.toml"]):
        assert main(["calibrate", *options]) == 1
        written = capsys.readouterr()
        assert written.out == ""
        assert "calibrate needs a CUDA GPU, and PyTorch finds none here: nothing was measured" in written.err


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(FlashsimError, match="with PyTorch and Triton"):
        microbenchmarks.facts()


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """In a process of its own, since kernels are interpreted in this one."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "flashsim", "calibrate", "--json", "--output", str(tmp_path / "x.toml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["refused"] == []
    for key in ("pipes.exp_op_per_clk", "pipes.alu_op_per_clk", "pipes.fma_op_per_clk", "smem.byte_per_clk"):
        assert report["numbers"][key]["value"] == pytest.approx(report["numbers"][key]["base"], rel=0.1), key
