"""Bugs of the barrier protocol, as pieces of a schedule's text, and what notices them in one run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashsim import schedules
from flashsim.check.mutants import mutants_of
from flashsim.devices import load_device
from flashsim.engine import Memory
from flashsim.errors import SimulationError
from flashsim.problem import AttentionProblem
from flashsim.schedules import Schedule, load_schedule
from flashsim.simulate import simulate

CLASSES = {"fa2": "FA2", "fa3": "FA3"}
SURVIVED = "-"


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
    return tmp_path_factory.mktemp("bugs")


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
                "(self.BLOCK_N, d), self.num_stages, consumers)",
                "(self.BLOCK_N, d), self.num_stages, 1)",
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

LSE_STORE = "            wg.store(r.stats.l, into=tile.LSE.rows(*my_rows))  # 15\n"
ONCE_OVERLOOKED = (
    Bug(
        "two warpgroups store the same rows of the LSE, and the right one happens to be later",
        "fa2",
        FA2_TWO,
        ((LSE_STORE, f"            wg.store(r.stats.l, into=tile.LSE.rows(0, rows))\n{LSE_STORE}"),),
    ),
    Bug(
        "a kernel writes over its input",
        "fa2",
        FA2_ONE,
        ((LSE_STORE, f"{LSE_STORE}            wg.store(r.O, into=tile.Q.rows(*my_rows))\n"),),
    ),
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
                'Q=cta.ring("Q", (self.BLOCK_M, d), 1, consumers)',
                'Q=cta.slot("Q", (self.BLOCK_M, d))',
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
