"""A schedule of the user's that goes wrong ends with a message that names its file and line, not with a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsim import watchdog
from flashsim.check.prove import check
from flashsim.errors import Deadlock, EndlessRun, InputError, SimulationError
from flashsim.problem import AttentionProblem
from flashsim.schedules import fa2, load_schedule
from flashsim.simulate import simulate

PROBLEM = AttentionProblem(batch=1, heads_q=1, seqlen_q=64, head_dim=16)
BEFORE = "                yield q\n"


DEFAULTS = '        return {"BLOCK_M": rows, "BLOCK_N": keys, "mma": "mma.sync", "num_warps": warps, "num_stages": 1, **backward}\n'  # noqa: E501
"""The line of fa2 with the published kernel's defaults."""


def edited(folder: Path, old: str, new: str) -> Path:
    """fa2 with one piece of its text changed."""
    text = Path(fa2.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = folder / "bad.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def message_of(path: Path, functional: bool = True, kind: type[SimulationError] = SimulationError) -> str:
    with pytest.raises(kind) as caught:
        simulate(PROBLEM, f"{path}:FA2", functional=functional)
    return str(caught.value)


def line_in(path: Path, piece: str) -> str:
    """`file:line` of the line with `piece`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return f"{path}:{next(number for number, line in enumerate(lines, start=1) if piece in line)}"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("yield 42", "warps yields 42, which cannot be waited for"),
        ("raise KeyError(tile)", "warps: KeyError"),
        ("while True: yield q", "warps loops without time going on"),
        ("wg.gemm(s.Q, s.K, into=r.S)", "gemm of (128, 32) and (128, 32) into (128, 128): shapes do not fit"),
        ("while True: wg.store(r.O, into=tile.O)", "issues 100001 operations and waits for none"),
        ('while True: wg.map("fill", 0.0, into=r.S)', "issues 100001 operations and waits for none"),
        ("raise SystemExit(0)", "warps: SystemExit: 0"),
        ("raise GeneratorExit", "warps: GeneratorExit"),
        ("type(wg.problem)(batch=0, heads_q=1, seqlen_q=1, head_dim=1)", "warps: InputError: batch: got 0"),
        ('wg.map("multiply", r.S, r.stats.l, into=r.S)', "unknown operation of map 'multiply', did you mean 'mul'?"),
        ('wg.map("exp", r.S, into=r.S)', "map(exp) takes 2 tiles, got 1"),
        ('wg.map("mul", r.S, r.O, into=r.S)', "shapes do not fit"),
        ('wg.map("fill", into=r.S)', "map(fill) takes one number, got ()"),
        (
            'wg.map("mask", r.S, tile, tile.last + 1, into=r.S)',
            "KV tile 1 is none of this work tile's, which are 0 to 0",
        ),
        ('wg.map("mask", r.S, into=r.S)', "map(mask) takes scores, a work tile and the number of a KV tile, got ()"),
        ('wg.reduce("min", r.S, into=r.stats.m)', "unknown operation of reduce 'min' (allowed: max, abs_max, sum)"),
        ('wg.reduce("max", r.S, into=r.S)', "reduce(max) of (128, 128) into (128, 128): shapes do not fit"),
        ("wg.convert(r.O, into=r.S)", "convert of (128, 32) into (128, 128): shapes do not fit"),
        ("wg.load(tile.Q.rows(0, 32), into=s.Q)", "load of (32, 32) into (128, 32): shapes do not fit"),
        ("wg.load(s.Q, into=tile.Q)", "load goes from HBM to the SM, got Q into Q(batch 0, head 0, rows 0 to 127)"),
        ("wg.store(r.O, into=tile.O.rows(0, 64))", "store of (128, 32) into (64, 32): shapes do not fit"),
        ("s.Q.rows(96, 64)", "IndexError: rows 96 to 159 of a tile that has rows 0 to 127"),
        ("tile.Q.rows(-1, 64)", "IndexError: rows -1 to 62 of a tile that has rows 0 to 127"),
        ("wg.gemm(tile.Q, s.K.T, into=r.S)", "gemm takes tiles in shared memory and registers, got Q(batch 0"),
        ("wg.gemm(s.Q, s.K.T, into=s.V)", "gemm of (128, 32) and (32, 128) into (128, 32): shapes do not fit"),
        ("wg.gemm(r.S, s.V, into=r.O)", "gemm of fp32 and fp16: both must be of one dtype, of 16 bits or less"),
    ],
)
@pytest.mark.parametrize("functional", [True, False])
def test_a_bad_statement_is_named(statement: str, message: str, functional: bool, tmp_path: Path) -> None:
    path = edited(tmp_path, BEFORE, f"{BEFORE}                {statement}\n")
    found = message_of(path, functional)
    assert message in found
    assert f"{line_in(path, statement)}: " in found


@pytest.mark.parametrize("functional", [True, False])
def test_a_loop_in_which_time_goes_on_for_ever(functional: bool, tmp_path: Path) -> None:
    """Bounded by events; the message says where the warpgroup was."""
    path = edited(tmp_path, BEFORE, f"{BEFORE}                while True: yield wg.load(tile.Q, into=s.Q)\n")
    found = message_of(path, functional, EndlessRun)
    assert "gave up after" in found
    assert f"warps is at {line_in(path, 'while True')}" in found


SWALLOWING = "try:\n                        len('x')\n                    except Exception: pass"


@pytest.mark.parametrize("body", ["pass", SWALLOWING], ids=["plain", "swallowing exceptions"])
def test_a_loop_that_reaches_no_verb(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded by seconds of computing, 10 of them; here by a half."""
    monkeypatch.setattr(watchdog, "PATIENCE_S", 0.5)
    loop = f"                while True:\n                    {body}\n"
    path = edited(tmp_path, BEFORE, BEFORE + loop)
    found = message_of(path, kind=EndlessRun)
    assert "warps loops without ever waiting" in found
    assert int(found.partition(f"{path}:")[2].partition(":")[0]) >= int(line_in(path, "while True").rpartition(":")[2])


def test_a_barrier_at_which_nobody_arrives(tmp_path: Path) -> None:
    path = edited(tmp_path, '"everybody", self.warpgroups', '"everybody", self.warpgroups + 1')
    found = message_of(path, kind=Deadlock)
    assert "warps waits for phase 0 of everybody (0 completed, 1 of 2 arrived)" in found
    assert f"at {line_in(path, '# everyone')}" in found


def test_a_program_that_never_yields(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom flashsim.schedules import fa2\n@dataclass(frozen=True)\n"
        "class FA2(fa2.FA2):\n    def program(self, wg, s, r):\n        return None\n",
        encoding="utf-8",
    )
    assert message_of(path) == f"{path}:5: the program of warps never yields, so that it waits for nothing"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('everybody=cta.sync("everybody", self.warpgroups),', "everybody=cta.sink(),"),
        ('P=regs.tile("P", (rows, self.BLOCK_N), regs.problem.dtype, over=S),', "P=regs.tile(1 / 0),"),
        (DEFAULTS, '        return {"BLOCK_M": rows[0]}\n'),
    ],
    ids=["shared", "registers", "defaults"],
)
def test_a_mistake_outside_of_the_program(old: str, new: str, tmp_path: Path) -> None:
    path = edited(tmp_path, old, new)
    found = message_of(path)
    assert found.startswith(f"{line_in(path, new.strip())}: ")
    assert "Error: " in found


def test_a_mistake_is_named_by_a_relative_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edited(
        tmp_path,
        '            everybody=cta.sync("everybody", self.warpgroups),\n',
        "            everybody=1 / 0,\n",
    )
    monkeypatch.chdir(tmp_path)
    assert (
        message_of(Path("bad.py"))
        == f"bad.py:{line_in(path, '1 / 0').rpartition(':')[2]}: ZeroDivisionError: division by zero"
    )


def test_what_a_function_returns_is_no_kernel(tmp_path: Path) -> None:
    path = edited(tmp_path, "        return self.num_warps // 4\n", "        return 1.5\n")
    assert "TypeError" in message_of(path)
    path = edited(tmp_path, DEFAULTS, "        return None\n")
    assert message_of(path).startswith("schedule fa2 does not run: AttributeError: ")


def test_only_who_issued_a_copy_can_wait_for_it(tmp_path: Path) -> None:
    """cp.async.wait_group knows a thread's own copies; others need a barrier."""
    copies = "s.everybody.copies = [*getattr(s.everybody, 'copies', []), q]"
    waits = f"                {copies}\n                yield s.everybody.copies[0]\n"
    path = edited(tmp_path, BEFORE, BEFORE + waits)
    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=256, head_dim=16)
    with pytest.raises(SimulationError, match="which another warpgroup has issued: only a barrier tells of that"):
        simulate(problem, f"{path}:FA2", options={"BLOCK_M": 256})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            '            everybody=cta.sync("everybody", self.warpgroups),\n',
            "            everybody=[None for _ in iter(int, 1)],\n",
        ),
        ("            stats=Statistics.declare(regs, rows),\n", "            stats=[None for _ in iter(int, 1)],\n"),
        ("        rows, keys = tile_size(", "        while True: pass\n        rows, keys = tile_size("),
    ],
    ids=["shared", "registers", "defaults"],
)
def test_a_loop_outside_of_the_program(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE_S", 0.2)
    path = edited(tmp_path, old, new)
    found = message_of(path, kind=EndlessRun)
    assert found == f"{line_in(path, new.splitlines()[0].strip())}: does not come to its end"
    with pytest.raises(EndlessRun, match="does not come to its end"):
        check(f"{path}:FA2", 10)


@pytest.mark.parametrize("text", ["while True:\n    pass\n", "def f():\n    while True: pass\n\nf()\n"])
def test_a_file_that_cannot_be_loaded_because_it_never_ends(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE_S", 0.2)
    path = tmp_path / "bad.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"bad.py:\d+: the file does not come to its end"):
        load_schedule(f"{path}:FA2")


def test_a_file_that_exits_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be run: SystemExit: 3"):
        load_schedule(f"{path}:FA2")


def test_a_run_that_ends_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little patience there is: every event is a sign of life."""
    monkeypatch.setattr(watchdog, "PATIENCE_S", 0.05)
    problem = AttentionProblem(batch=1, heads_q=4, seqlen_q=1024, head_dim=64)
    assert simulate(problem, "fa2", functional=True).functional is not None


def test_a_switch_of_a_type_that_no_text_gives_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom flashsim.schedules import fa2, switch\n"
        "@dataclass(frozen=True)\nclass Bad(fa2.FA2):\n    depth: float = switch(1.0, 'how deep')\n",
        encoding="utf-8",
    )
    with pytest.raises(InputError, match="a switch has type <class 'float'>, it must be bool, int or str"):
        simulate(PROBLEM, f"{path}:Bad")
