"""Partitions of a kernel as threads of which one runs at a time, and who runs next.

At every point where a partition could meet another, one of those that can go on is drawn by a seeded generator: the
same seed gives the same interleaving.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable

from flashsim.engine import Clock, Timeline, join
from flashsim.errors import Deadlock, EndlessRun, FlashsimError, SimulationError, line_of

MARK = "__gluon_cpu__"
"""A name among the globals of everything that is kernel source."""
MAX_STEPS = 5_000_000
CHANCE = 0.25
"""With `completion="random"`, the probability that an asynchronous operation ends before the next step."""


class Stopped(BaseException):
    """Ends the threads of a run that has failed."""


def source_line() -> str:
    """file:line of the statement of kernel source that runs now; "" where none does."""
    frame = sys._getframe(1)
    while frame is not None:
        if MARK in frame.f_globals:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class Party:
    """One partition of one CTA, or a CTA before it is partitioned."""

    def __init__(self, scheduler: Scheduler, name: str, body: Callable[[], None], clock: Clock | None = None) -> None:
        self.scheduler = scheduler
        self.name = name
        self.timeline = Timeline(name)
        self.timeline.clock.update(clock or {})
        self.fences = Timeline(f"fences of {name}")
        self.ready: Callable[[], bool] | None = None
        """What it waits for; None if it can go on."""
        self.waits_for: Callable[[], str] = str
        self.finished = False
        self._body = body
        self._baton = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = False

    @property
    def clock(self) -> Clock:
        return self.timeline.clock

    def learn(self, clock: Clock) -> None:
        join(self.timeline.clock, clock)

    def tell(self) -> Clock:
        """What a signal that this party gives now says to whom it reaches."""
        self.timeline.step()
        return dict(self.timeline.clock)

    def fence(self) -> None:
        """What this party has stored before, asynchronous operations that know of the fence may touch."""
        self.clock[self.fences] = self.fences.step()

    def can_go(self) -> bool:
        return not self.finished and (self.ready is None or self.ready())

    def resume(self) -> None:
        """Give this party the baton."""
        if self._started:
            self._baton.release()
        else:
            self._started = True
            self._thread.start()

    def stand_by(self) -> None:
        """Wait for the baton."""
        self._baton.acquire()
        if self.scheduler.failure is not None:
            raise Stopped

    def _run(self) -> None:
        scheduler = self.scheduler
        scheduler.current = self
        try:
            if scheduler.failure is None:
                self._body()
        except Stopped:
            pass
        except BaseException as error:
            scheduler.failure = scheduler.failure or told(error, self.name)
        self.finished = True
        scheduler.hand_on()

    def stop(self) -> None:
        """End the thread of a run that has failed."""
        if self._started and not self.finished:
            self._baton.release()
        if self._started:
            self._thread.join()


def told(error: BaseException, who: str) -> BaseException:
    """What an error comes to that is not one of flashsim's."""
    if isinstance(error, FlashsimError) or not isinstance(error, Exception):
        return error
    result = SimulationError(f"{_kernel_line(error)}: {who}: {type(error).__name__}: {error}")
    result.__cause__ = error
    return result


def _kernel_line(error: BaseException) -> str:
    """file:line of the innermost statement of kernel source that `error` came through."""
    trace, found = error.__traceback__, line_of(error) or "?"
    while trace is not None:
        if MARK in trace.tb_frame.f_globals:
            found = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


class Scheduler:
    """Draws who goes next. `late`: asynchronous operations end only when nobody can go on without, or has to wait."""

    def __init__(self, seed: int, late: bool) -> None:
        self.random = random.Random(seed)
        self.late = late
        self.parties: list[Party] = []
        self.events: list[Callable[[], None]] = []
        """Ends of asynchronous operations, each of which may come at any time from now on."""
        self.failure: BaseException | None = None
        self.current: Party | None = None
        self.steps = 0
        self.between: Callable[[], bool] = bool
        """Called when a party has finished, and may add others; False if there is nothing left to run."""
        self._done = threading.Semaphore(0)

    def me(self) -> Party:
        assert self.current is not None
        return self.current

    def add(self, party: Party) -> None:
        self.parties.append(party)

    def run(self) -> None:
        """Until every party has finished. Raises what went wrong in one of them."""
        self.hand_on()
        self._done.acquire()
        for party in self.parties:
            party.stop()
        if self.failure is not None:
            raise self.failure

    def pause(self) -> None:
        """Another party may go first."""
        me = self.me()
        chosen = self._choose()
        if chosen is not me:
            self._give(chosen)
            me.stand_by()
            self.current = me

    def wait(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Go on when `ready` says so; `what` describes it, for the message of a deadlock."""
        me, line = self.me(), source_line()
        me.ready, me.waits_for = ready, lambda: f"{me.name} waits for {what()}, at {line}"
        self.pause()
        me.ready = None

    def hand_on(self) -> None:
        """The current party has finished, or none has begun."""
        more = False
        if self.failure is None:
            try:
                more = self.between()
            except BaseException as error:  # else nobody would go on
                self.failure = told(error, "the launch")
        self._give(self._choose() if more else None)

    def _give(self, chosen: Party | None) -> None:
        if self.failure is not None or chosen is None:
            self._done.release()
        else:
            chosen.resume()

    def _choose(self) -> Party | None:
        """The party that goes next; None after a failure."""
        self.parties = [party for party in self.parties if not party.finished or party is self.current]
        try:
            while True:
                self.steps += 1
                if self.steps > MAX_STEPS:
                    raise EndlessRun(f"{source_line()}: more than {MAX_STEPS} steps: something goes round for ever")
                able = [party for party in self.parties if party.can_go()]
                if self.events and (not able or (not self.late and self.random.random() < CHANCE)):
                    self.events.pop(self.random.randrange(len(self.events)))()
                elif able:
                    return able[self.random.randrange(len(able))] if len(able) > 1 else able[0]
                else:
                    waiting = "; ".join(party.waits_for() for party in self.parties if not party.finished)
                    raise Deadlock(f"nobody can go on: {waiting}")
        except BaseException as error:
            self.failure = self.failure or told(error, "an asynchronous operation")
            return None
