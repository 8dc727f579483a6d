"""Work that is shared out to processes comes back as if it had been done here."""

from __future__ import annotations

import os
import time

import pytest

from flashsim.analysis.parallel import in_order


def square(number: int) -> int:
    time.sleep(0.002 * (number % 5))  # so that answers are not ready in order
    if number == 13:
        raise ValueError("unlucky")
    return number * number


def process(number: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_in_order_up_to_what_fails(workers: int) -> None:
    answers = in_order(square, range(40), workers)
    assert [next(answers) for _ in range(13)] == [number * number for number in range(13)]
    with pytest.raises(ValueError, match="unlucky"):
        next(answers)


def test_neighbors_are_done_by_the_same_worker() -> None:
    workers = list(in_order(process, range(96), 2))
    assert os.getpid() not in workers
    assert all(len(set(workers[begin : begin + 4])) == 1 for begin in range(0, 96, 4))


def test_little_work_starts_no_process() -> None:
    assert list(in_order(process, range(4), 2)) == [os.getpid()] * 4
