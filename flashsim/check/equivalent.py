"""Mutants that are right, and why: they change nothing but time, or nothing at all."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import sys
import tokenize
from pathlib import Path

from flashsim.check.mutants import Mutant
from flashsim.schedules import BUILT_IN, Schedule, load_schedule

WRITTEN = re.compile(r"#\s*equivalent:\s*(\S.*)")
"""A comment that says why the mutants of the statement on its line are right."""

TIME_ONLY = "a turn orders products in time; no data depends on it"
WAITS_TOO_EARLY = "all that came after the wait still does; the statement that stood before it now waits, too"
ONE_SLOT = "a ring of one slot: whichever item is handed back, it is the same slot"
REFILL_TWICE = (
    "refill waits twice for the same thing, the sync of all consumers and the ring's empty barrier: "
    "either one is enough, and without both the load is a race"
)
REFILL_FOR_ALL = "with a producer the consumers then meet once more for each item, which costs time and orders nothing"
FIRST_LOADS = "without a producer a CTA has one work tile: the rings are empty, phase -1 is complete from the start"
SCOREBOARD = "an mma.sync product writes registers, and the scoreboard holds every reader back until they are written"
LOAD_AFTER = "the load of V is issued behind the product, not before it, and is awaited all the same: it costs time"
PRODUCT_BEFORE_TURN = "the product waits for all of its operands, but not for its turn: " + TIME_ONLY
REGISTERS_ONLY = "the store before it reads registers, which no other warpgroup can touch"
BEHIND_PV = "dS is read behind the barrier that follows, which comes after the product with P"
LOADS_AFTER = "the loads for the next step are issued behind the product, not before it: it costs time"
PASSED_LATER = "the order is passed on behind the product, not before it: it costs time"
ONE_WARPGROUP = "a check does not tell the four warps of one warpgroup apart, and there is one: the barrier costs time"
ONE_DO = (
    "the only slot of dO is loaded again when all have read P, and who writes P has waited for that; the code has both"
)
TWO_SIGNALS = "two slots are handed on or back one after the other, without a statement between them that uses either"
P_IS_THERE = "LSE is read for P, which has been computed"
ONE_STAGE_LESS = "Q is loaded when the tile before it has been released, which comes after: it costs time"
DV_BEHIND = "the product with P is issued behind the barrier, not before it: it costs time"
ADDS_COMMUTE = (
    "CTAs may add to dQ in any order; that the order then depends on time is noticed where deterministic is asked for"
)
READ_AT_ISSUE = "a store from registers reads them when it is issued, and nothing comes after it in its CTA"
K_BEHIND_V = (
    "the producer loads K again when V has been released, which is after a product that ends after this one: either is "
    "enough"
)
LOAD_BEHIND = "the loads before it are issued behind it, and are awaited all the same: it costs time"
PRODUCTS_APART = "neither of the two products reads what the other writes"
COPY_BEHIND = "the product reads the copy in P; the one in dS is made behind it, and read later"
STORES_APART = "two stores to different tensors, in either order"
READ_BY_THE_PRODUCER = "only the producer reads V, and it has transposed the tile before it loads another into the slot"
FREE_LATER = "the next tile's slot is free later than this one's: it costs time"
O_COMES_BETWEEN = "V is loaded again when the O that lies in its memory has left, which is written after all products"
NOTHING_HANDED_ON = "the turn that is passed on before it is no part of what Q's release says"

EQUIVALENT: dict[str, dict[tuple[str, str, str], str]] = {
    "fa3": {
        ("attend", "s.Q.release(tile.index)", "next item"): ONE_SLOT,
        ("attend", "s.Q.release(tile.index)", "item before"): ONE_SLOT,
        ("attend_in_order", "s.Q.release(tile.index)", "next item"): ONE_SLOT,
        ("attend_in_order", "s.Q.release(tile.index)", "item before"): ONE_SLOT,
        ("attend_in_order", "s.Q.release(tile.index)", "earlier"): NOTHING_HANDED_ON,
        (
            "attend_in_order",
            "yield wg.gemm(P, s.V[j], into=r.O, accumulate=True)",
            "earlier",
        ): PRODUCT_BEFORE_TURN,
        ("write_output", "s.O.release(tile.index)", "next item"): ONE_SLOT,
        ("write_output", "s.O.release(tile.index)", "item before"): ONE_SLOT,
        ("write_output", "yield s.consumers.wait()", "earlier"): REGISTERS_ONLY,
        ("first_loads", "yield s.K.empty(j)", "removed"): FIRST_LOADS,
        ("first_loads", "yield s.V.empty(j)", "removed"): FIRST_LOADS,
        ("refill", "yield s.consumers.wait()", "removed"): REFILL_TWICE,
        ("refill", "yield s.consumers.wait()", "earlier"): REFILL_FOR_ALL,
        ("refill", "yield ring.empty(following)", "removed"): REFILL_TWICE,
    },
    "fa1": {
        ("program", "yield wg.load(tile.K.rows(*keys), into=K)", "earlier"): LOAD_BEHIND,
        ("program", "yield wg.gemm(s.Q[i % 2], K_j.T, into=r.S)", "not awaited"): SCOREBOARD,
        ("program", "yield wg.gemm(s.Q[i % 2], K_j.T, into=r.S)", "earlier"): LOAD_BEHIND,
        ("program", "yield wg.gemm(r.P, V_j.columns(start, columns), into=part)", "not awaited"): SCOREBOARD,
        ("prepare", "yield wg.store(r.L, into=tile.LSE)", "not awaited"): READ_AT_ISSUE,
        ("prepare", "yield wg.store(r.L, into=tile.LSE)", "earlier"): STORES_APART,
    },
    "fa1_backward": {
        **dict.fromkeys(
            [
                ("program", 'yield wg.gemm(Q, (K if self.build == "paper" else r.K).T, into=r.S)', "not awaited"),
                ("program", "yield wg.gemm(P.T, dO, into=r.dV, accumulate=True)", "not awaited"),
                ("program", "yield wg.gemm(dO, V.T, into=r.dP)", "not awaited"),
                ("program", "yield wg.gemm(P.T, Q, into=r.dK, accumulate=True)", "not awaited"),
                ("program", "yield wg.gemm(r.dS, K.columns(start, columns), into=part)", "not awaited"),
            ],
            SCOREBOARD,
        ),
        ("program", 'yield wg.gemm(Q, (K if self.build == "paper" else r.K).T, into=r.S)', "earlier"): LOAD_BEHIND,
        ("program", "yield wg.gemm(dO, V.T, into=r.dP)", "earlier"): PRODUCTS_APART,
        ("program", "yield wg.gemm(P.T, Q, into=r.dK, accumulate=True)", "earlier"): COPY_BEHIND,
        ("prepare", "yield wg.store(r.dQ, into=getattr(tile, through))", "not awaited"): READ_AT_ISSUE,
    },
    "fa2": {
        ("program", "yield wg.gemm(s.Q.rows(*my_rows), s.K.T, into=r.S)", "earlier"): LOAD_AFTER,
    },
    "fa2_backward": {
        ("program", "yield s.everybody.wait()", "earlier"): BEHIND_PV,
        ("program", "yield wg.gemm(s.dS, mine(s.K), into=r.dQ)", "earlier"): LOADS_AFTER,
        ("program", "yield wg.gemm(s.dS.T, mine(Q), into=r.dK, accumulate=True)", "earlier"): PASSED_LATER,
    },
    "fa3_backward": {
        ("producer", "yield s.Q.empty(i)", "next item"): ONE_STAGE_LESS,
        ("consumer", "yield s.PdS.wait()", "removed"): ONE_DO,
        ("consumer", "s.LSE.release(i)", "earlier"): P_IS_THERE,
        ("consumer", "s.Q.release(i)", "earlier"): TWO_SIGNALS,
        ("consumer", "s.K.release(tile.index)", "next item"): ONE_SLOT,
        ("consumer", "s.K.release(tile.index)", "item before"): ONE_SLOT,
        ("consumer", "s.V.release(tile.index)", "next item"): ONE_SLOT,
        ("consumer", "s.V.release(tile.index)", "item before"): ONE_SLOT,
        ("consumer", "s.V.release(tile.index)", "earlier"): TWO_SIGNALS,
        ("rest_of_step", "yield s.PdS.wait()", "earlier"): DV_BEHIND,
        ("rest_of_step", "s.D.release(i)", "earlier"): "D is read for dS, which has been computed: before `yield dV`",
        ("rest_of_step", "s.dO.release(i)", "earlier"): TWO_SIGNALS,
        ("rest_of_step_in_slices", "yield s.PdS.wait()", "earlier"): DV_BEHIND,
        ("rest_of_step_in_slices", "s.D.release(i)", "next item"): ONE_SLOT,
        ("rest_of_step_in_slices", "s.D.release(i)", "item before"): ONE_SLOT,
        ("rest_of_step_in_slices", "s.D.release(i)", "earlier"): "D is read for dS, which has been computed",
        ("rest_of_step_in_slices", "s.dO.release(i)", "next item"): ONE_SLOT,
        ("rest_of_step_in_slices", "s.dO.release(i)", "item before"): ONE_SLOT,
        ("rest_of_step_in_slices", "s.dO.release(i)", "earlier"): TWO_SIGNALS,
        ("dq_writer", "yield s.order.turn(tile, i)", "removed"): ADDS_COMMUTE,
        ("write_output", "yield s.consumers.wait()", "earlier"): "the statement before it is only a test",
        ("write_output", "s.dV.release(tile.index)", "next item"): ONE_SLOT,
        ("write_output", "s.dV.release(tile.index)", "item before"): ONE_SLOT,
        ("write_output", "s.dK.release(tile.index)", "next item"): ONE_SLOT,
        ("write_output", "s.dK.release(tile.index)", "item before"): ONE_SLOT,
        ("write_output", "s.dK.release(tile.index)", "earlier"): TWO_SIGNALS,
        (
            "clear",
            'yield wg.store(r, into=getattr(tile, f"{name}_accum").rows(wg.index * r.shape[0], r.shape[0]))',
            "not awaited",
        ): READ_AT_ISSUE,
    },
    "fa3_three_stages": {
        ("attend", "yield qk", "removed"): K_BEHIND_V,
        ("attend", "s.K.release(j)", "earlier"): K_BEHIND_V,
        ("attend", "s.Q.release(tile.index)", "next item"): ONE_SLOT,
        ("attend", "s.Q.release(tile.index)", "item before"): ONE_SLOT,
        ("attend", "s.V.release(tile.last - 1)", "earlier"): O_COMES_BETWEEN,
    },
    "fa3_fp8": {
        ("producer", "yield s.K.empty(j)", "next item"): FREE_LATER,
        ("producer", "yield s.V.empty(j)", "removed"): READ_BY_THE_PRODUCER,
        ("transpose", "yield s.Vt.empty(j)", "next item"): FREE_LATER,
        ("transpose", "s.V.release(j)", "earlier"): TWO_SIGNALS,
        ("attend", "yield s.Vt.full(j - 1)", "next item"): "the tile after it is transposed later: it costs time",
        ("attend", "s.Q.release(tile.index)", "next item"): ONE_SLOT,
        ("attend", "s.Q.release(tile.index)", "item before"): ONE_SLOT,
        ("write_output", "s.O.release(tile.index)", "next item"): ONE_SLOT,
        ("write_output", "s.O.release(tile.index)", "item before"): ONE_SLOT,
    },
    "split_kv": {
        **{
            ("attend", "yield s.everybody.wait()", change): ONE_WARPGROUP
            for change in ("removed", "arrives only", "earlier")
        },
    },
}
"""By file of a built-in schedule: (function, statement, change)."""


PARTS = ("passes", "backward", "fp8", "three_stages", "triton", "backward_triton")
"""Attributes of a schedule that are classes with kernels of their own."""


def parts_of(schedule: type[Schedule]) -> tuple[type, ...]:
    """The classes whose files make up a schedule: its own, and those of its `PARTS` that are neighbors."""
    parts = [part for name in PARTS if isinstance(part := getattr(schedule, name, None), type)]
    others = [part for part in parts if part.__module__ != schedule.__module__]
    return (schedule, *[part for part in others if file_of(part).parent == file_of(schedule).parent])


def file_of(kind: type) -> Path:
    """The file in which a class is defined."""
    file = sys.modules[kind.__module__].__file__
    assert file is not None
    return Path(file)


def source_of(kind: type) -> str:
    """The text of the file in which a class is defined."""
    return importlib.util.decode_source(file_of(kind).read_bytes())


def reason_for(mutant: Mutant, class_name: str, source: str) -> str | None:
    """Why `mutant` of the class `class_name` in a file with the text `source` need not be noticed.

    None if nobody has said so. What is written here for a built-in schedule is said of a class of the same name too,
    while the function in which the statement stands is the built-in's, but for its comments.
    """
    if written := _comment(mutant, source):
        return written
    if mutant.change == "earlier" and mutant.of_a_turn:
        return TIME_ONLY
    if mutant.change == "earlier" and mutant.only_waits:
        return WAITS_TOO_EARLY
    for built_in in (part for name in BUILT_IN for part in parts_of(load_schedule(name))):
        reason = EQUIVALENT.get(built_in.__module__.rpartition(".")[2], {}).get(mutant.key)
        if reason is not None and built_in.__name__ == class_name:
            ours = _functions(source_of(built_in), mutant.function)
            around = [one for one in _functions(source, mutant.function) if one[0] <= mutant.line <= one[1]]
            if around and around[-1][2] in {text for _, _, text in ours}:
                return reason
    return None


def _comment(mutant: Mutant, source: str) -> str | None:
    """The reason that is written beside the statement, on one of its lines."""
    lines = range(mutant.line, mutant.line + mutant.statement.count("\n") + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.start[0] in lines and (found := WRITTEN.search(token.string)):
            return found[1].strip()
    return None


def _functions(source: str, name: str) -> list[tuple[int, int, str]]:
    """First line, last line and text without comments of the functions called `name`, outer ones first."""
    return [
        (node.lineno, node.end_lineno or node.lineno, ast.unparse(node))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
