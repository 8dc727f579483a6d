"""A counter by which parties go one after the other: who waits for how many, and what they know then."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flashsim.engine import Clock, Semaphore, SemaphoreWait, Simulation, Steps, Timeline

Log = list[tuple[str, int]]


def party(sim: Simulation, name: str, log: Log, wait: SemaphoreWait, work: int, end: Callable[[], None]) -> Steps:
    """Wait for one's turn, note when it has come, work for some ticks, and let the next one go on."""
    while not wait.ready():
        event = sim.event()
        wait.subscribe(event)
        yield event
    log.append((name, sim.now))
    yield sim.at(sim.now + work)
    end()


def test_whoever_waits_for_nobody_goes_at_once() -> None:
    semaphore = Semaphore(Simulation(), "dQ", each=2)
    assert semaphore.after(0).ready()
    assert not semaphore.after(1).ready()


@pytest.mark.parametrize("each", [1, 2, 3])
def test_a_party_has_come_when_it_has_arrived_as_often_as_each_does(each: int) -> None:
    semaphore = Semaphore(Simulation(), "dQ", each)
    ready = []
    for _ in range(3 * each):
        semaphore.arrive()
        ready.append(sum(semaphore.after(parties).ready() for parties in (1, 2, 3)))
    assert ready == [(n + 1) // each for n in range(3 * each)]


def test_parties_go_in_their_order_whatever_the_order_in_which_they_ask() -> None:
    """Each works for 10 ticks; the last one asks first."""
    sim, log = Simulation(), list[tuple[str, int]]()
    semaphore = Semaphore(sim, "dQ", each=1)
    for place in (2, 1, 0):
        sim.start(party(sim, str(place), log, semaphore.after(place), 10, semaphore.arrive))
    sim.run()
    assert log == [("0", 0), ("1", 10), ("2", 20)]


def test_one_arrival_of_two_wakes_nobody_for_good() -> None:
    """The waiter is woken by each arrival, and sleeps again until there are enough."""
    sim, log = Simulation(), list[tuple[str, int]]()
    semaphore = Semaphore(sim, "dQ", each=2)
    sim.start(party(sim, "waits", log, semaphore.after(1), 0, lambda: None))
    sim.call(5, semaphore.arrive)
    sim.call(9, semaphore.arrive)
    sim.run()
    assert log == [("waits", 9)]


def test_all_who_wait_for_the_same_go_together() -> None:
    sim, log = Simulation(), list[tuple[str, int]]()
    semaphore = Semaphore(sim, "dQ", each=1)
    for name in "ab":
        sim.start(party(sim, name, log, semaphore.after(1), 0, lambda: None))
    sim.call(7, semaphore.arrive)
    sim.run()
    assert log == [("a", 7), ("b", 7)]


def test_whoever_goes_on_knows_all_that_those_before_knew() -> None:
    semaphore = Semaphore(Simulation(), "dQ", each=1)
    a, b = Timeline("a"), Timeline("b")
    semaphore.arrive({a: 3, b: 1})
    semaphore.arrive({a: 2, b: 4})
    semaphore.arrive(None)
    assert semaphore.after(2).knowledge() == {a: 3, b: 4}


def test_what_is_handed_over_stays_the_giver_s_own() -> None:
    """An arrival's clock is read, not kept: what its owner learns later was not said."""
    semaphore, a, b = Semaphore(Simulation(), "dQ", each=1), Timeline("a"), Timeline("b")
    clock: Clock = {a: 1}
    semaphore.arrive(clock)
    clock[a] = 5
    semaphore.arrive({b: 1})
    assert semaphore.after(1).knowledge() == {a: 1, b: 1}
    assert clock == {a: 5}


def test_a_wait_says_what_it_is_for_and_how_long_its_answer_takes() -> None:
    semaphore = Semaphore(Simulation(), "dQ of batch 0, head 3", each=2)
    semaphore.arrive()
    wait = semaphore.after(4, delay=11)
    assert wait.describe() == "4 parties at dQ of batch 0, head 3 (1 of 8 arrivals)"
    assert wait.delay == 11
