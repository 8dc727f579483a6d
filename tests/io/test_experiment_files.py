"""Scenario files of the FP8 error experiment: what they mean, and one line for every mistake in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsim.errors import InputError
from flashsim.io.experiment import VARIANTS, ErrorScenario, Experiment, is_experiment, read_experiment
from flashsim.io.scenario import read_scenario

PUBLISHED = '[[published]]\nvariant = "fp8-fa3"\nrmse = 9.1e-3\nsource = "a paper"\n'


def read(folder: Path, text: str) -> ErrorScenario:
    path = folder / "scenario.toml"
    path.write_text(text, encoding="utf-8")
    assert is_experiment(path)
    return read_experiment(path)


def problems(folder: Path, text: str) -> list[str]:
    """The complaints about a scenario, without its path."""
    with pytest.raises(InputError) as caught:
        read(folder, text)
    prefix = f"{folder / 'scenario.toml'}: "
    assert all(line.startswith(prefix) for line in caught.value.problems), caught.value.problems
    return [line.removeprefix(prefix) for line in caught.value.problems]


def test_what_is_left_out_is_the_paper_s_experiment(tmp_path: Path) -> None:
    scenario = read(tmp_path, "[fp8_error]\n")
    assert scenario.experiment == Experiment(
        seqlen=8192, head_dim=128, heads=4, seeds=5, rows=512, BLOCK_M=128, BLOCK_N=224, variants=list(VARIANTS)
    )
    assert (scenario.title, dict(scenario.published)) == ("", {})


def test_every_key_is_read(tmp_path: Path) -> None:
    text = 'title = "T"\n[fp8_error]\nseqlen = 1\nhead_dim = 2\nheads = 3\nseeds = 4\nrows = 5\nBLOCK_M = 6\n'
    scenario = read(tmp_path, text + 'BLOCK_N = 7\nvariants = ["fp8-fa3", "fp16-fa3"]\n' + PUBLISHED)
    assert list(scenario.experiment.model_dump().values()) == [1, 2, 3, 4, 5, 6, 7, ["fp8-fa3", "fp16-fa3"]]
    assert scenario.title == "T"
    (entry,) = scenario.published.values()
    assert (entry.variant, entry.rmse, entry.source) == ("fp8-fa3", 9.1e-3, "a paper")


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    text = """
        title = 3
        gird = 1
        case = {}
        [fp8_error]
        seqlen = 0
        head_dim = 257
        heads = "4"
        seeds = 2.0
        row = 512
        BLOCK_M = true
        variants = ["fp16-fa3", "fp8-fa33", 7]
        [[published]]
        variant = "fp8_fa3"
        rmse = -1
        [[published]]
        variant = "fp8-fa3"
        rmse = "nan"
        source = " "
    """
    names = ", ".join(VARIANTS)
    assert sorted(problems(tmp_path, text)) == sorted(
        [
            "unknown key 'gird' (allowed: title, fp8_error, published)",
            "case: does not go with fp8_error",
            "title: 3 is not text",
            "fp8_error.seqlen: 0 is not between 1 and 1048576",
            "fp8_error.head_dim: 257 is not between 1 and 256",
            "fp8_error.heads: '4' is not a whole number",
            "fp8_error.seeds: 2.0 is not a whole number",
            "fp8_error: unknown key 'row', did you mean 'rows'? "
            "(allowed: seqlen, head_dim, heads, seeds, rows, BLOCK_M, BLOCK_N, variants)",
            "fp8_error.BLOCK_M: True is not a whole number",
            f"fp8_error.variants[2]: unknown variant 'fp8-fa33', did you mean 'fp8-fa3'? (allowed: {names})",
            f"fp8_error.variants[3]: 7 is not text (allowed: {names})",
            f"published[1].variant: unknown variant 'fp8_fa3', did you mean 'fp8-fa3'? (allowed: {names})",
            "published[1].rmse: -1 is not above 0",
            "published[1].source: is required",
            "published[2].rmse: 'nan' is not a number",
            "published[2].source: is blank",
        ]
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fp8_error = 3\n", "fp8_error: 3 is not a table"),
        ("[[fp8_error]]\n", "fp8_error: [{}] is not a table"),
        ("[fp8_error]\nvariants = []\n", f"fp8_error.variants: is empty (allowed: {', '.join(VARIANTS)})"),
        ("[fp8_error]\nvariants = 'fp8-fa3'\n", "fp8_error.variants: 'fp8-fa3' should be a valid list"),
        (
            '[fp8_error]\nvariants = ["fp8-fa3", "fp16-fa3", "fp8-fa3"]\n',
            "fp8_error.variants[3]: 'fp8-fa3' is there already",
        ),
        (
            "[fp8_error]\nseqlen = 1048576\nheads = 256\n",
            "fp8_error: seqlen * heads * head_dim is 34359738368, at most 33554432 are allowed",
        ),
        ("published = 3\n[fp8_error]\n", "published: 3 is not a table"),
        (
            "[fp8_error]\n" + PUBLISHED + PUBLISHED,
            "published[2].variant: 'fp8-fa3' has a published value already",
        ),
        (
            '[fp8_error]\nvariants = ["fp16-fa3"]\n' + PUBLISHED,
            "published[1].variant: 'fp8-fa3' is not in fp8_error.variants",
        ),
    ],
)
def test_a_mistake(tmp_path: Path, text: str, complaint: str) -> None:
    assert problems(tmp_path, text) == [complaint]


def test_other_scenarios_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text("[fp8_eror]\n", encoding="utf-8")
    assert not is_experiment(path)
    with pytest.raises(InputError, match="unknown key 'fp8_eror', did you mean 'fp8_error'\\?"):
        read_scenario(path)
    path.write_text("[fp8_error]\n", encoding="utf-8")
    with pytest.raises(InputError, match="fp8_error: is another kind of scenario, without cases"):
        read_scenario(path)
    with pytest.raises(InputError, match="no such file"):
        is_experiment(tmp_path / "none.toml")
