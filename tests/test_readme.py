"""What the README shows is what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from flashsim.cli import main
from flashsim.schedules import fa3

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for block in blocks("python") if "flashsim.simulate" in block]
    exec(compile(example, "README.md", "exec"), {})
    time_us, bound_by = capsys.readouterr().out.split()
    assert 1000 < float(time_us) < 10_000
    assert bound_by == "tensor"


def test_the_main_loop_is_that_of_fa3() -> None:
    (shown,) = [ast.parse(block) for block in blocks("python") if "kv_tiles" in block]
    module = ast.parse(Path(fa3.__file__).read_text(encoding="utf-8"))
    attend = next(node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == "attend")
    loop = next(ast.unparse(node) for node in attend.body if isinstance(node, ast.For))
    # What only the older build, or a run without a producer, does is left out of the README.
    rest = re.sub(r" +yield from self\.refill\(.*\)\n", "", loop)
    rest = re.sub(r" +if rescale_early:\n.*\n", "", rest).replace("    if not rescale_early:\n        ", "    ")
    assert ast.unparse(shown) == rest


def test_a_check_of_the_loop_without_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (shown,) = [block for block in blocks("console") if "check my_fa3.py" in block]
    text = Path(fa3.__file__).read_text(encoding="utf-8")
    assert text.count("            yield pv  # 14\n") == 1
    monkeypatch.chdir(tmp_path)
    Path("my_fa3.py").write_text(text.replace("            yield pv  # 14\n", ""), encoding="utf-8")
    command, _, expected = shown.partition("\n")
    assert main(command.split()[2:]) == 1
    # Which example is the first to fail is Hypothesis's own affair, and another one's in another version.
    number = re.compile(r"in example \d+$", flags=re.MULTILINE)
    assert number.sub("", capsys.readouterr().out) == number.sub("", expected)


def test_the_scenario_reads(tmp_path: Path) -> None:
    from flashsim.io.scenario import read_scenario

    (example,) = blocks("toml")
    path = tmp_path / "scenario.toml"
    path.write_text(example, encoding="utf-8")
    assert [case.measured is not None for case in read_scenario(str(path)).cases] == [True, False]


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
