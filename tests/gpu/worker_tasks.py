"""What `test_worker.py` runs in other processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from flashsim.errors import InputError


def count(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for n in range(request["to"]):
        sys.stdout.write(f"a kernel prints {n}")
        yield {"n": n}


def settings(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {name: os.environ.get(name) for name in request["names"]}


def kernels(_: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    import flashsim
    import flashsim_kernels

    yield {"flashsim": flashsim.__file__, "kernels": flashsim_kernels.__file__}


def refuse(_: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {}
    raise InputError(["one: is wrong", "two: is wrong"])


def die(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"alive": True}
    sys.stderr.write("the last words\n")
    sys.stderr.flush()
    if request["how"] == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if request["how"] == "exception":
        raise RuntimeError("a fault")
    time.sleep(600)
