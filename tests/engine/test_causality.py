"""Happens-before: what is a race, whatever the times were."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsim.engine import Access, Barrier, Clock, Memory, Simulation, Timeline, join
from flashsim.errors import Race

WHOLE = (0, 64)


@dataclass
class Party:
    """A timeline that reads and writes, with what it knows."""

    name: str
    timeline: Timeline = field(init=False)

    def __post_init__(self) -> None:
        self.timeline = Timeline(self.name)

    @property
    def knows(self) -> Clock:
        return dict(self.timeline.clock)

    def read(self, memory: Memory, rows: tuple[int, int] = WHOLE) -> None:
        memory.read(self._access("read", rows), self.timeline.clock)

    def write(self, memory: Memory, rows: tuple[int, int] = WHOLE) -> None:
        memory.write(self._access("write", rows), self.timeline.clock)

    def add(self, memory: Memory, rows: tuple[int, int] = WHOLE) -> None:
        memory.add(self._access("add", rows), self.timeline.clock)

    def hears(self, clock: Clock) -> None:
        join(self.timeline.clock, clock)

    def _access(self, what: str, rows: tuple[int, int]) -> Access:
        return Access(self.timeline, self.timeline.step(), (rows,), what, 0)


def parties() -> tuple[Party, Party, Party]:
    return Party("a"), Party("b"), Party("c")


# Clocks.


def test_join_takes_the_later_of_each() -> None:
    a, b, c = (Timeline(name) for name in "abc")
    clock: Clock = {a: 3, b: 1}
    join(clock, {a: 2, b: 5, c: 1})
    assert clock == {a: 3, b: 5, c: 1}


def test_a_timeline_knows_its_own_operations() -> None:
    a = Timeline("a")
    assert [a.step(), a.step()] == [1, 2]
    assert a.clock == {a: 2}


def test_two_timelines_of_one_name_are_two() -> None:
    a, b = Timeline("consumer 0"), Timeline("consumer 0")
    a.step()
    assert not Access(b, 1, (WHOLE,), "read", 0).before(a.clock)


# Races.


def test_two_writes_that_nothing_orders_are_a_race_and_both_are_named() -> None:
    a, b, _ = parties()
    memory = Memory("V[1]")
    memory.write(Access(a.timeline, a.timeline.step(), (WHOLE,), "load(V)", 120), a.knows)
    later = Access(b.timeline, b.timeline.step(), (WHOLE,), "store(O)", 450)
    with pytest.raises(Race) as race:
        memory.write(later, b.knows)
    assert str(race.value) == (
        "race on V[1]: nothing orders load(V) by a, issued in cycle 0 before store(O) by b, issued in cycle 2"
    )


@pytest.mark.parametrize(("first", "second"), [("write", "read"), ("read", "write"), ("write", "write")])
def test_unordered_accesses_of_which_one_writes_are_a_race(first: str, second: str) -> None:
    a, b, _ = parties()
    memory = Memory("K")
    getattr(a, first)(memory)
    with pytest.raises(Race):
        getattr(b, second)(memory)


@pytest.mark.parametrize(("first", "second"), [("write", "read"), ("read", "write"), ("write", "write")])
def test_a_signal_orders_them(first: str, second: str) -> None:
    a, b, _ = parties()
    memory = Memory("K")
    getattr(a, first)(memory)
    b.hears(a.knows)
    getattr(b, second)(memory)


def test_reads_do_not_race_with_reads() -> None:
    a, b, c = parties()
    memory = Memory("Q")
    for party in (a, b, c, a):
        party.read(memory)


def test_a_party_is_ordered_with_itself() -> None:
    a, _, _ = parties()
    memory = Memory("S")
    for _ in range(3):
        a.write(memory)
        a.read(memory)


def test_a_signal_that_was_sent_before_the_access_orders_nothing() -> None:
    a, b, _ = parties()
    memory = Memory("K")
    early = a.knows
    a.write(memory)
    b.hears(early)
    with pytest.raises(Race):
        b.read(memory)


def test_order_is_handed_on() -> None:
    """a tells b, b tells c: c may write what a has read."""
    a, b, c = parties()
    memory = Memory("K")
    a.read(memory)
    b.hears(a.knows)
    c.hears(b.knows)
    c.write(memory)


def test_hearing_from_one_reader_is_not_hearing_from_both() -> None:
    a, b, c = parties()
    memory = Memory("K")
    a.read(memory)
    b.read(memory)
    c.hears(b.knows)
    with pytest.raises(Race, match="nothing orders read by a"):
        c.write(memory)


def test_an_older_read_of_the_same_party_is_covered_by_its_newer_one_only_if_ordered() -> None:
    """Memory keeps the newest read of each party; knowing the first of two reads is not enough to write."""
    a, b, _ = parties()
    memory = Memory("K")
    a.read(memory)
    b.hears(a.knows)
    a.read(memory)
    with pytest.raises(Race):
        b.write(memory)


def test_a_write_that_was_ordered_stands_for_all_before_it() -> None:
    """c knows only of b's write, which came after a's read."""
    a, b, c = parties()
    memory = Memory("K")
    a.read(memory)
    b.hears(a.knows)
    b.write(memory)
    c.hears(b.knows)
    c.write(memory)


# Rows.


def test_rows_that_do_not_meet_do_not_race() -> None:
    a, b, _ = parties()
    memory = Memory("Q")
    a.write(memory, (0, 64))
    b.write(memory, (64, 128))


def test_rows_that_overlap_by_one_race() -> None:
    a, b, _ = parties()
    memory = Memory("Q")
    a.write(memory, (0, 65))
    with pytest.raises(Race):
        b.read(memory, (64, 128))


@pytest.mark.parametrize("first", ["write", "read"])
def test_a_write_of_some_rows_does_not_hide_what_was_done_to_others(first: str) -> None:
    """a touches rows 0 to 127, then b, who knows, writes 64 to 191: c must know of a for row 0, of b for row 64."""
    a, b, c = parties()
    memory = Memory("Q")
    getattr(a, first)(memory, (0, 128))
    told = a.knows
    b.hears(told)
    b.write(memory, (64, 192))
    with pytest.raises(Race, match=f"nothing orders {first} by a"):
        c.write(memory, (0, 32))
    c.hears(told)
    c.write(memory, (0, 32))
    with pytest.raises(Race, match="nothing orders write by b"):
        c.read(memory, (0, 65))


def test_reads_of_different_rows_by_one_party_are_all_kept() -> None:
    a, b, _ = parties()
    memory = Memory("Q")
    a.read(memory, (0, 64))
    a.read(memory, (64, 128))
    with pytest.raises(Race):
        b.write(memory, (0, 64))
    with pytest.raises(Race):
        b.write(memory, (64, 128))


def test_a_covering_write_takes_the_place_of_what_it_covers() -> None:
    """So that the record does not grow with the number of KV tiles."""
    a, b, _ = parties()
    memory = Memory("K")
    for _ in range(50):
        a.write(memory, (0, 32))
        a.write(memory, (32, 64))
        b.hears(a.knows)
        b.read(memory)
        a.hears(b.knows)
    assert (len(memory.writes), len(memory.reads)) == (2, 1)


def test_parts_that_differ_along_one_axis_do_not_race() -> None:
    a, b, _ = (party.timeline for party in parties())
    memory = Memory("S")
    left, right, both = ((0, 64), (0, 32)), ((0, 64), (32, 64)), ((63, 65), (31, 33))
    memory.write(Access(a, a.step(), left, "write", 0), a.clock)
    memory.write(Access(b, b.step(), right, "write", 0), b.clock)
    with pytest.raises(Race):
        memory.read(Access(b, b.step(), both, "read", 0), b.clock)


# Atomic additions.


def test_additions_do_not_race_with_each_other_but_their_order_matters() -> None:
    a, b, c = parties()
    memory = Memory("dQ")
    a.add(memory)
    b.hears(a.knows)
    b.add(memory)
    assert not memory.order_matters
    c.add(memory, (63, 65))
    assert memory.order_matters


def test_additions_to_different_rows_have_no_order() -> None:
    a, b, _ = parties()
    memory = Memory("dQ")
    a.add(memory, (0, 64))
    b.add(memory, (64, 128))
    assert not memory.order_matters


@pytest.mark.parametrize("other", ["read", "write"])
def test_an_addition_races_with_whatever_is_no_addition(other: str) -> None:
    for first, second in (("add", other), (other, "add")):
        a, b, _ = parties()
        memory = Memory("dQ")
        getattr(a, first)(memory)
        with pytest.raises(Race):
            getattr(b, second)(memory)
        b.hears(a.knows)
        getattr(b, second)(memory)


def test_an_addition_that_was_ordered_after_others_does_not_hide_them() -> None:
    """b adds after a, and c knows of b before it added: what c has not heard of is both."""
    a, b, c = parties()
    memory = Memory("dQ")
    a.add(memory)
    c.hears(b.knows)
    b.add(memory)
    with pytest.raises(Race, match="nothing orders add by a"):
        c.read(memory)
    c.hears(a.knows)
    with pytest.raises(Race, match="nothing orders add by b"):
        c.read(memory)


# Aliases.


def overlaid() -> tuple[Memory, Memory]:
    v, o = Memory("V"), Memory("O")
    v.aliases.append(o)
    o.aliases.append(v)
    return v, o


@pytest.mark.parametrize(("first", "second"), [("write", "read"), ("read", "write"), ("write", "write")])
def test_memories_at_the_same_addresses_race_with_each_other(first: str, second: str) -> None:
    a, b, _ = parties()
    v, o = overlaid()
    getattr(a, first)(v)
    with pytest.raises(Race, match="race on O"):
        getattr(b, second)(o)
    b.hears(a.knows)
    getattr(b, second)(o)


@pytest.mark.parametrize(("first", "second"), [("write", "read"), ("read", "write"), ("write", "write")])
def test_rows_of_one_say_nothing_about_rows_of_the_other(first: str, second: str) -> None:
    """Tiles that lie over each other may have other shapes: row 0 of one can be anywhere in the other."""
    a, b, _ = parties()
    v, o = overlaid()
    getattr(a, first)(v, (0, 1))
    with pytest.raises(Race):
        getattr(b, second)(o, (63, 64))


def test_reads_of_overlaid_memories_do_not_race() -> None:
    a, b, _ = parties()
    v, o = overlaid()
    a.read(v)
    b.read(o)


# Random programs against reachability in a graph.

PARTIES, BARRIERS, MEMORIES = 4, 2, 3
WHATS = ("read", "write", "arrive", "arrive", "wait", "wait", "post read", "post write", "await", "await")
Step = tuple[str, int, int, tuple[int, int]]
"""(what, party, which barrier or memory or posted operation, rows)"""


def step_of(number: int) -> Step:
    number, what = divmod(number, len(WHATS))
    number, party = divmod(number, PARTIES)
    number, first = divmod(number, 3)
    index, size = divmod(number, 2)
    return WHATS[what], party, index, (first, first + 1 + size)


# One number a step, or Hypothesis spends its entropy on the structure and the programs stay short.
steps = st.integers(0, len(WHATS) * PARTIES * 3 * 2 * 12 - 1).map(step_of)
programs = st.lists(steps, min_size=40, max_size=150)


class Graph:
    """Happens-before as reachability: every node knows the set of all nodes before it."""

    def __init__(self) -> None:
        self.before: list[set[int]] = []
        self.last: list[int | None] = [None] * PARTIES
        self.accesses: list[tuple[int, int, tuple[int, int], bool]] = []

    def node(self, *after: int | None) -> int:
        known: set[int] = set()
        for other in after:
            if other is not None:
                known |= self.before[other] | {other}
        self.before.append(known)
        return len(self.before) - 1

    def step(self, party: int, *after: int | None) -> int:
        """A node in the program order of `party`."""
        self.last[party] = self.node(self.last[party], *after)
        return len(self.before) - 1

    def races(self, node: int, memory: int, rows: tuple[int, int], write: bool, aliases: set[int]) -> bool:
        """Does this access race with one that was noted before? Notes it if not."""
        for other, where, its_rows, wrote in self.accesses:
            meets = (where == memory and rows[0] < its_rows[1] and its_rows[0] < rows[1]) or where in aliases
            if meets and (write or wrote) and other not in self.before[node]:
                return True
        self.accesses.append((node, memory, rows, write))
        return False


@dataclass
class Posted:
    """An asynchronous access: begins with what its issuer knew, and is known to whoever waits for it."""

    node: int
    end: Clock


@given(programs, st.booleans(), st.tuples(*[st.integers(1, 2)] * BARRIERS))
def test_a_race_is_reported_exactly_where_no_path_orders_two_conflicting_accesses(
    program: list[Step], overlay: bool, counts: tuple[int, ...]
) -> None:
    """Memory 0 and 1 may lie over each other. Each party has a queue of asynchronous operations that run in order.

    A wait takes the phase that was completed last, as a wait by parity does. An access that is refused did not happen.
    """
    sim, graph = Simulation(), Graph()
    memories = [Memory(str(i)) for i in range(MEMORIES)]
    aliases: list[set[int]] = [set() for _ in memories]
    if overlay:
        memories[0].aliases.append(memories[1])
        memories[1].aliases.append(memories[0])
        aliases[0], aliases[1] = {1}, {0}
    timelines = [Timeline(f"party {i}") for i in range(PARTIES)]
    queues = [Timeline(f"queue of {i}") for i in range(PARTIES)]
    barriers = [Barrier(sim, str(i), count) for i, count in enumerate(counts)]
    arrived: list[list[int]] = [[] for _ in barriers]
    completed: list[list[int]] = [[] for _ in barriers]
    posted: list[Posted] = []
    last_posted: list[int | None] = [None] * PARTIES

    for what, party, index, touched in program:
        timeline = timelines[party]
        if what == "arrive":
            barrier = index % BARRIERS
            timeline.step()
            arrived[barrier].append(graph.step(party))
            if barriers[barrier].arrive(dict(timeline.clock)):
                completed[barrier], arrived[barrier] = arrived[barrier], []
        elif what == "wait":
            barrier = index % BARRIERS
            graph.step(party, *completed[barrier])
            knowledge = barriers[barrier].phase(barriers[barrier].completed - 1).knowledge()
            if knowledge is not None:
                join(timeline.clock, knowledge)
        elif what == "await":
            if posted:
                operation = posted[index % len(posted)]
                graph.step(party, operation.node)
                join(timeline.clock, operation.end)
        else:
            memory, write = index % MEMORIES, what.endswith("write")
            queue = queues[party] if what.startswith("post") else timeline
            node = graph.step(party)
            if queue is not timeline:
                node = graph.node(node, last_posted[party])
                last_posted[party] = node
            number = queue.step()
            known = {**timeline.clock, queue: number}
            race = graph.races(node, memory, touched, write, aliases[memory])
            note = memories[memory].write if write else memories[memory].read
            with pytest.raises(Race) if race else nullcontext():
                note(Access(queue, number, (touched,), what, sim.now), known)
            if queue is not timeline:
                posted.append(Posted(node, known))
