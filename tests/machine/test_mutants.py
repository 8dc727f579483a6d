"""Every wait and every signal of a schedule is needed: without it, a single functional run says so.

Each statement of fa2.py and fa3.py that waits or signals is taken away, one at a time, and the mutant runs once on each
of a few small problems at hardware latencies. It is noticed if a run reports a race, a hazard or a deadlock, or if its
numbers are not accepted. What survives is listed with the reason why it is right. `pytest -s` prints the whole table.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutants import PROBE, Mutant, mutants_of, probed

from flashsim import schedules
from flashsim.devices import load_device
from flashsim.engine import Memory
from flashsim.errors import SimulationError
from flashsim.problem import AttentionProblem
from flashsim.schedules import Schedule, load_schedule
from flashsim.simulate import simulate

CLASSES = {"fa2": "FA2", "fa3": "FA3"}
NOT_RUN = "."
SURVIVED = "-"

REFILL_TWICE = (
    "refill waits twice for the same thing, the sync of all consumers and the ring's empty barrier: "
    "either one is enough, and without both the load is a race"
)
FIRST_LOADS = "without a producer a CTA has one work tile: the rings are empty, phase -1 is complete from the start"
SCOREBOARD = "an mma.sync product writes registers, and the scoreboard holds every reader back until they are written"

EQUIVALENT = {
    "fa3": {
        ("refill", "yield s.consumers.wait()", "removed"): REFILL_TWICE,
        ("refill", "yield s.consumers.wait()", "arrives only"): REFILL_TWICE,
        ("refill", "yield ring.empty(following)", "removed"): REFILL_TWICE,
        ("first_loads", "yield s.K.empty(j)", "removed"): FIRST_LOADS,
        ("first_loads", "yield s.V.empty(j)", "removed"): FIRST_LOADS,
    },
    "fa2": {
        ("program", "yield wg.gemm(s.Q.rows(*my_rows), s.K.T, into=r.S)", "not awaited"): SCOREBOARD,
        ("program", "yield wg.gemm(r.P, s.V, into=r.O, accumulate=True)", "not awaited"): SCOREBOARD,
    },
}
"""(function, statement, change) of every mutant that is not noticed, and why it need not be."""


@dataclass(frozen=True)
class Case:
    """One problem on one SM: a persistent CTA gets all tiles, and each has more KV tiles than the rings have slots."""

    name: str
    options: dict[str, Any]
    mask: str = "full"

    def notice(self, kind: type[Schedule]) -> str:
        """How a functional run notices that something is wrong; SURVIVED if it does not."""
        problem = AttentionProblem(
            batch=1, heads_q=2, heads_kv=1, seqlen_q=130, seqlen_k=150, head_dim=16, head_dim_v=24, mask=self.mask
        )
        device = load_device("h100-sxm5")
        one_sm = dataclasses.replace(device, sm=dataclasses.replace(device.sm, count=1))
        try:
            # What a mutant computes may be nonsense; numpy need not warn about it.
            with np.errstate(all="ignore"):
                result = simulate(problem, kind, one_sm, options=self.options, functional=True)
        except SimulationError as error:
            return type(error).__name__
        assert result.functional is not None
        return SURVIVED if result.functional.accepted else "numbers"


CASES = {
    "fa3": (
        Case("published", {"BLOCK_M": 128, "BLOCK_N": 32}),
        Case(
            "2024", {"BLOCK_M": 128, "BLOCK_N": 32, "build": "2024-07", "num_stages": 1, "P_in_shared": True}, "causal"
        ),
        Case("in order", {"BLOCK_M": 128, "BLOCK_N": 32, "intra_wg_overlap": False}),
        Case("no producer", {"BLOCK_M": 128, "BLOCK_N": 32, "warp_specialized": False}),
    ),
    "fa2": (
        Case("1 warpgroup", {"BLOCK_M": 128, "BLOCK_N": 32}),
        Case("2 warpgroups", {"BLOCK_M": 256, "BLOCK_N": 32}, "causal"),
    ),
}


def source_of(name: str) -> str:
    return (Path(schedules.__file__).parent / f"{name}.py").read_text(encoding="utf-8")


def load_text(name: str, text: str, folder: Path, stem: str) -> type[Schedule]:
    """The schedule class in `text`. `stem` is another one each time: equal names may hit bytecode of the one before."""
    path = folder / f"{stem}.py"
    path.write_text(text, encoding="utf-8")
    return load_schedule(f"{path}:{CLASSES[name]}")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutants")


@cache
def executed(name: str, folder: Path) -> dict[str, set[int]]:
    """By case, the lines of mutated statements that it runs. The unchanged schedule must pass."""
    kind = load_text(name, probed(source_of(name)), folder, f"{name}_probed")
    lines: set[int] = getattr(sys.modules[kind.__module__], PROBE)
    by_case = {}
    for case in CASES[name]:
        lines.clear()
        assert case.notice(kind) == SURVIVED
        by_case[case.name] = set(lines)
    return by_case


@cache
def noticed(name: str, folder: Path) -> dict[Mutant, dict[str, str]]:
    """By mutant and case, how it is noticed."""
    ran = executed(name, folder)
    table = {}
    for number, mutant in enumerate(mutants_of(source_of(name))):
        kind = load_text(name, mutant.source, folder, f"{name}_{number}")
        table[mutant] = {
            case.name: case.notice(kind) if mutant.line in ran[case.name] else NOT_RUN for case in CASES[name]
        }
    return table


def show(lines: Iterable[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in ("", *lines)))


@pytest.mark.parametrize("name", CLASSES)
def test_every_mutated_statement_is_run_by_some_case(name: str, folder: Path) -> None:
    ran = set.union(*executed(name, folder).values())
    assert {mutant.line for mutant in mutants_of(source_of(name))} == ran


@pytest.mark.parametrize("name", CLASSES)
def test_every_mutant_is_noticed_or_known_to_be_right(name: str, folder: Path) -> None:
    table = noticed(name, folder)
    survivors = {m.key for m, found in table.items() if set(found.values()) <= {SURVIVED, NOT_RUN}}
    show([f"{'':<90}" + "".join(f"{case.name:<14}" for case in CASES[name])])
    show(f"{m!s:<90}" + "".join(f"{how:<14}" for how in found.values()) for m, found in table.items())
    show(f"survives: {', '.join(key)}\n    {EQUIVALENT[name].get(key, 'WHY?')}" for key in sorted(survivors))
    assert survivors == EQUIVALENT[name].keys()


def test_there_are_as_many_mutants_as_waits_and_signals() -> None:
    """Counted by hand in the files' text: a wait is a `yield` that is no `yield from`."""
    for name in CLASSES:
        lines = [line.partition("#")[0] for line in source_of(name).splitlines()]
        waits = [line for line in lines if line.lstrip().startswith("yield ") and "yield from" not in line]
        signals = [line for line in lines if line.rstrip().endswith(("pass_on()",)) or ".release(" in line]
        syncs = [line for line in waits if ".wait()" in line and "turn" not in line]
        assert len(mutants_of(source_of(name))) == len(waits) + len(signals) + len(syncs)


def test_a_mutant_differs_in_its_line_only() -> None:
    for name in CLASSES:
        text = source_of(name)
        for mutant in mutants_of(text):
            pairs = list(zip(text.splitlines(), mutant.source.splitlines(), strict=True))
            different = [number for number, (old, new) in enumerate(pairs, start=1) if old != new]
            assert different == [mutant.line]
            ast.parse(mutant.source)


# What the list of survivors rests on.


def without(name: str, *keys: tuple[str, str]) -> str:
    """The schedule without all the statements that `keys`, (function, statement), name."""
    text = source_of(name)
    for function, statement in keys:
        while found := [m for m in mutants_of(text) if m.key == (function, statement, "removed")]:
            text = found[0].source
    return text


def test_one_of_the_two_waits_of_a_refill_is_needed(folder: Path) -> None:
    text = without("fa3", ("refill", "yield s.consumers.wait()"), ("refill", "yield ring.empty(following)"))
    kind = load_text("fa3", text, folder, "fa3_no_wait_in_refill")
    assert CASES["fa3"][3].notice(kind) == "Race"


def test_without_turns_only_time_changes(folder: Path) -> None:
    """A turn orders products in time, and no data hangs on it: the waits and the passes together can go."""
    functions = ("attend", "attend_in_order")
    text = without("fa3", *((f, s) for f in functions for s in ("yield s.turn.wait()", "s.turn.pass_on()")))
    assert not [m for m in mutants_of(text) if "turn" in m.statement]
    kind = load_text("fa3", text, folder, "fa3_without_turns")
    assert [case.notice(kind) for case in CASES["fa3"]] == [SURVIVED] * 4


def test_a_sync_of_fa2_matters_where_there_is_somebody_to_sync_with(folder: Path) -> None:
    """One warpgroup of four warps is one party here: between its warps the model sees no order to lose."""
    found = {m: by_case for m, by_case in noticed("fa2", folder).items() if "everybody" in m.statement}
    assert len(found) == 4
    for by_case in found.values():
        assert by_case == {"1 warpgroup": SURVIVED, "2 warpgroups": "Race"}


@pytest.mark.parametrize("statement", ["yield q", "yield k", "yield v"])
def test_a_load_of_fa2_must_be_awaited_with_any_number_of_warpgroups(statement: str, folder: Path) -> None:
    (by_case,) = [by_case for m, by_case in noticed("fa2", folder).items() if m.statement == statement]
    assert by_case == {"1 warpgroup": "Race", "2 warpgroups": "Race"}


@pytest.mark.parametrize(
    ("function", "statement"),
    [
        ("attend", "yield pv"),
    ],
)
def test_happens_before_notices_what_numbers_do_not(
    function: str, statement: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At hardware latencies the other party happens to be ready in time, and O comes out right without the wait.

    `yield pv` is the classic one: P is overwritten while the product that reads it is in flight.
    """
    kind = load_text("fa3", without("fa3", (function, statement)), folder, f"fa3_{function}_unordered")
    case = CASES["fa3"][0]
    assert case.notice(kind) == "Race"
    monkeypatch.setattr(Memory, "_collide", lambda *_, **__: None)
    assert case.notice(kind) == SURVIVED


# Other bugs, none of them a missing wait.

PUBLISHED, _, _, _ = CASES["fa3"]
ONE_CONSUMER = Case("one consumer", {"BLOCK_M": 64, "BLOCK_N": 32, "P_in_shared": False})
ALONE = Case("one consumer, no producer", {"BLOCK_M": 64, "BLOCK_N": 32, "warp_specialized": False})
FA2_ONE, FA2_TWO = CASES["fa2"]


@dataclass(frozen=True)
class Bug:
    """Pieces of a schedule's text, each there once, and what stands in their places."""

    title: str
    schedule: str
    case: Case
    edits: tuple[tuple[str, str], ...]

    def text(self) -> str:
        text = source_of(self.schedule)
        for old, new in self.edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        return text


BUGS = (
    Bug(
        "K is handed back by one consumer for both",
        "fa3",
        PUBLISHED,
        (
            (
                "(self.BLOCK_N, p.head_dim), self.num_stages, consumers)",
                "(self.BLOCK_N, p.head_dim), self.num_stages, 1)",
            ),
        ),
    ),
    Bug(
        "Q is handed back twice",
        "fa3",
        PUBLISHED,
        (
            (
                "        s.Q.release(tile.index)\n        if rescale_early",
                "        s.Q.release(tile.index)\n        s.Q.release(tile.index)\n        if rescale_early",
            ),
        ),
    ),
    Bug(
        "K is handed back before the product has read it",
        "fa3",
        PUBLISHED,
        (
            (
                "            yield qk  # 12\n            s.K.release(j)\n",
                "            s.K.release(j)\n            yield qk\n",
            ),
        ),
    ),
    Bug(
        "the sync of all consumers counts one",
        "fa3",
        PUBLISHED,
        (('cta.sync("consumers", consumers)', 'cta.sync("consumers", 1)'),),
    ),
    Bug(
        "every consumer stores all of O",
        "fa3",
        PUBLISHED,
        (("if wg.index == self.BLOCK_M // 64 - 1:", "if True:"),),
    ),
    Bug(
        "V is loaded one KV tile early",
        "fa3",
        PUBLISHED,
        (("warp.load(tile.V(j - 1), into=s.V[j - 1])", "warp.load(tile.V(j), into=s.V[j - 1])"),),
    ),
    Bug(
        "O is never rescaled",
        "fa3",
        PUBLISHED,
        (("            if not rescale_early:\n                rescale(wg, r.O, r.stats)  # 14\n", ""),),
    ),
    Bug(
        "both warpgroups load the first half of V",
        "fa2",
        FA2_TWO,
        (("v = wg.load(tile.V(j).rows(*my_keys), into=s.V.rows(*my_keys))", "v = wg.load(tile.V(j), into=s.V)"),),
    ),
    Bug(
        "the next K is loaded before everyone has read this one",
        "fa2",
        FA2_TWO,
        (
            (
                "                yield v\n",
                "                if j < tile.last:\n"
                "                    k = wg.load(tile.K(j + 1).rows(*my_keys), into=s.K.rows(*my_keys))\n"
                "                yield v\n",
            ),
            (
                "                if j < tile.last:\n"
                "                    k = wg.load(tile.K(j + 1).rows(*my_keys), into=s.K.rows(*my_keys))\n"
                "                online_softmax",
                "                online_softmax",
            ),
        ),
    ),
)

ONCE_OVERLOOKED = (
    Bug(
        "S is overwritten while P, which lies in its registers, is still needed",
        "fa2",
        FA2_ONE,
        (
            (
                "wg.convert(r.S, into=r.P)\n",
                'wg.convert(r.S, into=r.P)\n                wg.map("fill", 0.0, into=r.S)\n',
            ),
        ),
    ),
    Bug(
        "O is written over a V that is still needed",
        "fa3",
        ONE_CONSUMER,
        (
            (
                "        yield s.V.full(tile.last)  # 18\n",
                "        yield s.V.full(tile.last)  # 18\n        wg.convert(r.O, into=s.O[tile.index])\n",
            ),
        ),
    ),
    Bug(
        "a load is still on its way to shared memory when the CTA ends",
        "fa2",
        FA2_ONE,
        (("                if j < tile.last:\n", "                if j <= tile.last:\n"),),
    ),
    Bug(
        "the second half of Q is awaited, the first is not: TMA loads end in any order",
        "fa3",
        ALONE,
        (
            (
                'Q=cta.ring("Q", (self.BLOCK_M, p.head_dim), 1, consumers)',
                'Q=cta.slot("Q", (self.BLOCK_M, p.head_dim))',
            ),
            (
                "        wg.load(tile.Q, into=s.Q[tile.index])\n",
                "        wg.load(tile.Q.rows(0, 32), into=s.Q.rows(0, 32))\n"
                "        yield wg.load(tile.Q.rows(32, 32), into=s.Q.rows(32, 32))\n",
            ),
            ("        yield s.Q.full(tile.index)  # 3\n", ""),
            (
                "        Q, P = s.Q[tile.index].rows(64 * wg.index, 64), r.P or s.P[wg.index]\n        j = ",
                "        Q, P = s.Q, r.P or s.P[wg.index]\n        j = ",
            ),
            ("        s.Q.release(tile.index)\n        if rescale_early", "        if rescale_early"),
        ),
    ),
)
"""Wrong on hardware, and accepted: what the machine does not see yet."""


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.title)
def test_a_bug_is_noticed_in_one_run(bug: Bug, tmp_path: Path) -> None:
    assert bug.case.notice(load_text(bug.schedule, bug.text(), tmp_path, "bug")) != SURVIVED


@pytest.mark.parametrize("bug", ONCE_OVERLOOKED, ids=lambda bug: bug.title)
def test_a_bug_that_the_machine_once_overlooked(bug: Bug, tmp_path: Path) -> None:
    assert bug.case.notice(load_text(bug.schedule, bug.text(), tmp_path, "bug")) != SURVIVED
