"""A unit that serves in order of arrival."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flashsim.engine import Server, Simulation, Steps


def test_requests_are_served_one_after_the_other_in_the_order_of_arrival() -> None:
    """Two requests at tick 0, one at 3 which queues behind both, one at 20 which finds the unit idle."""
    sim = Simulation()
    unit = Server(sim, "tensor")
    log = []

    def ask(name: str, at: int, duration: int) -> Steps:
        yield sim.at(at)
        end = unit.serve(duration)
        yield sim.at(end)
        log.append((name, sim.now))

    for name, at, duration in (("third", 3, 1), ("first", 0, 10), ("second", 0, 4), ("fourth", 20, 2)):
        sim.start(ask(name, at, duration))
    sim.run()
    assert log == [("first", 10), ("second", 14), ("third", 15), ("fourth", 22)]
    assert (unit.free, unit.busy) == (22, 17)


def test_an_operation_of_no_duration_waits_its_turn_and_takes_none() -> None:
    unit = Server(Simulation(), "exp")
    assert [unit.serve(0), unit.serve(5), unit.serve(0)] == [0, 5, 5]
    assert unit.busy == 5


def test_a_request_that_will_arrive_later_holds_the_unit_from_then_on() -> None:
    """And whoever is accepted after it stands behind it: the assumption that `serve_from` states."""
    unit = Server(Simulation(), "l2")
    assert unit.serve(10) == 10
    assert unit.serve_from(30, 5) == 35
    assert unit.serve(1) == 36
    assert unit.serve_from(2, 1) == 37
    assert unit.busy == 17


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=20))
def test_ends_are_those_of_a_queue(requests: list[tuple[int, int]]) -> None:
    """Against a queue that is walked tick by tick: the unit works on the oldest request that has come."""
    requests.sort(key=lambda request: request[0])
    unit = Server(Simulation(), "unit")
    ends = [unit.serve_from(arrival, duration) for arrival, duration in requests]

    expected, now = [], 0
    for arrival, duration in requests:
        while now < arrival:
            now += 1
        now += duration
        expected.append(now)
    assert ends == expected
    assert unit.busy == sum(duration for _, duration in requests)
