"""A schedule is found by name, or in a file of the user's, which works in the same way."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from flashsim import schedules
from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import InputError
from flashsim.problem import AttentionProblem
from flashsim.schedules import Schedule, load_schedule, schedule_names
from flashsim.simulate import simulate

FOLDER = Path(schedules.__file__).parent
SMALL = AttentionProblem(batch=1, heads_q=2, heads_kv=1, seqlen_q=200, seqlen_k=333, head_dim=64, mask="causal")
ONE_CLASS = """
from dataclasses import dataclass
from flashsim.schedules.base import Schedule

@dataclass(frozen=True)
class Mine(Schedule):
    pass
"""


def two_sms() -> DeviceSpec:
    device = load_device("h100-sxm5")
    return dataclasses.replace(device, sm=dataclasses.replace(device.sm, count=2))


def refused(name: str) -> str:
    with pytest.raises(InputError) as error:
        load_schedule(name)
    (line,) = error.value.problems
    return line


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", schedule_names())
def test_every_built_in_schedule_is_there(name: str) -> None:
    kind = load_schedule(name)
    assert issubclass(kind, Schedule)
    assert kind.name() == name
    assert kind.title
    assert kind.source


@pytest.mark.parametrize("schedule", ["fa2", "fa3"])
def test_a_copy_elsewhere_is_the_same_schedule(schedule: str, tmp_path: Path) -> None:
    """Equal ticks, events and errors: nothing about a schedule hangs on where its file lies."""
    copy = shutil.copy(FOLDER / f"{schedule}.py", tmp_path / "elsewhere.py")
    ours = simulate(SMALL, schedule, two_sms(), functional=True)
    theirs = simulate(SMALL, f"{copy}:{schedule.upper()}", two_sms(), functional=True)
    assert theirs == ours
    assert np.isfinite(ours.time_us)


def test_the_only_class_of_a_file_needs_no_name(tmp_path: Path) -> None:
    copy = shutil.copy(FOLDER / "fa2.py", tmp_path / "copy.py")
    assert load_schedule(str(copy)).__name__ == "FA2"
    assert load_schedule(str(written(tmp_path, ONE_CLASS))).name() == "mine"


def test_a_schedule_that_is_only_imported_is_not_the_files_own(tmp_path: Path) -> None:
    text = ONE_CLASS + "\nfrom flashsim.schedules.fa2 import FA2\n"
    assert load_schedule(str(written(tmp_path, text))).__name__ == "Mine"


def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    path = written(tmp_path, ONE_CLASS)
    assert load_schedule(str(path)).title == ""
    longer = ONE_CLASS.replace("    pass", "    title = 'the second version'")
    assert load_schedule(str(written(tmp_path, longer))).title == "the second version"


def test_an_unknown_name_is_told_the_nearest() -> None:
    allowed = "standard, fa1, fa2, fa3, split_kv, path/to/file.py:Class"
    assert refused("standart") == f"unknown schedule 'standart', did you mean 'standard'? (allowed: {allowed})"


@pytest.mark.parametrize("name", ["", "fa3.txt", "fa3:FA3", "."])
def test_what_is_neither_a_name_nor_a_file(name: str) -> None:
    assert refused(name).startswith(f"unknown schedule {name!r}")


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.py"
    for name in (f"{path}", f"{path}:FA3"):
        assert refused(name) == f"schedule file {path} does not exist"


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder.py"
    folder.mkdir()
    assert refused(str(folder)) == f"schedule file {folder} does not exist"


def test_a_file_that_python_cannot_read(tmp_path: Path) -> None:
    path = written(tmp_path, "def f(:\n")
    assert refused(str(path)).startswith(f"schedule file {path} cannot be run: SyntaxError: ")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.py"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert refused(str(path)).startswith(f"schedule file {path} cannot be run: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_file_that_fails(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    assert refused(str(path)) == f"schedule file {path} cannot be run: {message}"


def test_a_file_without_a_schedule(tmp_path: Path) -> None:
    path = written(tmp_path, "class FA3: pass\n")
    assert refused(str(path)) == f"{path} has 0 schedule classes (none); name one: {path}:Class"
    assert refused(f"{path}:FA3") == f"{path}: unknown schedule class 'FA3' (allowed: none)"


def test_a_file_with_two_schedules(tmp_path: Path) -> None:
    path = written(tmp_path, ONE_CLASS + "\nclass Other(Mine):\n    pass\n")
    assert refused(str(path)) == f"{path} has 2 schedule classes (Mine, Other); name one: {path}:Class"
    assert load_schedule(f"{path}:Other").__name__ == "Other"
    assert (
        refused(f"{path}:Othr")
        == f"{path}: unknown schedule class 'Othr', did you mean 'Other'? (allowed: Mine, Other)"
    )


def test_simulate_says_it_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        simulate(SMALL, str(tmp_path / "nowhere.py"), two_sms())


def test_two_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    """Each keeps its own switches, though Python files modules under one name."""
    for folder, name in (("a", "early"), ("b", "late")):
        (tmp_path / folder).mkdir()
        text = ONE_CLASS.replace("Schedule\n\n@", "Schedule, switch\n\n@").replace(
            "    pass", f"    {name}: bool = switch(True, '?')"
        )
        written(tmp_path / folder, text)
    first, second = (load_schedule(str(tmp_path / folder / "mine.py")) for folder in ("a", "b"))
    assert [s.name for s in first.switches()] == ["BLOCK_M", "BLOCK_N", "pack_gqa", "early"]
    assert [s.name for s in second.switches()] == ["BLOCK_M", "BLOCK_N", "pack_gqa", "late"]
