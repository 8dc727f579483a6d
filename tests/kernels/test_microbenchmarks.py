"""The machine code of each microbenchmark: between its readings of the clock it does what it says, and nothing else.

Compiled as `flashsim calibrate` launches them, for sm_80 and sm_90; no GPU is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

pytest.importorskip("torch")
pytest.importorskip("triton")

from microbenchmark_calls import Calls, calls

from flashsim.gpu import calibrate as c
from flashsim.gpu.compile import Call, Compiled, compile_call
from flashsim.gpu.estimates import mix_name
from flashsim_kernels.microbenchmarks import barriers, global_memory, pipes, shared_memory, tensor_cores

HELPER = Path(__file__).with_name("microbenchmark_calls.py")
OPCODES = {"exp": "MUFU.EX2", "pack": "F2FP", "max": "FMNMX", "fma": "FFMA"}
WATCHED = (
    *(
        "MUFU",
        "F2FP",
        "F2F",
        "I2F",
        "FMNMX",
        "FFMA",
        "FMUL",
        "FADD",
        "FSEL",
        "FSETP",
        "HFMA2",
        "HADD2",
        "HMMA",
        "HGMMA",
    ),
    *("LDS", "LDSM", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL", "UTMALDG", "UBLKCP", "SYNCS", "BAR", "SHFL", "REDUX"),
    *("WARPGROUP", "ATOM", "ATOMS", "RED", "MEMBAR", "FENCE", "CCTL", "NANOSLEEP"),
)
"""Of these, a loop has what it measures and nothing else."""
LEFT_TO_CI = re.compile(
    r"wgmma N = (?!8, 4|256, 16|128, 8 .*registers)|exp \+ (4 pack|pack|max|4 max)|pack \+|max \+ fma"
    r"|stream from (L2$|HBM)|TMA from (HBM|L2, (128|256))|(4|16) TMA|mma.sync, 8"
)
"""Other sizes of what the profile dev compiles, too."""


class Names(Calls):
    def launch(self, run: Any, readings: Any) -> None:
        pass


def names(target: int) -> list[str]:
    found = calls(target, Names(lambda name: True)).names
    few = settings().max_examples <= 50
    return [name for name in found if not (few and LEFT_TO_CI.match(name))]


@cache
def compiled(target: int) -> dict[str, Compiled]:
    wanted = names(target)
    found = compile_call(Call(f"{HELPER}:launch_all", {"target": target, "names": wanted}), target)
    assert isinstance(found, tuple), str(found)
    return dict(zip(wanted, found, strict=True))


def expected(name: str) -> tuple[dict[str, int], float]:
    """Opcodes, or their beginnings, with how many a turn has; and how many instructions of other kinds it may have."""
    for mix in c.MIXES:
        if name == mix_name(mix):
            rounds = pipes.body(dict(mix))[1]
            return {OPCODES[kind]: rounds * count for kind, count in mix.items()}, 8
    if wgmma := re.match(r"wgmma N = (\d+), (\d+) in a group", name):
        columns, group = map(int, wgmma.groups())
        # The compiler builds descriptors as it goes, and moves registers of A.
        return {f"HGMMA.64x{columns}x16.F32": group, "WARPGROUP.ARRIVE": 1, "WARPGROUP.DEPBAR": 1}, 40 + 4 * group
    sync = {"SYNCS.ARRIVE.TRANS64": 1, "SYNCS.PHASECHK": 1}
    if boxes := re.match(r"(\d+) TMA loads", name):
        return {"UTMALDG.2D": int(boxes[1]), **sync}, 10 * int(boxes[1]) + 12
    if name.startswith("TMA from"):
        return {"UTMALDG.2D": 1, **sync}, 16
    if name.startswith("stream"):
        return {"LDG.E.128": global_memory.UNROLL}, 4 * global_memory.UNROLL
    if name.startswith("chase"):
        return {"LDG.E.64": global_memory.CHASE}, 3
    if name == "mma.sync, 1 accumulator":
        # An HMMA waits some 20 cycles for the one before it, in which these issue.
        return {"HMMA.16816.F32": tensor_cores.UNROLL}, 3 * tensor_cores.UNROLL
    if name.startswith("mma.sync"):
        return {"HMMA.16816.F32": tensor_cores.UNROLL * c.MMA_CHAINS}, 6
    halves = barriers.UNROLL  # of a hand-over; each warp does one of the two
    return {
        "shared memory rate": ({"LDS.128": shared_memory.UNROLL}, 3 * shared_memory.UNROLL),
        "shared memory latency": ({"LDS": shared_memory.STEPS}, 3),
        "row reduction": ({"SHFL.BFLY": 2 * pipes.STEPS, "FMNMX": 2 * pipes.STEPS}, 3),
        "CTA barrier": ({"BAR.SYNC": barriers.UNROLL}, 3),
        "named barrier": ({"BAR.ARV": 2 * halves, "BAR.SYNC": 2 * halves}, 8 * halves + 4),
        "mbarrier": (sync, 8),
    }[name]


def measured_loops(sass: str) -> list[list[str]]:
    """The loops between the first and the last reading of the clock: instructions, without predicates."""
    lines = sass.splitlines()
    clocks = [n for n, line in enumerate(lines) if "SR_CLOCKLO" in line]
    assert len(clocks) == 2, "the clock is read twice"
    labels: dict[str, int] = {}
    found: list[str] = []
    loops = []
    for line in lines[clocks[0] : clocks[1]]:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            found.append(instruction[1])
            jump = re.match(r"BRA.*\((\.L_x_\d+)\)", instruction[1])
            if jump and jump[1] in labels:
                loops.append(found[labels[jump[1]] :])
    return loops


def problems(name: str, sass: str) -> list[str]:
    """What is wrong with the loops. A loop may be unrolled; all of them have the same instructions a turn."""
    wanted, others = expected(name)
    loops = measured_loops(sass)
    found = [] if loops else ["no loop between the readings of the clock"]
    for loop in loops:
        counts = Counter(opcode_of(line, wanted) for line in loop)
        turns = counts[next(iter(wanted))] / next(iter(wanted.values()))
        if turns < 1 or turns != int(turns):
            found.append(f"{turns} turns: {dict(counts)}")
        found += [f"{counts[o]} {o}, not {turns * n:g}" for o, n in wanted.items() if counts[o] != turns * n]
        rest = Counter({o: n for o, n in counts.items() if o not in wanted})
        found += [f"{n} {o}" for o, n in rest.items() if o.split(".")[0] in WATCHED]
        if rest.total() > others * turns:
            found.append(f"{rest.total()} instructions beside, more than {others * turns:g}: {dict(rest)}")
    return found


def opcode_of(line: str, wanted: dict[str, int]) -> str:
    opcode = line.split()[0]
    return next((o for o in wanted if opcode == o or opcode.startswith(f"{o}.")), opcode)


CASES = [(target, name) for target in (80, 90) for name in names(target)]


@pytest.mark.parametrize(("target", "name"), CASES)
def test_the_measured_loop_is_what_it_says(target: int, name: str) -> None:
    kernel = compiled(target)[name]
    assert problems(name, kernel.sass) == []
    assert kernel.stack == 0


CHAINED = ("shared memory latency", "chase in L2", "chase in HBM")


@pytest.mark.parametrize(("target", "name"), [case for case in CASES if case[1] in CHAINED])
def test_each_load_needs_the_one_before(target: int, name: str) -> None:
    for loop in measured_loops(compiled(target)[name].sass):
        loads = [re.match(r"LD[SG]\S* (R\d+), .*\[(R\d+)", " ".join(line.split())) for line in loop]
        steps = [(step[1], step[2]) for step in loads if step]
        assert len(steps) >= 8
        assert all(before[0] == after[1] for before, after in pairwise(steps))


@pytest.mark.parametrize("target", [80, 90])
def test_row_maxima_need_each_other(target: int) -> None:
    for loop in measured_loops(compiled(target)["row reduction"].sass):
        written = None
        for line in loop:
            parts = re.findall(r"R\d+", line)
            if line.startswith("SHFL"):
                assert written in (None, parts[1])
            elif line.startswith("FMNMX"):
                written = parts[0]


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(("name", "count"), [("mma.sync, 1 accumulator", 1), ("mma.sync, 4 warps", 8)])
def test_accumulators_of_mma_sync(target: int, name: str, count: int) -> None:
    for loop in measured_loops(compiled(target)[name].sass):
        registers = [re.findall(r"R\d+", line) for line in loop if line.startswith("HMMA")]
        assert all(one[0] == one[-1] for one in registers)
        assert len({one[0] for one in registers}) == count


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("kind", OPCODES)
def test_instructions_of_a_kind_do_not_wait_for_each_other(target: int, kind: str) -> None:
    """Those that one reads from are seven or eight before it; where the loop ends, a few are put closer."""
    for loop in measured_loops(compiled(target)[kind].sass):
        written: dict[str, int] = {}
        distances = []
        for number, line in enumerate(line for line in loop if line.startswith(OPCODES[kind])):
            to, *operands = re.findall(r"R\d+", line)
            distances += [number - written[operand] for operand in operands if operand in written]
            written[to] = number
        assert min(distances) >= 4
        assert sum(distance < 7 for distance in distances) <= 0.03 * len(distances)


@pytest.mark.parametrize(
    ("name", "opcode"), [("exp + 2 pack", "F2FP"), ("chase in L2", "LDG"), ("mbarrier", "SYNCS.A")]
)
def test_a_missing_or_added_instruction_is_noticed(name: str, opcode: str) -> None:
    sass = compiled(90)[name].sass
    lines = sass.splitlines()
    stop = max(n for n, line in enumerate(lines) if "SR_CLOCKLO" in line)
    place = max(n for n, line in enumerate(lines[:stop]) if re.search(rf"\s{re.escape(opcode)}", line))
    assert problems(name, "\n".join(lines[:place] + lines[place + 1 :]))
    assert problems(name, "\n".join(lines[: place + 1] + lines[place:]))


def test_a_body_has_whole_rounds_of_all_chains() -> None:
    for mix in c.MIXES:
        text, rounds = pipes.body(dict(mix))
        assert rounds % pipes.CHAINS == 0
        assert rounds * sum(mix.values()) > 0.85 * pipes.BODY
        assert text.count("ex2.") == rounds * mix.get("exp", 0)
        assert text.count("cvt.") == rounds * mix.get("pack", 0)
