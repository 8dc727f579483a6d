"""Scenario files: which cases they mean, which measurement stands beside which case, and how mistakes are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsim.errors import InputError
from flashsim.io.measured import COLUMNS
from flashsim.io.scenario import Scenario, read_scenario

CASE = """
[case]
gpu = "h100-sxm5"
schedule = "fa3"
batch = 4
heads = 16
seqlen = 512
head_dim = 128
"""


def read(folder: Path, text: str) -> Scenario:
    path = folder / "scenario.toml"
    path.write_text(text, encoding="utf-8")
    return read_scenario(path)


def problems(folder: Path, text: str) -> list[str]:
    """The complaints about a scenario, without its path."""
    with pytest.raises(InputError) as caught:
        read(folder, text)
    prefix = f"{folder / 'scenario.toml'}: "
    assert all(line.startswith(prefix) for line in caught.value.problems), caught.value.problems
    return [line.removeprefix(prefix) for line in caught.value.problems]


def test_a_case_alone_is_one_case(tmp_path: Path) -> None:
    scenario = read(tmp_path, CASE)
    (only,) = scenario.cases
    assert only.case.problem.heads_kv == 16
    assert only.case.options == {}
    assert only.case.clock_mhz is None
    assert only.measured is None


def test_a_grid_is_the_product_in_the_order_of_the_file(tmp_path: Path) -> None:
    scenario = read(tmp_path, CASE + '[grid]\nmask = ["full", "causal"]\nseqlen = [512, 1024, 2048]\n')
    found = [(case.case.problem.mask, case.case.problem.seqlen_q) for case in scenario.cases]
    assert found == [(mask, seqlen) for mask in ("full", "causal") for seqlen in (512, 1024, 2048)]
    assert scenario.grids[0].varying == ("mask", "seqlen")


def test_a_grid_overrides_the_case_and_sets_are_merged(tmp_path: Path) -> None:
    text = (
        CASE + 'set = { build = "2024-07", pingpong = true }\n[grid]\nbatch = [8]\nset = [{}, { pingpong = false }]\n'
    )
    scenario = read(tmp_path, text)
    assert [case.case.problem.batch for case in scenario.cases] == [8, 8]
    assert [case.case.options for case in scenario.cases] == [
        {"build": "2024-07", "pingpong": True},
        {"build": "2024-07", "pingpong": False},
    ]


def test_several_grids_follow_one_another(tmp_path: Path) -> None:
    text = CASE + '[[grid]]\nschedule = ["fa2"]\nseqlen = [512, 1024]\n[[grid]]\nset = [{ build = "2024-07" }]\n'
    scenario = read(tmp_path, text)
    assert [case.case.schedule.name() for case in scenario.cases] == ["fa2", "fa2", "fa3"]
    assert [grid.count for grid in scenario.grids] == [2, 1]


def test_tokens_and_hidden_stand_for_batch_and_heads(tmp_path: Path) -> None:
    text = '[case]\ngpu = "h100-sxm5"\nschedule = "fa2"\ntokens = 16384\nhidden = 2048\n'
    scenario = read(tmp_path, text + "[grid]\nhead_dim = [64, 128]\nseqlen = [512, 16384]\n")
    found = [(case.case.problem.batch, case.case.problem.heads_q) for case in scenario.cases]
    assert found == [(32, 32), (1, 32), (32, 16), (1, 16)]


def test_the_names_of_measured_rows_mean_the_same(tmp_path: Path) -> None:
    text = '[case]\ndevice = "h100-sxm5"\nschedule = "fa2"\nbatch = 1\nhead_dim = 64\n'
    problem = read(tmp_path, text + "heads_q = 8\nheads_kv = 2\nseqlen_q = 512\n").cases[0].case.problem
    assert (problem.heads_q, problem.heads_kv, problem.seqlen_q) == (8, 2, 512)


def test_relative_paths_start_at_the_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashsim import devices

    source = Path(devices.__file__).parent / "h100-sxm5.toml"
    (tmp_path / "mine.toml").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir("/")
    scenario = read(tmp_path, CASE.replace("h100-sxm5", "./mine.toml"))
    assert scenario.cases[0].case.gpu.name == "h100-sxm5"


MEASURED = '[[measured]]\nseqlen = 1024\ntflops = 500\nsource = "a paper"\n'
GRID = "[grid]\nseqlen = [512, 1024]\n"


def test_a_measurement_goes_to_the_case_that_its_keys_single_out(tmp_path: Path) -> None:
    first, second = read(tmp_path, CASE + GRID + MEASURED).cases
    assert first.measured is None
    assert second.measured is not None
    assert second.measured.source == "a paper"
    assert second.measured.time_us == pytest.approx(second.case.problem.flops / 500e6)


def test_a_measured_time_gives_the_rate(tmp_path: Path) -> None:
    case = read(tmp_path, CASE + '[[measured]]\ntime_us = 100\nsource = "a paper"\n').cases[0]
    assert case.measured is not None
    assert case.measured.tflops == pytest.approx(case.case.problem.flops / 100e6)


def test_an_empty_set_means_the_case_whose_grid_sets_nothing(tmp_path: Path) -> None:
    """As in the ablation: `set = {}` is a case of its own and no wildcard."""
    text = CASE + 'set = { build = "2024-07" }\n[grid]\nset = [{}, { pingpong = false }]\n'
    text += '[[measured]]\nset = {}\ntflops = 600\nsource = "a"\n'
    text += '[[measured]]\nset = { build = "2024-07", pingpong = false }\ntflops = 500\nsource = "b"\n'
    assert [case.measured.source for case in read(tmp_path, text).cases if case.measured] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[[measured]]\ntflops = 500\nsource = "x"\n', "measured[1]: its keys match 2 cases, not exactly one"),
        ('[[measured]]\nseqlen = 7\ntflops = 500\nsource = "x"\n', "measured[1]: its keys match 0 cases"),
        ("[[measured]]\nseqlen = 512\ntflops = 500\n", "measured[1].source: is required"),
        ('[[measured]]\nseqlen = 512\nsource = "x"\n', "measured[1]: tflops or time_us is required"),
        ('[[measured]]\nseqlen = 512\ntflop = 5\nsource = "x"\n', "did you mean 'tflops'?"),
        ('[[measured]]\nseqlen = 512\ntflops = -5\nsource = "x"\n', "measured[1].tflops: -5 is not above 0"),
        ('[[measured]]\nseqlen = 512\ntflops = 500\ntime_us = 1\nsource = "x"\n', "disagree"),
        (MEASURED + MEASURED, "measured[2]: seqlen 1024 has a measurement already"),
        ('[[published]]\nseqlen = 7\ndatasheet_fraction = 0.5\nsource = "x"\n', "published[1]: its keys match no case"),
        ('[[published]]\ndatasheet_fraction = 75\nsource = "x"\n', "75 is not a fraction above 0 and up to 1"),
        ('[measured_from]\nfile = "none.csv"\n', "measured_from.file: "),
    ],
)
def test_a_measurement_that_fits_no_case_is_a_mistake(tmp_path: Path, text: str, complaint: str) -> None:
    (line,) = problems(tmp_path, CASE + GRID + text)
    assert complaint in line


ROW = {
    "session": "s",
    "source": "a paper",
    "device": "h100-sxm5",
    "schedule": "fa3",
    "direction": "fwd",
    "dtype": "fp16",
    "batch": "4",
    "heads_q": "16",
    "seqlen_q": "512",
    "seqlen_k": "512",
    "head_dim": "128",
    "mask": "full",
    "tflops": "500",
    "flop_convention": "std",
    "value_kind": "table",
}


def write_rows(folder: Path, *changes: dict[str, str]) -> None:
    rows = [{"id": f"r{number}", **ROW, **change} for number, change in enumerate(changes)]
    lines = [",".join(COLUMNS), *(",".join(row.get(name, "") for name in COLUMNS) for row in rows)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


FROM = '[measured_from]\nfile = "rows.csv"\n'


@pytest.mark.parametrize(
    ("case", "row", "joins"),
    [
        ("", {}, True),
        ("", {"device": "h100-pcie"}, False),
        ("", {"schedule": "fa2"}, False),
        ("", {"mask": "causal"}, False),
        ("", {"dtype": "bf16"}, False),
        ("", {"heads_kv": "4"}, False),
        ("", {"seqlen_k": "1024"}, False),
        ("", {"options": "pingpong=false"}, False),
        ("set = { pingpong = false, build = '2024-07' }\n", {"options": "build=2024-07; pingpong=false"}, True),
        ("", {"clock_mhz": "1500"}, False),
        ("clock_mhz = 1500\n", {"clock_mhz": "1500"}, True),
        ("clock_mhz = 1500\n", {}, True),
    ],
)
def test_a_row_joins_the_case_of_which_it_has_every_key(
    tmp_path: Path, case: str, row: dict[str, str], joins: bool
) -> None:
    write_rows(tmp_path, row)
    if joins:
        measured = read(tmp_path, CASE + case + FROM).cases[0].measured
        assert measured is not None
        assert (measured.tflops, measured.id) == (500, "r0")
    else:
        assert problems(tmp_path, CASE + case + FROM) == ["measured_from: no row of the file has all keys of a case"]


def test_two_rows_for_one_case_need_a_session(tmp_path: Path) -> None:
    write_rows(tmp_path, {}, {"session": "t", "tflops": "600"})
    (line,) = problems(tmp_path, CASE + FROM)
    assert "rows r0, r1 are all of one case" in line
    measured = read(tmp_path, CASE + FROM + 'session = "t"\n').cases[0].measured
    assert measured is not None
    assert measured.tflops == 600
    (line,) = problems(tmp_path, CASE + FROM + 'session = "u"\n')
    assert line.startswith("measured_from.session: unknown session 'u'")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("h100-sxm5", "h100-sxm", "case.gpu: unknown GPU 'h100-sxm', did you mean 'h100-sxm5'?"),
        ('"fa3"', '"fa33"', "case.schedule: unknown schedule 'fa33', did you mean 'fa3'?"),
        ("seqlen =", "seq_len =", "case: unknown key 'seq_len', did you mean 'seqlen'?"),
        ("512", "0", "case.seqlen: got 0, must be"),
        ("512", "-1", "case.seqlen: got -1, must be"),
        ("512", "nan", "case.seqlen: got nan, must be"),
        ("512", "1e3", "case.seqlen: got 1000.0, must be"),
        ("512", '"512"', "case.seqlen: got '512', must be"),
        ("512", "true", "case.seqlen: got True, must be"),
        ("512", "99999999999999999999", "case.seqlen: got 99999999999999999999, must be"),
        ("512", "[512]", "case.seqlen: got [512], must be"),
        ("heads = 16", "heads = 16\nkv_heads = 3", "case.kv_heads: got 3, must divide heads_q = 16"),
        ("heads = 16", "heads = 16\nheads_q = 16", "case.heads_q: means the same as heads"),
        ("heads = 16", 'heads = 16\nmask = "cosual"', "case.mask: unknown mask 'cosual', did you mean 'causal'?"),
        ("heads = 16", "heads = 16\nmask = 1", "case.mask: 1 is not text"),
        ("heads = 16", "heads = 16\nclock_mhz = 1.8", "case.clock_mhz: 1.8 is not between 100 and 10000 MHz"),
        ("heads = 16", "heads = 16\nset = { bild = 1 }", "unknown switch of fa3 'bild', did you mean 'build'?"),
        ("heads = 16", "heads = 16\nset = { pingpong = [] }", "case.set.pingpong: [] is not text"),
        ("heads = 16", "heads = 16\nset = 3", "case.set: 3 should be a valid dictionary"),
        ("heads = 16", "heads = 16\ntokens = 4096", "case.tokens: batch is given too"),
        ("batch = 4", "tokens = 4100", "case.tokens: 4100 is not a multiple of seqlen = 512"),
        ("batch = 4\n", "", "case.batch: is required"),
        ("h100-sxm5", "a100-sxm4-80gb", "schedule fa3 does not run on ampere"),
    ],
)
def test_each_mistake_is_one_line(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    (line,) = problems(tmp_path, CASE.replace(old, new))
    assert complaint in line
    assert "\n" not in line


def test_all_mistakes_are_found_at_once(tmp_path: Path) -> None:
    text = """
titel = "x"
[case]
gpu = "h100"
schedule = "fa33"
batch = 0
heads = 16
kv_heads = 3
mask = "cosual"
[grid]
head_dim = [64, 0]
seqlen = 512
clock_mhz = [1500, 1]
[[measured]]
tflops = 0
"""
    found = problems(tmp_path, text)
    places = (
        "unknown key 'titel'",
        "case.gpu",
        "case.schedule",
        "case.batch",
        "case.kv_heads",
        "case.mask",
        "grid.head_dim: got 0",
        "grid.seqlen: 512 is not a list",
        "grid.clock_mhz[2]",
        "measured[1].tflops",
        "measured[1].source",
    )
    assert [place for place in places if not any(place in line for line in found)] == []
    assert len(found) == len(places)


def test_a_mistake_of_many_cases_is_one_line(tmp_path: Path) -> None:
    text = CASE.replace("h100-sxm5", "a100-sxm4-80gb") + "[grid]\nseqlen = [512, 1024, 2048]\n"
    (line,) = problems(tmp_path, text)
    assert line.startswith("seqlen 512 (and 2 more cases): schedule fa3 does not run on ampere")


def test_a_grid_beyond_reason_is_refused_before_it_is_built(tmp_path: Path) -> None:
    many = ", ".join(map(str, range(1, 1001)))
    (line,) = problems(tmp_path, CASE + f"[grid]\nseqlen = [{many}]\nbatch = [{many}]\n")
    assert line == "grid: 1000000 cases, at most 10000 are allowed"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"[case", "not valid TOML"), (b"\xff\xfe", "not UTF-8"), (b"case = 3", "case: 3 is not a table")],
)
def test_a_file_that_is_no_scenario(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "scenario.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        read_scenario(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_scenario(tmp_path / "none.toml")
    with pytest.raises(InputError, match="cannot be read"):
        read_scenario(tmp_path)
