"""Time and order of events."""

from __future__ import annotations

import pytest

from flashsim.engine import Simulation, Steps
from flashsim.errors import Race, SimulationError

Log = list[tuple[str, int]]


def sleeper(sim: Simulation, log: Log, name: str, *times: int) -> Steps:
    for time in times:
        yield sim.at(time)
        log.append((name, sim.now))


def test_events_at_one_tick_run_in_the_order_in_which_they_were_scheduled() -> None:
    """b is started last but scheduled its wake-up for tick 5 before a did, which slept until 3 first."""
    sim, log = Simulation(), list[tuple[str, int]]()
    sim.start(sleeper(sim, log, "a", 3, 5))
    sim.start(sleeper(sim, log, "b", 5))
    sim.start(sleeper(sim, log, "c", 5))
    sim.run()
    assert log == [("a", 3), ("b", 5), ("c", 5), ("a", 5)]


def test_a_fired_event_wakes_its_waiter_after_what_is_already_due_at_that_tick() -> None:
    sim, log = Simulation(), list[tuple[str, int]]()
    event = sim.event()

    def waiter() -> Steps:
        yield event
        log.append(("woken", sim.now))

    def firer() -> Steps:
        yield sim.at(4)
        sim.fire(event)
        log.append(("fired", sim.now))

    sim.start(waiter())
    sim.start(firer())
    sim.start(sleeper(sim, log, "due", 4))
    sim.run()
    assert log == [("fired", 4), ("due", 4), ("woken", 4)]


def test_all_waiters_of_an_event_wake_in_the_order_in_which_they_came() -> None:
    sim, log = Simulation(), list[tuple[str, int]]()
    event = sim.event()

    def waiter(name: str, begin: int) -> Steps:
        yield sim.at(begin)
        yield event
        log.append((name, sim.now))

    for name, begin in (("late", 2), ("early", 1)):
        sim.start(waiter(name, begin))

    def firer() -> Steps:
        yield sim.at(9)
        sim.fire(event)

    sim.start(firer())
    sim.run()
    assert log == [("early", 9), ("late", 9)]


def test_a_time_that_has_passed_means_now() -> None:
    sim, log = Simulation(), list[tuple[str, int]]()
    sim.start(sleeper(sim, log, "a", 7, 3, 7, 8))
    sim.run()
    assert log == [("a", 7), ("a", 7), ("a", 7), ("a", 8)]


def test_a_process_started_inside_another_one_runs_at_that_tick_and_afterwards() -> None:
    sim, log = Simulation(), list[tuple[str, int]]()

    def child() -> Steps:
        log.append(("child", sim.now))
        yield sim.at(sim.now + 1)
        log.append(("child", sim.now))

    def parent() -> Steps:
        yield sim.at(2)
        sim.start(child())
        log.append(("parent", sim.now))
        yield sim.at(3)
        log.append(("parent", sim.now))

    sim.start(parent())
    sim.run()
    assert log == [("parent", 2), ("child", 2), ("parent", 3), ("child", 3)]


def test_an_action_is_done_at_its_time_in_the_order_of_scheduling() -> None:
    """And costs one event, where a process costs two."""
    sim, log = Simulation(), list[tuple[str, int]]()
    sim.call(5, lambda: log.append(("second", sim.now)))
    sim.call(2, lambda: sim.call(5, lambda: log.append(("third", sim.now))))
    sim.call(2, lambda: log.append(("first", sim.now)))
    sim.run()
    assert log == [("first", 2), ("second", 5), ("third", 5)]
    assert sim.events == 4


def test_every_scheduled_event_is_counted() -> None:
    """Two starts, three wake-ups, one fired event; an event that nobody fires costs nothing."""
    sim, log = Simulation(), list[tuple[str, int]]()
    sim.start(sleeper(sim, log, "a", 1, 2))
    sim.start(sleeper(sim, log, "b", 1))
    sim.event()
    sim.fire(sim.event())
    sim.run()
    assert sim.events == 6


def test_two_simulations_are_independent_and_alike() -> None:
    def play() -> tuple[Log, int]:
        sim, log = Simulation(), list[tuple[str, int]]()
        for name in "xyz":
            sim.start(sleeper(sim, log, name, 1, 1, 2))
        sim.run()
        return log, sim.events

    assert play() == play()
    assert Simulation().now == 0


def test_a_run_ends_when_only_waiting_is_left() -> None:
    """Whether that is a deadlock is for the caller to say."""
    sim, log = Simulation(), list[tuple[str, int]]()

    def waits_for_ever() -> Steps:
        yield sim.event()
        log.append(("woken", sim.now))

    sim.start(waits_for_ever())
    sim.start(sleeper(sim, log, "a", 6))
    sim.run()
    assert log == [("a", 6)]
    assert sim.now == 6


def test_a_run_without_end_is_given_up() -> None:
    sim = Simulation()

    def for_ever() -> Steps:
        while True:
            yield sim.at(sim.now + 10)

    sim.start(for_ever())
    with pytest.raises(SimulationError, match="gave up after 100 events, in cycle 4"):
        sim.run(max_events=100)


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    sim, log = Simulation(), list[tuple[str, int]]()
    sim.start(sleeper(sim, log, "a", 1, 2, 3))
    sim.run(max_events=4)
    assert log == [("a", 1), ("a", 2), ("a", 3)]


def test_what_a_process_raises_arrives_at_the_caller_as_what_it_is() -> None:
    sim = Simulation()

    def fails() -> Steps:
        yield sim.at(1)
        raise Race("two accesses")

    sim.start(fails())
    with pytest.raises(Race, match="two accesses"):
        sim.run()
