"""`check`: right schedules pass, wrong ones end with the smallest problem, a picture of the collision, and a seed."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import configuration, settings

from flashsim import schedules, watchdog
from flashsim.check import prove
from flashsim.check.draw import drawn_examples, values_of
from flashsim.check.example import KINDS, Example, Latencies, NotAccepted, Outcome
from flashsim.check.prove import Report, check
from flashsim.check.words import report_lines
from flashsim.errors import InputError
from flashsim.machine.sm import UNITS
from flashsim.masks import SPELLING
from flashsim.problem import AttentionProblem
from flashsim.schedules import load_schedule
from flashsim.testing.cases import AttentionCase

EXAMPLES = max(10, settings().max_examples // 2)


def edited(folder: Path, name: str, old: str, new: str) -> str:
    """The built-in schedule with one piece of its text changed, as a user would name it."""
    text = (Path(schedules.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = folder / "mine.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return f"{path}:{name.upper()}"


def line_of(schedule: str, piece: str) -> int:
    path = schedule.rpartition(":")[0]
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines, start=1) if piece in line]
    return number


@pytest.mark.parametrize("name", schedules.schedule_names())
def test_built_in_schedules_pass(name: str) -> None:
    report = check(name, EXAMPLES)
    assert report.passed, report_lines(report)
    assert report.examples == EXAMPLES
    assert report_lines(report) == [f"{name}: {EXAMPLES} examples, seed 0: {prove_words()}"]


def prove_words() -> str:
    return "exact, and without race, hazard or deadlock"


def test_a_seed_draws_the_same_whatever_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis likes to draw the constants of a user's modules, and so of all that happen to be loaded."""
    draw = (
        "from flashsim.check.draw import drawn_examples\n"
        "from flashsim.schedules import load_schedule\n"
        "print(*(repr(e) for e in drawn_examples(load_schedule('fa2'), 40)), sep='\\n')\n"
    )
    (tmp_path / "constants.py").write_text(f"NUMBERS = {list(range(2, 500))}\n", encoding="utf-8")
    texts = (draw, f"import sys; sys.path.append({str(tmp_path)!r}); import constants\n" + draw)
    found = [subprocess.run([sys.executable, "-c", text], capture_output=True, check=True) for text in texts]
    assert found[0].stdout == found[1].stdout != b""


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The classic bug of FA3: P is overwritten while the product that reads it is in flight."""
    name = edited(tmp_path_factory.mktemp("race"), "fa3", "            yield pv  # 14\n", "")
    return check(name, 50)


def test_a_race_is_found_and_made_small(race: Report) -> None:
    failure = race.failure
    assert failure is not None
    assert failure.kind == "Race"
    p, options = failure.example.problem, failure.example.options
    assert (p.batch, p.heads_q, p.seqlen_q, p.head_dim) == (1, 1, 1, 16)
    assert options["BLOCK_N"] < p.seqlen_k <= 2 * options["BLOCK_N"]  # two KV tiles: one has no tile before it
    assert failure.example.latencies.modes == ()


def test_the_timeline_shows_who_collides(race: Report) -> None:
    assert race.failure is not None
    *_, reads, writes = race.failure.timeline
    product, convert = line_of(race.schedule, "pv = wg.gemm"), line_of(race.schedule, "# 16: P_cur")
    assert re.search(rf"reads .*P.* gemm\(.*mine.py:{product} ", reads)
    assert re.search(rf"writes .*P.* convert\(.*mine.py:{convert} ", writes)
    assert re.match(r"\d+ to \.\.\.", reads), "the product has not ended"


def test_the_seed_replays_a_failure(race: Report) -> None:
    match = re.fullmatch(r"flashsim check (\S+) --examples (\d+) --seed (\d+)", race.replay)
    assert match is not None
    assert check(match[1], int(match[2]), int(match[3])).to_json() == race.to_json()


def test_another_seed_draws_other_examples() -> None:
    fa3 = load_schedule("fa3")
    first, again, other = (list(map(repr, drawn_examples(fa3, 20, seed))) for seed in (0, 0, 1))
    assert first == again != other


def test_a_deadlock_that_needs_few_stages(tmp_path: Path) -> None:
    """The producer waits for a slot of V before it loads K: with one stage more that only costs time."""
    name = edited(tmp_path, "fa3", "yield s.K.empty(j)  # 7", "yield s.V.empty(j)  # 7")
    failure = check(name, 100).failure
    assert failure is not None
    assert failure.kind == "Deadlock"
    options = failure.example.options
    assert options.get("num_stages", 2) == options.get("overlap_stages", 2) - 1
    waits = (
        rf"producer waits for phase 0 of V(\[0\])?\.empty \(0 completed, 0 of 1 arrived\), at {re.escape(name[:-4])}:"
    )
    assert re.search(waits, failure.message)
    assert any(re.search(r"\.\.\. .* waits for phase 1 of K(\[0\])?\.full", line) for line in failure.timeline)


def test_wrong_numbers(tmp_path: Path) -> None:
    name = edited(tmp_path, "fa2", "                rescale(wg, r.O, r.stats)\n", "")
    failure = check(name, 30).failure
    assert failure is not None
    assert failure.kind == "NotAccepted"
    p = failure.example.problem
    assert re.match(r"wrong numbers: errors up to \S+ in O \(\d+ of \d+ rows: batch ", failure.message)
    assert p.seqlen_k > failure.example.options.get("BLOCK_N", 64)  # one tile has nothing to rescale


def test_tiles_and_head_dims_that_a_schedule_ships_with_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait that is missing only there."""
    monkeypatch.setattr(prove, "SHRINKING_S", 1.0)
    name = edited(
        tmp_path,
        "fa3",
        "            yield pv  # 14\n",
        "            if self.BLOCK_N not in (112, 176):\n                yield pv\n",
    )
    failure = check(name, 300).failure
    assert failure is not None
    assert failure.kind == "Race"
    assert "BLOCK_N" not in failure.example.options


def test_a_schedule_that_runs_nowhere_is_bad_input(tmp_path: Path) -> None:
    name = edited(tmp_path, "fa3", '    architectures = ("hopper",)\n', '    architectures = ("blackwell",)\n')
    with pytest.raises(InputError, match="names no architecture that is known"):
        check(name, 10)


def test_an_output_that_is_not_written(tmp_path: Path) -> None:
    name = edited(tmp_path, "fa2", "            wg.store(r.stats.l, into=tile.LSE.rows(*my_rows))  # 15\n", "")
    failure = check(name, 10).failure
    assert failure is not None
    assert failure.message == (
        "wrong numbers: LSE not written, or not a number (1 of 1 rows: batch 0, heads 0, queries 0)"
    )
    assert failure.example.problem.seqlen_k == 1


def test_a_result_that_depends_on_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """No schedule here sums a row in an order that time decides, so that one is made up."""
    example = next(one for one in drawn_examples(load_schedule("fa2"), 30) if one.latencies.modes)
    compute = Example.compute

    def other_bits(self: Example, latencies: Latencies, trace: Any = None) -> Outcome:
        outcome = compute(self, latencies, trace)
        other = outcome.tensors | {"O": np.nextafter(outcome.tensors["O"], 9.0)}
        return outcome._replace(tensors=other) if latencies.modes else outcome

    example.check()
    monkeypatch.setattr(Example, "compute", other_bits)
    with pytest.raises(NotAccepted, match="O depends on latencies"):
        example.check()


def test_a_search_that_is_out_of_time_still_ends_with_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "SHRINKING_S", 0.0)
    name = edited(tmp_path, "fa3", "            yield pv  # 14\n", "")
    failure = check(name, 50).failure
    assert failure is not None
    assert failure.kind == "Race"


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("while True: pass", "loops without ever waiting"),
        ("while True: yield wg.load(tile.Q, into=s.Q)", "gave up after"),
        ("yield 42", "which cannot be waited for"),
        ("raise KeyError(tile)", "KeyError"),
    ],
)
def test_a_schedule_that_goes_wrong_in_python(
    statement: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE_S", 0.5)
    monkeypatch.setattr(prove, "SLOW_S", 0.4)
    before = "                yield q\n"
    name = edited(tmp_path, "fa2", before, f"{before}                {statement}\n")
    failure = check(name, 10).failure
    assert failure is not None
    assert words in failure.message
    assert f"mine.py:{line_of(name, statement)}" in failure.message


def test_a_schedule_that_accepts_nothing_is_bad_input(tmp_path: Path) -> None:
    name = edited(tmp_path, "fa2", "        lines = []\n", '        lines = ["no"]\n')
    with pytest.raises(InputError, match="accepts none of the problems and switches that were tried"):
        check(name, 10)


# What is drawn.


def test_every_switch_of_fa3_takes_every_value_in_a_check() -> None:
    examples = drawn_examples(load_schedule("fa3"), 300)
    for narrow in (False, True):
        of_dtype = [example.options for example in examples if (example.problem.dtype == "fp8") == narrow]
        for name, values in values_of(load_schedule("fa3"), "hopper", "fp8" if narrow else "fp16").items():
            drawn = {options[name] for options in of_dtype if name in options}
            assert drawn == set(values) - ({"published"} if name == "impl" else set())  # which needs no option
    assert {example.problem.mask.partition(":")[0] for example in examples} == {*SPELLING} - {"blocks"}
    assert {example.rounded for example in examples} == {False, True}
    assert {mode for example in examples for _, mode in example.latencies.modes} == {"zero", "random", "far beyond"}


def test_examples_are_different_from_each_other() -> None:
    """Hypothesis alone repeats itself: of 100 examples in one run, fewer than half have switches of their own."""
    examples = drawn_examples(load_schedule("fa3"), 100)
    assert len({repr((example.options, example.problem)) for example in examples}) > 75


def test_every_duration_that_the_machine_asks_for_can_be_drawn() -> None:
    assert set(UNITS) <= set(KINDS)
    asked: set[str] = set()

    def note(kind: str, ticks: int) -> int:
        asked.add(kind)
        return ticks

    for name in schedules.schedule_names():
        problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=130, head_dim=16, mask="causal")
        example = Example(load_schedule(name), "h100-sxm5", 1, {}, AttentionCase(problem), Latencies())
        watched = replace(example, latencies=_Watched(note))
        watched.compute(watched.latencies)
    assert asked <= set(KINDS)


class _Watched(Latencies):
    def __init__(self, note: Any) -> None:
        object.__setattr__(self, "modes", ())
        object.__setattr__(self, "note", note)

    def draw(self) -> Any:
        return self.note  # type: ignore[attr-defined]


def test_latencies_are_those_that_were_drawn() -> None:
    latencies = Latencies((("exp", "zero"), ("memory", "far beyond"), ("tensor", "random")), seed=3)
    one, same = latencies.draw(), latencies.draw()
    questions = [("exp", 100), ("memory", 100), ("tensor", 100), ("tma", 100)] * 20
    answers = [one(*question) for question in questions]
    assert answers == [same(*question) for question in questions]
    assert {answer for (kind, _), answer in zip(questions, answers, strict=True) if kind == "exp"} == {0}
    assert {answer for (kind, _), answer in zip(questions, answers, strict=True) if kind == "tma"} == {100}
    assert max(answer for (kind, _), answer in zip(questions, answers, strict=True) if kind == "memory") > 10**6
    assert str(latencies) == "exp zero, memory far beyond, tensor random (seed 3)"


# Nothing is left behind.


def test_nothing_is_written_into_the_users_folder(tmp_path: Path) -> None:
    name = edited(tmp_path, "fa2", "                yield v\n", "                pass\n")
    run = subprocess.run(
        [sys.executable, "-m", "flashsim", "check", name, "--examples", "20"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={"PYTHONPATH": str(Path(schedules.__file__).parents[2])},
    )
    assert run.returncode == 1
    assert "Race in example" in run.stdout
    assert run.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_hypothesis_keeps_the_folder_that_the_user_has_set(tmp_path: Path) -> None:
    before = configuration.storage_directory(intent_to_write=False).path
    configuration.set_hypothesis_home_dir(tmp_path)
    try:
        check("fa2", 3)
        assert configuration.storage_directory(intent_to_write=False).path == tmp_path
    finally:
        configuration.set_hypothesis_home_dir(before)
