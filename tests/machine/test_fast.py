"""The fast path against the full simulation of every SM and every CTA, on devices small enough to afford it.

`-s` prints every case and the worst. A case is a random problem on a GPU of a few H100 SMs, with HBM and L2 of 0.5 to 2
times their share of an H100's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import pytest

from flashsim.devices import DeviceSpec, load_device
from flashsim.machine import probe
from flashsim.machine.fast import FastSimulation
from flashsim.machine.gpu import FullSimulation, KernelRun
from flashsim.machine.options import Options
from flashsim.machine.probe import Probe, Trace
from flashsim.problem import AttentionProblem
from flashsim.schedules import load_schedule
from flashsim.schedules.fa3 import FA3
from flashsim.simulate import simulate

H100 = load_device("h100-sxm5")
MEMORY_MATTERS = 1.05
"""A case in which shared memory makes the full simulation this much slower than private memory is one where it binds or
nearly binds."""
FA3_SWITCHES: list[dict[str, str]] = [
    {},
    {},
    {"build": "2024-07"},
    {"intra_wg_overlap": "false", "BLOCK_M": "128"},
    {"num_stages": "3", "BLOCK_N": "80"},
]
WITHOUT_TURNS: list[dict[str, str]] = [{"pingpong": "false"}, {"pingpong": "false", "intra_wg_overlap": "false"}]


@dataclass(frozen=True)
class Case:
    schedule: str
    device: DeviceSpec
    problem: AttentionProblem
    switches: dict[str, str]

    def run(self, kind: type[FastSimulation] | type[FullSimulation], private: bool) -> KernelRun:
        chosen = load_schedule(self.schedule).configure(self.problem, "hopper", self.switches)
        (kernel,) = chosen.kernels(self.problem)
        return kind(self.device, 1500, kernel, self.problem, Options(private_memory=private)).run()

    def __str__(self) -> str:
        p, d = self.problem, self.device
        sizes = f"B {p.batch} H {p.heads_q}/{p.heads_kv} S {p.seqlen_q} D {p.head_dim} {p.mask}"
        return (
            f"{self.schedule} on {d.sm.count} SMs, {d.memory.hbm_byte_per_ns:.0f} B/ns, {sizes} {self.switches or ''}"
        )


def cases(schedule: str, count: int, seed: int, switches: list[dict[str, str]]) -> Iterator[Case]:
    draw = random.Random(seed)
    for _ in range(count):
        sms = draw.choice([2, 3, 4, 6])
        share = sms / H100.sm.count
        memory = replace(
            H100.memory,
            hbm_byte_per_ns=H100.memory.hbm_byte_per_ns * share * draw.choice([0.5, 1, 2]),
            l2_byte_per_ns=H100.memory.l2_byte_per_ns * share,
            l2_share_byte=int(H100.memory.l2_share_byte * share * draw.choice([0.5, 1, 2])),
        )
        heads = draw.choice([2, 3, 4, 6, 8])
        problem = AttentionProblem(
            batch=draw.choice([1, 2]),
            heads_q=heads,
            heads_kv=draw.choice([h for h in range(1, heads + 1) if heads % h == 0]),
            seqlen_q=draw.choice([512, 777, 1024, 1500, 2048]),
            head_dim=draw.choice([64, 128]),
            mask=draw.choice(["full", "causal"]),
        )
        # The CTAs of one SM start as far apart as they do on an H100.
        launch = replace(H100.launch, cta_interval_ns=H100.launch.cta_interval_ns / share)
        device = replace(H100, sm=replace(H100.sm, count=sms), memory=memory, launch=launch)
        yield Case(schedule, device, problem, draw.choice(switches))


def errors(schedule: str, count: int, seed: int, switches: list[dict[str, str]]) -> tuple[list[float], list[float]]:
    """Errors of the fast path with shared memory: where compute binds, and where memory does or nearly does."""
    compute, memory = [], []
    for case in cases(schedule, count, seed, switches):
        full = case.run(FullSimulation, private=False).ticks
        slowdown = full / case.run(FullSimulation, private=True).ticks
        error = case.run(FastSimulation, private=False).ticks / full - 1
        print(f"{error:+.2%} memory makes it {slowdown:.2f} times as long: {case}")  # noqa: T201
        (memory if slowdown >= MEMORY_MATTERS else compute).append(error)
    for name, found in (("compute", compute), ("memory", memory)):
        worst, mean = max(map(abs, found), default=0), fmean([*map(abs, found)] or [0])
        print(f"{schedule}, {name} binds: {len(found)} cases, mean {mean:.2%}, worst {worst:.2%}")  # noqa: T201
    return compute, memory


@pytest.mark.parametrize("warp_specialized", ["true", "false"])
def test_equal_ticks_where_no_memory_is_shared(warp_specialized: str) -> None:
    """With one CTA on each SM: every tick of the end, and of every unit's work, persistent CTAs and single ones."""
    for case in cases("fa3", 12, seed=1, switches=FA3_SWITCHES):
        case = replace(case, switches={**case.switches, "warp_specialized": warp_specialized})
        full, fast = case.run(FullSimulation, private=True), case.run(FastSimulation, private=True)
        assert (fast.ticks, fast.active) == (full.ticks, full.active), case
        assert {u: fast.busy[u] for u in ("tensor", "exp", "fma", "alu", "smem")} == {
            u: full.busy[u] for u in ("tensor", "exp", "fma", "alu", "smem")
        }, case


def test_fa3_with_shared_memory() -> None:
    compute, memory = errors("fa3", 24, seed=2, switches=FA3_SWITCHES)
    assert min(len(compute), len(memory)) >= 6
    assert max(map(abs, compute)) <= 0.01
    assert max(map(abs, memory)) <= 0.04
    assert fmean(map(abs, memory)) <= 0.01


def test_fa3_without_turns() -> None:
    """Warpgroups that no turn keeps apart settle in a phase that the spread of the memory's latency decides in the full
    simulation, and that the fast path, which learns from an SM without it, does not always find."""
    compute, memory = errors("fa3", 8, seed=4, switches=WITHOUT_TURNS)
    assert max(map(abs, compute + memory)) <= 0.12


def test_fa2_with_shared_memory() -> None:
    """Two CTAs share an SM and fall into step in one of a few ways, of which the fast path knows a mean."""
    compute, memory = errors("fa2", 16, seed=3, switches=[{}])
    assert max(map(abs, compute + memory)) <= 0.06
    assert fmean(map(abs, compute + memory)) <= 0.02


def test_fa2_where_no_memory_is_shared() -> None:
    found = []
    for case in cases("fa2", 12, seed=5, switches=[{}]):
        full, fast = case.run(FullSimulation, private=True), case.run(FastSimulation, private=True)
        found.append(fast.ticks / full.ticks - 1)
    assert max(map(abs, found)) <= 0.05
    assert fmean(map(abs, found)) <= 0.015


def test_several_ctas_with_short_loops_on_an_sm() -> None:
    """Kernels of standard attention whose CTAs have a KV tile or two, where there is hardly a loop to look at."""
    device = replace(H100, sm=replace(H100.sm, count=4))
    problem = AttentionProblem(batch=2, heads_q=4, seqlen_q=512, head_dim=64)
    fast, full = (simulate(problem, "standard", device, full=full).ticks for full in (False, True))
    assert fast == pytest.approx(full, rel=0.08)


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        ("fa2", AttentionProblem(batch=16, heads_q=16, seqlen_q=512, head_dim=128, mask="causal")),
        ("fa3", AttentionProblem(batch=16, heads_q=16, seqlen_q=512, head_dim=128, mask="causal")),
        ("standard", AttentionProblem(batch=8, heads_q=32, seqlen_q=512, head_dim=64)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_on_a_whole_h100(schedule: str, problem: AttentionProblem) -> None:
    fast, full = (simulate(problem, schedule, H100, full=full).time_us for full in (False, True))
    print(f"{schedule}: {fast:.1f} us, {full:.1f} us in full, {fast / full - 1:+.2%}")  # noqa: T201
    assert fast == pytest.approx(full, rel=0.03 if schedule == "fa2" else 0.02)


def test_what_a_whole_h100_costs() -> None:
    """16 heads of 16384 queries: 75 000 KV tiles an SM, in less than 100 000 events in all."""
    problem = AttentionProblem(batch=1, heads_q=16, seqlen_q=16384, head_dim=128)
    (kernel,) = load_schedule("fa3").configure(problem, "hopper", {}).kernels(problem)
    assert FastSimulation(H100, 1830, kernel, problem).run().events < 100_000


@pytest.mark.parametrize("schedule", ["fa1", "fa2", "fa3"])
def test_what_is_learnt_of_a_kernel_serves_at_other_lengths(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    run = Probe._run

    def counted(self: Probe, *given: Any) -> Trace:
        probed.append(self.kernel.name)
        return run(self, *given)

    monkeypatch.setattr(probe, "KNOWN", probe._Known())
    monkeypatch.setattr(Probe, "_run", counted)
    counts = []
    for seqlen in (4096, 8192):
        probed.clear()
        simulate(AttentionProblem(batch=2, heads_q=4, seqlen_q=seqlen, head_dim=64, direction="fwd+bwd"), schedule)
        counts.append(len(probed))
    assert counts[1] <= counts[0] / 2


@pytest.mark.parametrize(
    ("schedule", "heads", "head_dim", "lengths", "before"),
    [("fa1", 16, 64, (16, 128), (256, 20)), ("fa3", 16, 128, (1152, 176), (8, 1760))],
)
def test_what_was_simulated_before_does_not_show(
    schedule: str,
    heads: int,
    head_dim: int,
    lengths: tuple[int, int],
    before: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a problem without a whole block, the first block is shorter than other problems' are."""
    gpu = "a100-sxm4-40gb" if schedule == "fa1" else "h100-sxm5"
    results = []
    for all_lengths in ([lengths], [before, lengths]):
        monkeypatch.setattr(probe, "KNOWN", probe._Known())
        for seqlen_q, seqlen_k in all_lengths:
            p = AttentionProblem(batch=8, heads_q=heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim)
            result = simulate(p, schedule, gpu)
        results.append((result.ticks, result.hbm_bytes, result.utilization))
    assert results[0] == results[1]


class Slower(FA3):
    """Has more to do between any two waits."""

    def attend(self, wg: Any, s: Any, r: Any, tile: Any) -> Any:
        for event in super().attend(wg, s, r, tile):
            wg.map("scale", r.O, into=r.O)
            yield event


def test_a_subclass_is_another_schedule() -> None:
    """Though it inherits the programs of the roles."""
    problem = AttentionProblem(batch=2, heads_q=8, seqlen_q=2048, head_dim=128, mask="causal")  # all blocks are whole
    Slower.__qualname__ = "FA3"
    assert simulate(problem, "fa3").ticks < simulate(problem, Slower).ticks
