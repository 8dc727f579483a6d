"""Ends a step that never ends: a loop in a user's program that comes to no event."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

PATIENCE_S = 10.0
"""Seconds of computing without a sign of life. The longest honest step, a product of a functional run, takes 0.1 s."""
TRIES = 3
"""Who is still at it after so many exceptions catches them all, and can only be ended with the process."""
CHECKS = 20
"""In that time."""


class Stuck(BaseException):
    """Raised in the middle of whatever does not end; no `except Exception` of the user's stops it."""


class Watchdog:
    """While this context is open, `pulse()` must change every PATIENCE_S seconds in which the process computes; without
    one, the context must be left by then.

    Otherwise Stuck is raised in the thread that opened it, at its next Python instruction. Without CPython it does
    nothing. Time in which the process does not run, a laptop's sleep or a debugger's pause, does not count.
    """

    def __init__(self, pulse: Callable[[], int] = lambda: 0) -> None:
        self._pulse = pulse
        self._thread = threading.get_ident()
        self._over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if hasattr(ctypes, "pythonapi"):
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._lock:
            self._over.set()

    def _watch(self) -> None:
        last, since, tries = self._pulse(), time.process_time(), 0
        while not self._over.wait(PATIENCE_S / CHECKS):
            pulse = self._pulse()
            if pulse != last:
                last, since = pulse, time.process_time()
            elif time.process_time() - since > PATIENCE_S:
                with self._lock:
                    if self._over.is_set():
                        return
                    tries += 1
                    if tries > TRIES:
                        sys.stderr.write("error: a program loops for ever and catches every exception\n")
                        os._exit(1)
                    thread = ctypes.c_ulong(self._thread)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Stuck))
                since = time.process_time()
