"""Mutants that are right, and why: they change nothing but time, or nothing at all."""

from __future__ import annotations

from flashsim.check.mutants import Mutant

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
LOADS_SWAPPED = "the loads of P and V are issued in the other order, and both are awaited before the product"
PRODUCT_BEFORE_TURN = "the product waits for all of its operands, but not for its turn: " + TIME_ONLY
REGISTERS_ONLY = "the store before it reads registers, which no other warpgroup can touch"
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
    "fa2": {
        ("program", "yield wg.gemm(s.Q.rows(*my_rows), s.K.T, into=r.S)", "not awaited"): SCOREBOARD,
        ("program", "yield wg.gemm(s.Q.rows(*my_rows), s.K.T, into=r.S)", "earlier"): LOAD_AFTER,
        ("program", "yield wg.gemm(r.P, s.V, into=r.O, accumulate=True)", "not awaited"): SCOREBOARD,
    },
    "standard": {
        ("output", "yield wg.load(tile.V(j), into=s.right)", "earlier"): LOADS_SWAPPED,
    },
}
"""By built-in schedule: (function, statement, change)."""


def reason_for(schedule: str, mutant: Mutant) -> str | None:
    """Why `mutant` of `schedule` need not be noticed; None if nobody has said so."""
    if mutant.change == "earlier" and mutant.of_a_turn:
        return TIME_ONLY
    if mutant.change == "earlier" and mutant.only_waits:
        return WAITS_TOO_EARLY
    return EQUIVALENT.get(schedule, {}).get(mutant.key)
