"""Every wait and every signal of a schedule is needed: a functional run notices when it is gone, early, or of another
slot. A fixed sample here; `flashsim check --mutants` has them all.
"""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

from flashsim import schedules
from flashsim.check import equivalent
from flashsim.check import survey as judging
from flashsim.check.equivalent import EQUIVALENT, LOAD_AFTER, WAITS_TOO_EARLY, file_of, parts_of, reason_for
from flashsim.check.mutants import Mutant, mutants_of, probed
from flashsim.check.survey import EQUIVALENT as OUTCOME_EQUIVALENT
from flashsim.check.survey import INVALID, KILLED, NOT_RUN, SURVIVED, Survey, Verdict, mutants_in, survey
from flashsim.check.words import SAY_WHY, survey_lines
from flashsim.errors import InputError, Race
from flashsim.schedules import load_schedule

BUILT_IN = schedules.schedule_names()


@pytest.fixture(autouse=True)
def fewer_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Than `flashsim check --mutants` takes."""
    monkeypatch.setattr(judging, "DRAWN", 400)
    monkeypatch.setattr(judging, "KEPT", 64)
    monkeypatch.setattr(judging, "TRIED", 8)


def source_of(name: str) -> str:
    return (Path(schedules.__file__).parent / f"{name}.py").read_text(encoding="utf-8")


def texts_of(name: str) -> list[str]:
    """Of all files that make up a schedule."""
    return [equivalent.source_of(part) for part in parts_of(load_schedule(name))]


def mutants_named(name: str) -> list[Mutant]:
    return [mutant for _, mutant in mutants_in(name)]


def mutant_number(name: str, statement: str, change: str) -> int:
    return next(n for n, m in enumerate(mutants_named(name)) if (m.statement, m.change) == (statement, change))


# The generator.


@pytest.mark.parametrize("name", BUILT_IN)
def test_there_is_a_mutant_without_each_wait_and_each_signal(name: str) -> None:
    """Counted by hand in the files' text: a wait is a `yield` that is no `yield from`."""
    lines = [line.partition("#")[0] for text in texts_of(name) for line in text.splitlines()]
    waits = [line for line in lines if line.lstrip().startswith("yield ") and "yield from" not in line]
    signals = [line for line in lines if any(f".{name}(" in line for name in ("pass_on", "release", "commit"))]
    gone = [mutant for mutant in mutants_named(name) if mutant.change in ("removed", "not awaited")]
    assert len(gone) == len(waits) + len(signals)


@pytest.mark.parametrize("name", BUILT_IN)
def test_there_are_two_mutants_of_another_slot_for_each_index_of_a_ring(name: str) -> None:
    text = "\n".join(line.partition("#")[0] for text in texts_of(name) for line in text.splitlines())
    indices = sum(text.count(f".{method}(") for method in ("full", "empty", "release", "commit"))
    other = [mutant for mutant in mutants_named(name) if mutant.change in ("next item", "item before")]
    assert len(other) == 2 * indices


@pytest.mark.parametrize("name", BUILT_IN)
def test_mutants_differ_from_the_file_and_can_be_parsed(name: str) -> None:
    mutants = mutants_named(name)
    assert len({mutant.source for mutant in mutants} | {*texts_of(name)}) == len(mutants) + len(texts_of(name))
    for mutant in mutants:
        ast.parse(mutant.source)


def test_lines_keep_their_numbers() -> None:
    text = source_of("fa3")
    for mutant in mutants_of(text):
        pairs = list(zip(text.splitlines(), mutant.source.splitlines(), strict=True))
        different = [number for number, (old, new) in enumerate(pairs, start=1) if old != new]
        if mutant.change != "earlier":
            assert different == [mutant.line]
        else:  # from the statement before it to its own line
            assert max(different) == mutant.line


LOOP = "        for tile in wg.tiles():\n"
TOY = """
def program(wg, s):
    for j in wg.kv_tiles():
        yield s.K.full(j)
        for i in range(2):
            wg.gemm(s.K[j])
        s.K.release(j)
    def inner():
        a = wg.load()
        yield a
"""


def test_what_a_small_program_becomes() -> None:
    mutants = {mutant.key: mutant.source for mutant in mutants_of(TOY)}
    release, wait = "s.K.release(j)", "yield s.K.full(j)"
    changed = {
        ("program", wait, "removed"): ("        yield s.K.full(j)\n", "        yield from ()\n"),
        ("program", wait, "next item"): ("s.K.full(j)", "s.K.full(j + 1)"),
        ("program", wait, "item before"): ("s.K.full(j)", "s.K.full(j - 1)"),
        ("program", release, "removed"): (release, "pass"),
        ("program", release, "next item"): (release, "s.K.release(j + 1)"),
        ("program", release, "item before"): (release, "s.K.release(j - 1)"),
        ("inner", "yield a", "removed"): ("yield a", "yield from ()"),
        ("inner", "yield a", "earlier"): ("a = wg.load()\n        yield a", "yield a; a = wg.load()\n        pass"),
    }
    expected = {key: TOY.replace(old, new) for key, (old, new) in changed.items()}
    block = "        for i in range(2):\n            wg.gemm(s.K[j])\n"
    expected["program", release, "earlier"] = TOY.replace(f"{block}        {release}\n", f"        {release}\n{block}")
    assert mutants == expected


def test_a_probed_file_notes_the_lines_that_run() -> None:
    space: dict[str, set[int]] = {}
    exec(probed("def program(s):\n    yield 1\n    if s:\n        yield 2\n"), space)
    list(space["program"](False))  # type: ignore[operator]
    assert space["EXECUTED"] == {2}


# The survey.

SAMPLE = {"standard": 6, "fa1": 7, "fa2": 8, "fa3": 40, "split_kv": 3}
"""Every so many mutants."""


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_sample_of_mutants_is_killed_or_explained(name: str) -> None:
    numbers = list(range(0, len(mutants_in(name)), SAMPLE[name]))
    found = Survey(name, tuple(survey(name, numbers, workers=1)))
    assert found.passed, [verdict for verdict in found.verdicts if verdict.outcome in (SURVIVED, NOT_RUN)]
    least = 5 if name == "split_kv" else 3  # it has one warpgroup, whose barriers order nothing that a check can see
    assert found.counts[KILLED] >= len(numbers) / least
    assert found.counts[INVALID] == 0


def test_every_written_reason_names_a_mutant() -> None:
    there: dict[str, set[tuple[str, str, str]]] = {}
    for name in BUILT_IN:
        for part, mutant in mutants_in(name):
            there.setdefault(file_of(part).stem, set()).add(mutant.key)
    for file, reasons in EQUIVALENT.items():
        assert reasons.keys() <= there[file]


def mutant_of(statement: str, change: str) -> Mutant:
    return Mutant("program", 1, statement, change, "")


@pytest.mark.parametrize(
    ("statement", "explained"),
    [
        ("yield s.K.full(j)", True),
        ("yield qk", True),
        ("yield s.turn.wait()", True),
        ("s.turn.pass_on()", True),
        ("s.K.release(j)", False),
        ("yield s.everybody.wait()", False),
        ("yield wg.gemm(a, b, into=c)", False),
    ],
)
def test_which_statements_may_come_too_early(statement: str, explained: bool) -> None:
    """A pure wait or a turn costs only time; what also issues or signals must be noticed, or have a reason."""
    assert (reason_for(mutant_of(statement, "earlier"), "FA3", "") is not None) == explained
    assert reason_for(mutant_of(statement, "removed"), "FA3", "") is None


SCORES = "yield wg.gemm(s.Q.rows(*my_rows), s.K.T, into=r.S)"
ADDED = "            finish(wg, r.O, r.stats)"


@pytest.mark.parametrize(
    ("old", "new", "class_name", "reason"),
    [
        ("", "", "FA2", LOAD_AFTER),
        ("OTHER_INSTRUCTIONS = 60", "OTHER_INSTRUCTIONS = 61", "FA2", LOAD_AFTER),
        ("  # 4\n", "  # line 4\n", "FA2", LOAD_AFTER),
        (ADDED, f"            wg.problem\n{ADDED}", "FA2", None),
        ("", "", "Mine", None),
        ("", "", "FA3", None),
        (f"{SCORES}  # 8", f"{SCORES}  # equivalent: I say so\n            # 8", "Mine", "I say so"),
        (f"{SCORES}  # 8", f"{SCORES}  # 8  #equivalent:  I say so \n            # 8", "FA2", "I say so"),
        (f"{SCORES}  # 8", f"{SCORES}  # equivalent: \n            # 8", "Mine", None),
    ],
)
def test_what_is_said_of_a_mutant_in_a_users_file(old: str, new: str, class_name: str, reason: str | None) -> None:
    """Our reasons hold for an unchanged function of a class of our name; the user's own for any statement."""
    assert old in source_of("fa2")
    text = source_of("fa2").replace(old, new, 1)
    (mutant,) = [m for m in mutants_of(text) if (m.statement, m.change) == (SCORES, "earlier")]
    assert reason_for(mutant, class_name, text) == reason


def test_a_survey_of_a_users_schedule(tmp_path: Path) -> None:
    """A reason is asked for when a mutant survives: what is killed stays killed, whatever is written beside it."""
    path = tmp_path / "mine.py"
    text = source_of("fa2").replace("yield v\n", "yield v  # equivalent: not at all\n")
    path.write_text(text.replace(ADDED, f"            wg.problem\n{ADDED}"), encoding="utf-8")
    name = f"{path}:FA2"
    wanted = [("yield q", "earlier"), ("yield v", "removed"), (SCORES, "earlier")]
    verdicts = list(survey(name, [mutant_number(name, *which) for which in wanted], workers=1))
    assert [verdict.outcome for verdict in verdicts] == [OUTCOME_EQUIVALENT, KILLED, SURVIVED]
    assert verdicts[0].how == WAITS_TOO_EARLY
    assert list(tmp_path.iterdir()) == [path]


def test_our_reasons_hold_in_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source_of("fa2"), encoding="utf-8")
    name = f"{path}:FA2"
    (verdict,) = survey(name, [mutant_number(name, SCORES, "earlier")], workers=1)
    assert (verdict.outcome, verdict.how) == (OUTCOME_EQUIVALENT, LOAD_AFTER)


def test_a_users_reason_explains_only_the_statement_on_its_line() -> None:
    text = TOY.replace("yield s.K.full(j)", "yield s.K.full(\n            j)  # equivalent: of two lines")
    text = text.replace("s.K.release(j)", "s.K.release('# equivalent: a text')")
    said = {(m.line, m.change): reason_for(m, "Toy", text) for m in mutants_of(text)}
    assert {line for (line, _), reason in said.items() if reason == "of two lines"} == {4}
    assert said[4, "removed"] == said[4, "next item"] == "of two lines"
    assert said[8, "removed"] is None


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few examples, for what any example shows."""
    monkeypatch.setattr(judging, "DRAWN", 10)
    monkeypatch.setattr(judging, "KEPT", 10)


@pytest.mark.usefixtures("few")
def test_a_mutant_finds_what_lies_beside_the_users_file(tmp_path: Path) -> None:
    (tmp_path / "sizes.txt").write_text("60", encoding="utf-8")
    path = tmp_path / "mine.py"
    reads = 'OTHER_INSTRUCTIONS = int((Path(__file__).parent / "sizes.txt").read_text())'
    text = source_of("fa2").replace("OTHER_INSTRUCTIONS = 60", reads)
    path.write_text(text.replace("from typing", "from pathlib import Path\nfrom typing"), encoding="utf-8")
    name = f"{path}:FA2"
    (verdict,) = survey(name, [mutant_number(name, "yield v", "removed")], workers=1)
    assert verdict.outcome == KILLED


@pytest.mark.usefixtures("few")
def test_a_mutant_that_cannot_be_loaded_is_invalid(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"{source_of('fa2')}\n\ndef once():\n    yield 1\n\nif not list(once()): raise OSError('gone')\n")
    name = f"{path}:FA2"
    (verdict,) = survey(name, [mutant_number(name, "yield 1", "removed")], workers=1)
    assert (verdict.outcome, verdict.how) == (INVALID, f"{path} cannot be run: OSError: gone")


@pytest.mark.usefixtures("few")
def test_what_fails_unchanged_is_to_be_checked_first(tmp_path: Path) -> None:
    path = tmp_path / "not awaited.py"
    path.write_text(source_of("fa2").replace("                yield v\n", ""), encoding="utf-8")
    with pytest.raises(Race) as failed:
        list(survey(f"{path}:FA2", [0], workers=1))
    assert failed.value.__notes__ == [f"the schedule fails as it is: run flashsim check '{path}:FA2' first"]
    assert pickle.loads(pickle.dumps(failed.value)).__notes__ == failed.value.__notes__
    assert failed.value.memory is None


def test_what_accepts_nothing_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = source_of("fa2").replace("        lines = []\n", "        lines = ['never']\n")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="accepts none of the problems and switches"):
        list(survey(f"{path}:FA2", [0], workers=1))


@pytest.mark.usefixtures("few")
def test_a_mutant_that_cannot_run_is_invalid(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = source_of("fa2").replace(
        "                yield v\n", "                done = v\n                yield done\n"
    )
    path.write_text(text, encoding="utf-8")
    name = f"{path}:FA2"
    (verdict,) = survey(name, [mutant_number(name, "yield done", "earlier")], workers=1)
    assert verdict.outcome == INVALID
    assert "done" in verdict.how


def test_a_line_that_no_example_runs_is_said_to_be_so(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = source_of("fa2").replace(
        "        for tile in wg.tiles():\n",
        f"        if s is r:\n            yield s\n{LOOP}",
    )
    path.write_text(text, encoding="utf-8")
    (verdict,) = survey(f"{path}:FA2", [0], workers=1)
    assert verdict.outcome == NOT_RUN
    assert not Survey("mine", (verdict,)).passed


def test_a_survey_with_a_survivor_has_not_passed() -> None:
    verdict = Verdict("mine.py", "program", 1, "yield q", "removed", SURVIVED, "", 16)
    assert not Survey("mine", (verdict,)).passed
    assert Survey("mine", (verdict,)).to_json()["counts"]["survived"] == 1
    assert survey_lines(Survey("mine", (verdict,))) == ["mine: 1 mutants: 0 killed, 1 survived", SAY_WHY]


def test_half_a_survey_has_not_passed() -> None:
    verdict = Verdict("mine.py", "program", 1, "yield q", "removed", KILLED, "Race", 1)
    assert Survey("mine", (verdict,)).passed
    assert not Survey("mine", (verdict,), complete=False).passed
    assert survey_lines(Survey("mine", (verdict,))) == ["mine: 1 mutants: 1 killed"]
