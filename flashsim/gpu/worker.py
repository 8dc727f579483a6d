"""Runs a generator in a process of its own, and hands on what it yields as it comes.

Whether kernels are interpreted or compiled is decided when a process imports triton; and a kernel that faults or never
ends takes its process with it, and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from flashsim.errors import FlashsimError, InputError
from flashsim.paired import use_kernels

PATIENCE_S = 180.0
"""Without a word from a process for so long, it is ended: a barrier that nobody arrives at keeps a GPU for ever."""
_MARK = "flashsim-reports:"
_ROOT = Path(__file__).parents[2]
_LINES = 12
"""Of what a process said last, in the message about its end."""


class WorkerDied(FlashsimError):
    """A process ended before it was done; the message says how, and what it said last."""


def require_torch_and_triton(what: str) -> None:
    """Raises InputError that says what to install. Imports neither."""
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{what} needs {' and '.join(missing)}: pip install 'flashsim[kernels]'")


def reports(
    generator: str,
    request: Mapping[str, Any],
    environment: Mapping[str, str | None] | None = None,
    patience_s: float = PATIENCE_S,
) -> Iterator[dict[str, Any]]:
    """What `generator` ("package.module:name") yields when it is called with `request` in a new process.

    `environment` is set there, or, where it says None, unset. Request and reports are what JSON has. Raises InputError
    as the generator does, and WorkerDied if the process ends otherwise, or says nothing for `patience_s` seconds.
    """
    command = [sys.executable, "-W", "ignore", "-c", "from flashsim.gpu.worker import main; main()"]
    changed: dict[str, str | None] = {"PYTHONPATH": _search_path(), **(environment or {})}
    environ = {**os.environ, **{name: value for name, value in changed.items() if value is not None}}
    for name, value in changed.items():
        if value is None:
            environ.pop(name, None)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environ, encoding="utf-8"
        )
        assert process.stdin is not None
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            with process.stdin as stream, suppress(BrokenPipeError):  # why it does not listen is said below
                stream.write(json.dumps({"generator": generator, "request": request}))
            yield from _answers(process, lines, said, patience_s)
        finally:
            process.kill()
            process.wait()
            reader.join(timeout=10)  # somebody that it started may still have its output


def _answers(
    process: subprocess.Popen[str], lines: queue.Queue[str | None], said: IO[str], patience_s: float
) -> Iterator[dict[str, Any]]:
    while True:
        try:
            line = lines.get(timeout=patience_s)
        except queue.Empty:
            raise WorkerDied(f"nothing came for {patience_s:.0f} s{_end(said)}") from None
        if line is None:
            raise WorkerDied(f"{_how(process.wait())}{_end(said)}")
        if not line.startswith(_MARK):
            continue  # what somebody printed
        answer = json.loads(line.removeprefix(_MARK))
        if "end" in answer:
            return
        if "refused" in answer:
            raise InputError(answer["refused"])
        yield answer["report"]


def _read(stdout: IO[str], lines: queue.Queue[str | None]) -> None:
    with stdout:
        for line in stdout:
            lines.put(line)
    lines.put(None)


def _how(code: int) -> str:
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _end(said: IO[str]) -> str:
    said.seek(0)
    lines = [line[:300] for line in said.read().splitlines() if line.strip()]
    return "".join(f"\n{line}" for line in lines[-_LINES:])


def _search_path() -> str:
    return os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))


def main() -> None:
    """What runs in the new process."""
    asked = json.load(sys.stdin)
    out = sys.stdout

    def say(answer: dict[str, Any]) -> None:
        out.write(f"\n{_MARK}{json.dumps(answer)}\n")
        out.flush()

    use_kernels()
    module, _, name = asked["generator"].partition(":")
    try:
        for report in getattr(importlib.import_module(module), name)(asked["request"]):
            say({"report": report})
    except InputError as error:
        say({"refused": list(error.problems)})
    else:
        say({"end": True})
    out.flush()
    os._exit(0)  # a context that a kernel has broken may raise, or hang, where the process cleans up after itself
