"""Many independent simulations on the cores that there are."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from traceback import format_exc
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

GARBAGE = 50_000
"""Objects that may be made before a worker looks for cycles among them; Python's own number is 700."""
WORTH_IT = 8
"""Fewer simulations than this take less time than starting processes for them."""
ROUNDS = 12
"""Shares that a worker gets one after the other. Neighbours are alike, and what a worker has learnt from one of them
serves it for the next; the smaller the last share, the shorter the wait for its worker."""


def in_order(work: Callable[[Item], Answer], items: Sequence[Item], workers: int) -> Iterator[Answer]:
    """`work` of each item, in the order of the items, by up to `workers` processes.

    `work` must be a function of a module; items, answers and exceptions must be picklable. An exception of `work` comes
    where its answer would have. Processes are started afresh, so that the answers are those of one process alone.
    """
    if workers < 2 or len(items) < WORTH_IT:
        yield from map(work, items)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")
    share = max(1, len(items) // (workers * ROUNDS))
    pool = ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=_begin)
    try:
        for answer in pool.map(partial(_try, work), items, chunksize=share):
            if isinstance(answer, _Failed):
                raise answer.error from InAWorker(answer.where)
            yield answer
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class _Failed:
    error: Exception
    where: str


class InAWorker(Exception):
    """Where in a worker an exception was raised, as text: tracebacks do not travel."""


def _try(work: Callable[[Item], Answer], item: Item) -> Answer | _Failed:
    """The answer, or what came instead: one that fails does not take its neighbours with it."""
    try:
        return work(item)
    except Exception as error:
        return _Failed(error, format_exc())


def _begin() -> None:
    """Leave interrupts to the parent, and look for garbage less often: a simulation makes many objects, few cycles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(GARBAGE)
