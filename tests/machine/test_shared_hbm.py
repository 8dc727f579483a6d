"""Two CTAs that touch the same part of a tensor in HBM, one of them writing, are a race: nothing orders them."""

from __future__ import annotations

import pytest

from flashsim.engine import Access, Timeline
from flashsim.errors import Race
from flashsim.machine.shared_hbm import SharedHbm
from flashsim.machine.tiles import HbmTile

END = (64, 64)


def tile(rows: tuple[int, int], columns: tuple[int, int], head: int = 0) -> HbmTile:
    return HbmTile("S", 0, head, (rows[0], columns[0]), (rows[1], columns[1]), END, "fp16")


def touch(hbm: SharedHbm, party: str, where: HbmTile, write: bool) -> None:
    """An access by a party that knows of nobody else."""
    timeline = Timeline(party)
    access = Access(timeline, timeline.step(), where.part, "store" if write else "load", 0)
    memory = hbm.of(where)
    (memory.write if write else memory.read)(access, timeline.clock)


FIRST = tile((0, 16), (0, 32))


@pytest.mark.parametrize(
    ("second", "collides"),
    [
        (tile((0, 16), (0, 32)), True),
        (tile((15, 16), (0, 32)), True),
        (tile((16, 16), (0, 32)), False),
        (tile((0, 16), (32, 32)), False),
        (tile((0, 16), (16, 32)), True),
        (tile((0, 16), (0, 64)), True),
        (tile((0, 16), (0, 32), head=1), False),
    ],
    ids=["the same", "a common row", "other rows", "other columns", "common columns", "more columns", "another head"],
)
def test_two_stores(second: HbmTile, collides: bool) -> None:
    hbm = SharedHbm()
    touch(hbm, "a", FIRST, write=True)
    if collides:
        with pytest.raises(Race, match="race on S of batch 0, head 0: nothing orders store by a"):
            touch(hbm, "b", second, write=True)
    else:
        touch(hbm, "b", second, write=True)


def test_wide_tiles_meet_narrow_ones() -> None:
    """The store of a wide tile, after narrow ones; and a narrow one, after that."""
    hbm = SharedHbm()
    touch(hbm, "a", tile((0, 16), (0, 8)), write=False)
    with pytest.raises(Race):
        touch(hbm, "b", tile((0, 16), (0, 64)), write=True)
    hbm = SharedHbm()
    touch(hbm, "a", tile((0, 16), (0, 64)), write=True)
    with pytest.raises(Race):
        touch(hbm, "b", tile((0, 16), (56, 8)), write=False)


def test_reads_collide_with_nothing_but_writes() -> None:
    hbm = SharedHbm()
    touch(hbm, "a", FIRST, write=False)
    touch(hbm, "b", FIRST, write=False)
    with pytest.raises(Race):
        touch(hbm, "c", FIRST, write=True)


def test_what_lies_beyond_the_tensor_is_no_access() -> None:
    """Two tiles that only share rows which do not exist."""
    hbm = SharedHbm()
    touch(hbm, "a", tile((60, 16), (0, 32)), write=True)
    touch(hbm, "b", tile((64, 16), (0, 32)), write=True)
