"""A schedule of the user's that goes wrong ends with a message that names its file and line, not with a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsim.errors import InputError, SimulationError
from flashsim.problem import AttentionProblem
from flashsim.schedules import fa2
from flashsim.simulate import simulate

PROBLEM = AttentionProblem(batch=1, heads_q=1, seqlen_q=64, head_dim=16)
BEFORE = "                yield q\n"


def simulate_with(statement: str, folder: Path) -> str:
    """The message of the error that fa2 with `statement` in its prologue ends with."""
    text = Path(fa2.__file__).read_text(encoding="utf-8")
    assert BEFORE in text
    path = folder / "bad.py"
    path.write_text(text.replace(BEFORE, f"{BEFORE}                {statement}\n"), encoding="utf-8")
    with pytest.raises(SimulationError) as caught:
        simulate(PROBLEM, f"{path}:FA2", functional=True)
    line = next(n for n, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if statement in text)
    assert f"{path}:{line}: " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("yield 42", "warps yields 42, which cannot be waited for"),
        ("raise KeyError(tile)", "warps: KeyError"),
        ("while True: yield q", "warps loops without time going on"),
        ("wg.gemm(s.Q, s.K, into=r.S)", "gemm of (128, 16) and (128, 16) into (128, 128): shapes do not fit"),
    ],
)
def test_a_bad_statement_is_named(statement: str, message: str, tmp_path: Path) -> None:
    assert message in simulate_with(statement, tmp_path)


def test_a_switch_of_a_type_that_no_text_gives_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom flashsim.schedules import fa2, switch\n"
        "@dataclass(frozen=True)\nclass Bad(fa2.FA2):\n    depth: float = switch(1.0, 'how deep')\n",
        encoding="utf-8",
    )
    with pytest.raises(InputError, match="a switch has type <class 'float'>, it must be bool, int or str"):
        simulate(PROBLEM, f"{path}:Bad")
