"""Barriers with phases, the turn that is handed round, and operations that end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flashsim.engine import Barrier, Clock, Completion, Simulation, Steps, Timeline, Turn, Wait
from flashsim.errors import Hazard

Log = list[tuple[str, int]]


def until(sim: Simulation, wait: Wait) -> Steps:
    """How a process waits: ask, sleep until it may have changed, ask again; then take what is to be known."""
    while not wait.ready():
        event = sim.event()
        wait.subscribe(event)
        yield event
    wait.knowledge()


def story(sim: Simulation, *steps: int | Wait | Callable[[], object], log: Log, name: str) -> Steps:
    """Sleep until a tick, wait, or do something, one after the other; then write down when it was over."""
    for step in steps:
        if isinstance(step, int):
            yield sim.at(step)
        elif callable(step):
            step()
        else:
            yield from until(sim, step)
    log.append((name, sim.now))


# Barrier.


def test_a_phase_completes_with_the_last_arrival() -> None:
    barrier = Barrier(Simulation(), "K.full", count=3)
    assert [barrier.arrive() for _ in range(6)] == [False, False, True, False, False, True]
    assert (barrier.completed, barrier.pending) == (2, 0)


def test_waiters_go_on_at_the_tick_of_the_last_arrival() -> None:
    sim, log = Simulation(), list[tuple[str, int]]()
    barrier = Barrier(sim, "b", count=2)
    sim.start(story(sim, barrier.phase(0), log=log, name="early"))
    sim.start(story(sim, 12, barrier.phase(0), log=log, name="late"))
    sim.start(story(sim, 3, barrier.arrive, 8, barrier.arrive, log=log, name="arrivals"))
    sim.run()
    assert log == [("arrivals", 8), ("early", 8), ("late", 12)]


def test_the_phase_before_the_first_is_complete_from_the_start() -> None:
    """A producer's first wait for an empty slot passes, as in CUTLASS, where it waits with the opposite parity."""
    barrier = Barrier(Simulation(), "K.empty", count=1)
    assert barrier.phase(-1).ready()
    assert barrier.phase(-1).knowledge() is None
    assert not barrier.phase(0).ready()


def test_readiness_is_parity() -> None:
    """After n completed phases the waits for n - 1, n - 3, n + 1 pass and those for n, n - 2 do not."""
    barrier = Barrier(Simulation(), "b", count=1)
    table = []
    for _ in range(4):
        table.append([barrier.phase(phase).ready() for phase in (-1, 0, 1, 2)])
        barrier.arrive()
    odd, even = [False, True, False, True], [True, False, True, False]
    assert table == [even, odd, even, odd]


def test_a_lapped_barrier_lets_nobody_pass() -> None:
    """Two phases complete before the waiter looks: by its parity it is too early."""
    sim, log = Simulation(), list[tuple[str, int]]()
    barrier = Barrier(sim, "b", count=1)
    sim.start(story(sim, 1, barrier.arrive, barrier.arrive, log=log, name="fast"))
    sim.start(story(sim, 5, barrier.phase(0), log=log, name="slow"))
    sim.run()
    assert log == [("fast", 1)]


def test_passing_by_the_parity_of_another_phase_is_a_hazard() -> None:
    """Three phases complete: the parity is right again, and what the waiter would come to know is not."""
    barrier = Barrier(Simulation(), "b", count=1)
    for _ in range(3):
        barrier.arrive()
    assert barrier.phase(0).ready()
    with pytest.raises(Hazard, match="b: a wait for phase 0 passes when 3 phases are complete"):
        barrier.phase(0).knowledge()


def test_a_waiter_that_was_woken_too_late_waits_again() -> None:
    """The phase completes and the next one too, at one tick, before the waiter has run."""
    sim, log = Simulation(), list[tuple[str, int]]()
    barrier = Barrier(sim, "b", count=1)
    sim.start(story(sim, barrier.phase(0), log=log, name="waiter"))
    sim.start(story(sim, 4, barrier.arrive, barrier.arrive, log=log, name="fast"))
    sim.run()
    assert log == [("fast", 4)]


def test_one_arrival_too_many_counts_for_the_next_phase() -> None:
    barrier = Barrier(Simulation(), "V[1].empty", count=2)
    for _ in range(3):
        barrier.arrive()
    assert (barrier.completed, barrier.pending) == (1, 1)
    assert barrier.leftover(1) == "V[1].empty: 1 of 2 arrivals in an unfinished phase at the end"
    barrier.arrive()
    assert barrier.leftover(1) == "V[1].empty: 2 phases completed at the end, 1 expected"
    assert barrier.leftover(2) is None


def test_who_waited_knows_what_the_arrivals_of_that_phase_knew() -> None:
    a, b = Timeline("a"), Timeline("b")
    barrier = Barrier(Simulation(), "b", count=2)
    barrier.arrive({a: 3})
    barrier.arrive({a: 1, b: 2})
    assert barrier.phase(0).knowledge() == {a: 3, b: 2}
    barrier.arrive({b: 7})
    assert barrier.phase(0).knowledge() == {a: 3, b: 2}
    barrier.arrive({b: 8})
    assert barrier.phase(1).knowledge() == {b: 8}


def test_an_arrival_does_not_hand_out_what_its_sender_learns_later() -> None:
    a = Timeline("a")
    clock: Clock = {a: 1}
    barrier = Barrier(Simulation(), "b", count=1)
    barrier.arrive(clock)
    clock[a] = 9
    assert barrier.phase(0).knowledge() == {a: 1}


def test_a_wait_says_how_far_the_barrier_is() -> None:
    barrier = Barrier(Simulation(), "K[1].full", count=2)
    barrier.arrive()
    assert barrier.phase(4).describe() == "phase 4 of K[1].full (0 completed, 1 of 2 arrived)"


def test_a_wait_carries_the_cost_of_passing() -> None:
    barrier = Barrier(Simulation(), "b", count=1)
    assert (barrier.phase(0).delay, barrier.phase(0, 77).delay) == (0, 77)


# Turn.


def test_the_turn_goes_round() -> None:
    """Both ask at tick 0; party 1 waits until 0 passes at 5, party 0 comes again and waits until 1 passes at 9."""
    sim, log = Simulation(), list[tuple[str, int]]()
    turn = Turn(sim, "turn", parties=2)

    def pass_on(party: int) -> Callable[[], object]:
        return lambda: turn.pass_on(party)

    sim.start(story(sim, turn.wait(1), 9, pass_on(1), log=log, name="1"))
    sim.start(story(sim, turn.wait(0), 5, pass_on(0), turn.wait(0), log=log, name="0 again"))
    sim.run()
    assert log == [("1", 9), ("0 again", 9)]
    assert turn.leftover() == "turn: party 0 still has the turn at the end"


def test_a_turn_of_one_party_comes_back_at_once() -> None:
    turn = Turn(Simulation(), "turn", parties=1)
    for _ in range(3):
        assert turn.wait(0).ready()
        turn.wait(0).knowledge()
        assert not turn.wait(0).ready()
        turn.pass_on(0)
    assert turn.leftover() is None


def test_a_turn_that_was_not_waited_for_cannot_be_passed() -> None:
    turn = Turn(Simulation(), "turn", parties=2)
    message = "turn: party 0 passes a turn that it has not waited for, in cycle 0"
    with pytest.raises(Hazard, match=message):
        turn.pass_on(0)


def test_nobody_passes_another_ones_turn_or_passes_twice() -> None:
    turn = Turn(Simulation(), "turn", parties=2)
    turn.wait(0).knowledge()
    with pytest.raises(Hazard, match="party 1 passes"):
        turn.pass_on(1)
    turn.pass_on(0)
    with pytest.raises(Hazard, match="party 0 passes"):
        turn.pass_on(0)


def test_with_the_turn_goes_what_everyone_before_knew() -> None:
    a, b = Timeline("a"), Timeline("b")
    turn = Turn(Simulation(), "turn", parties=2)
    turn.wait(0).knowledge()
    turn.pass_on(0, {a: 2})
    assert turn.wait(1).knowledge() == {a: 2}
    turn.pass_on(1, {a: 1, b: 5})
    assert turn.wait(0).knowledge() == {a: 2, b: 5}


def test_a_wait_for_a_turn_says_who_has_it() -> None:
    turn = Turn(Simulation(), "turn", parties=2)
    assert turn.wait(1).describe() == "the turn of party 1 at turn (it is with party 0, who has not come for it)"
    turn.wait(0).knowledge()
    assert turn.wait(1).describe() == "the turn of party 1 at turn (it is with party 0, who has taken it)"


# Completion.


def test_everybody_who_waits_for_an_operation_goes_on_when_it_ends() -> None:
    sim, log = Simulation(), list[tuple[str, int]]()
    load = Completion(sim, "load(K)")
    sim.start(story(sim, load, log=log, name="waiter"))
    sim.start(story(sim, 2, load, log=log, name="second"))
    sim.start(story(sim, 6, load.done, log=log, name="end"))
    sim.start(story(sim, 8, load, log=log, name="late"))
    sim.run()
    assert log == [("end", 6), ("waiter", 6), ("second", 6), ("late", 8)]


def test_who_waits_for_an_operation_knows_what_it_knew() -> None:
    a = Timeline("a")
    load = Completion(Simulation(), "load(K)", {a: 4})
    assert load.knowledge() == {a: 4}
    assert load.describe() == "the end of load(K)"
