"""Discrete events in integer time, by simpy, which nothing outside of this package imports."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import Any

import simpy

from flashsim.errors import EndlessRun
from flashsim.units import cycle_of
from flashsim.watchdog import PATIENCE_S, Stuck, Watchdog

Event = simpy.Event
Steps = Generator[Event, Any, None]
"""A simulated process: a generator that yields the events it waits for."""


class Simulation:
    """One independent run: a clock in ticks and a queue of events.

    Events at the same tick are processed in the order in which they were scheduled, so that equal inputs give equal
    results in every process. `events` counts what was scheduled: it is the cost of an answer, and tests assert it.
    """

    def __init__(self) -> None:
        self._env = simpy.Environment()
        self.events = 0
        self._max_events = sys.maxsize

    @property
    def now(self) -> int:
        """Ticks since the start."""
        return self._env._now  # type: ignore[return-value]

    def at(self, time: int) -> Event:
        """An event that fires at `time`, or now if that has passed."""
        self.events += 1
        if self.events > self._max_events:
            raise EndlessRun(f"gave up after {self._max_events} events, in {cycle_of(self.now)}")
        delay = time - self._env._now
        return simpy.Timeout(self._env, delay if delay > 0 else 0)

    def call(self, time: int, action: Callable[[], None]) -> None:
        """Do `action` at `time`."""
        self.at(time).callbacks.append(lambda _: action())

    def event(self) -> Event:
        """An event that fires when `fire` is called on it."""
        return simpy.Event(self._env)

    def fire(self, event: Event) -> None:
        """Wake whoever waits for `event`, at this tick and after what is already due at it."""
        self.events += 1
        event.succeed()

    def start(self, steps: Steps) -> None:
        """Run `steps` as a process from now on."""
        self.events += 1
        simpy.Process(self._env, steps)

    def run(self, max_events: int | None = None, watched: bool = True) -> None:
        """Process events until none is left.

        Raises EndlessRun when more than `max_events` were scheduled, or one step computes for more than 10 seconds;
        whoever has a watchdog already says that this run needs none of its own (`watched`).
        """
        self._max_events = max_events or sys.maxsize
        try:
            with Watchdog(lambda: self.events) if watched else nullcontext():
                self._env.run()
        except Exception as error:
            # simpy raises a copy of what a process raised, with the original as its cause.
            original = error.__cause__ if type(error.__cause__) is type(error) else error
            raise original from original.__cause__
        except Stuck:
            now = cycle_of(self.now)
            raise EndlessRun(f"computes for {PATIENCE_S:.0f} s without an event, in {now}") from None
