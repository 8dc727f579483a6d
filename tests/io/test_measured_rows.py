"""The measured-row schema: what its blanks mean, and that every broken row is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsim.errors import InputError
from flashsim.io.measured import COLUMNS, MeasuredRow, option_text, read_measured, read_sessions, std_flops

CALIBRATION = Path(__file__).parents[2] / "scenarios" / "measured" / "calibration.csv"

GOOD = {
    "id": "a",
    "session": "s",
    "source": "a paper",
    "device": "h100-sxm5",
    "clock_mhz": "1500",
    "schedule": "fa3",
    "options": "build=2024-07;pingpong=false",
    "direction": "fwd",
    "dtype": "fp16",
    "batch": "4",
    "heads_q": "16",
    "heads_kv": "4",
    "seqlen_q": "8448",
    "seqlen_k": "8448",
    "head_dim": "128",
    "head_dim_v": "64",
    "mask": "full",
    "dropout": "0.1",
    "time_us": "3540",
    "tflops": "",
    "flop_convention": "std",
    "value_kind": "table",
    "notes": "",
}
FLOPS = 2 * 4 * 16 * 8448 * 8448 * (128 + 64)


def write(folder: Path, *rows: dict[str, str], header: tuple[str, ...] = COLUMNS) -> Path:
    path = folder / "rows.csv"
    lines = [",".join(header), *(",".join(row[name] for name in header) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_one(folder: Path, **changes: str) -> MeasuredRow:
    (row,) = read_measured(write(folder, GOOD | changes))
    return row


def problems(folder: Path, **changes: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_one(folder, **changes)
    return list(caught.value.problems)


def test_every_calibration_row_reads() -> None:
    rows = read_measured(CALIBRATION)
    assert len(rows) == 210
    assert len({row.id for row in rows}) == 210
    assert sum(row.clock_mhz == 1500 for row in rows) == 12
    assert set(read_sessions(CALIBRATION.parent / "sessions.toml")) == {row.session for row in rows}


def test_a_row_field_by_field(tmp_path: Path) -> None:
    row = read_one(tmp_path)
    assert row.clock_mhz == 1500.0
    assert row.options == {"build": "2024-07", "pingpong": "false"}
    assert (row.heads_q, row.heads_kv, row.head_dim, row.head_dim_v) == (16, 4, 128, 64)
    assert (row.dropout, row.time_us, row.tflops) == (0.1, 3540.0, None)


def test_what_blanks_mean(tmp_path: Path) -> None:
    row = read_one(tmp_path, clock_mhz="", dropout="", heads_kv="", head_dim_v="", options="", time_us="", tflops="600")
    assert row.clock_mhz is None
    assert row.dropout == 0
    assert row.heads_kv == row.heads_q == 16
    assert row.head_dim_v == row.head_dim == 128
    assert row.options == {}
    assert row.time_us is None


@pytest.mark.parametrize(
    "column",
    sorted(set(COLUMNS) - {"clock_mhz", "dropout", "heads_kv", "head_dim_v", "options", "time_us", "tflops", "notes"}),
)
def test_no_other_column_may_be_blank(tmp_path: Path, column: str) -> None:
    (line,) = problems(tmp_path, **{column: ""})
    assert column in line or column == "id"


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    path = write(tmp_path, GOOD, header=tuple(name for name in COLUMNS if name != column))
    with pytest.raises(InputError) as caught:
        read_measured(path)
    assert caught.value.problems == (f"{path}:1: column {column!r} is missing",)


def test_a_column_of_the_users_own_is_let_be(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {"power_w": "650"}, header=(*COLUMNS, "power_w"))
    assert len(read_measured(path)) == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batch": "four"}, "batch: 'four' is not a whole number"),
        ({"batch": "4.5"}, "batch: '4.5' is not a whole number"),
        ({"batch": "1e3"}, "batch: '1e3' is not a whole number"),
        ({"batch": "0"}, "batch: 0 is not between 1 and"),
        ({"seqlen_q": "-8"}, "seqlen_q: -8 is not between 1 and"),
        ({"seqlen_k": "9" * 5000}, "is not between 1 and"),
        ({"heads_kv": "3"}, "heads_kv: 3 does not divide heads_q = 16"),
        ({"clock_mhz": "1.5"}, "clock_mhz: 1.5 is not between"),
        ({"clock_mhz": "nan"}, "clock_mhz: nan is not a finite number"),
        ({"time_us": "0"}, "time_us: 0 is not above 0"),
        ({"time_us": "inf"}, "time_us: inf is not a finite number"),
        ({"time_us": "fast"}, "time_us: 'fast' is not a number"),
        ({"time_us": ""}, "time_us and tflops: both are blank"),
        ({"time_us": "", "tflops": "600", "flop_convention": "with softmax"}, "time_us: is blank"),
        ({"dropout": "1"}, "dropout: 1 is not in [0, 1)"),
        ({"options": "build"}, "options: 'build' is not key=value"),
        ({"options": "build=1;build=2"}, "options: 'build' is set twice"),
        ({"value_kind": "tabel"}, "value_kind: unknown value kind 'tabel', did you mean 'table'?"),
    ],
)
def test_a_broken_row_is_named_by_line_and_id(tmp_path: Path, changes: dict[str, str], complaint: str) -> None:
    (line,) = problems(tmp_path, **changes)
    assert line.startswith(f"{tmp_path / 'rows.csv'}:2 (a): ")
    assert complaint in line


def test_every_broken_row_is_named(tmp_path: Path) -> None:
    rows = [GOOD | {"id": "a", "batch": "x"}, GOOD | {"id": "b"}, GOOD | {"id": "c", "heads_q": "0", "time_us": "-1"}]
    path = write(tmp_path, *rows, GOOD | {"id": "b"})
    with path.open("a", encoding="utf-8") as stream:
        stream.write("d,too,few\n")
    with pytest.raises(InputError) as caught:
        read_measured(path)
    places = [line.removeprefix(f"{path}:").split(": ")[:2] for line in caught.value.problems]
    assert places == [
        ["2 (a)", "batch"],
        ["4 (c)", "heads_q"],
        ["4 (c)", "time_us"],
        ["5 (b)", "id"],
        ["6 (d)", "has 3 values, the header has 23"],
    ]


@pytest.mark.parametrize(("factor", "reads"), [(1.0, True), (1.05, True), (0.95, True), (1.07, False), (0.93, False)])
def test_time_and_rate_may_differ_by_rounding_only(tmp_path: Path, factor: float, reads: bool) -> None:
    tflops = f"{FLOPS / 3540e6 * factor:.3f}"
    if reads:
        assert read_one(tmp_path, tflops=tflops).time_us == 3540
    else:
        (line,) = problems(tmp_path, tflops=tflops)
        assert "disagree" in line


def test_another_flop_convention_may_differ(tmp_path: Path) -> None:
    assert read_one(tmp_path, tflops="1", flop_convention="with softmax").time_us == 3540


def test_a_rate_of_one_digit_is_not_held_to_six_percent(tmp_path: Path) -> None:
    """1 TFLOP/s in a table is anything from 0.5 to 1.5."""
    assert read_one(tmp_path, time_us=f"{FLOPS / 1.4e6:.0f}", tflops="1").tflops == 1


@pytest.mark.parametrize(
    ("direction", "mask", "flops"),
    [
        ("fwd", "full", FLOPS),
        ("fwd", "causal", FLOPS // 2),
        ("bwd", "full", 2 * 4 * 16 * 8448 * 8448 * (3 * 128 + 2 * 64)),
        ("fwd+bwd", "full", FLOPS + 2 * 4 * 16 * 8448 * 8448 * (3 * 128 + 2 * 64)),
        ("fwd", "blocks:nowhere.txt", None),
        ("sideways", "full", None),
    ],
)
def test_std_flops(tmp_path: Path, direction: str, mask: str, flops: int | None) -> None:
    assert std_flops(read_one(tmp_path, direction=direction, mask=mask)) == flops


@given(
    st.dictionaries(st.from_regex(r"[A-Za-z_]{1,8}", fullmatch=True), st.from_regex(r"[a-z0-9.-]{1,8}", fullmatch=True))
)
def test_options_survive_being_written(options: dict[str, str]) -> None:
    row = GOOD | {"options": option_text(options)}
    given_row = {name: value for name, value in row.items() if value}
    assert MeasuredRow.model_validate({"options": "", **given_row}, context={"text": True}).options == options


def test_switches_as_text_do_not_depend_on_order_or_type() -> None:
    assert option_text({"pingpong": False, "num_stages": 2}) == option_text({"num_stages": "2", "pingpong": "false"})


@pytest.mark.parametrize("content", ["", ",".join(COLUMNS) + "\n"])
def test_a_file_without_rows(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError):
        read_measured(path)


def test_an_unclosed_quote(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {"notes": '"never closed'})
    with pytest.raises(InputError, match="not valid CSV"):
        read_measured(path)


def test_sessions(tmp_path: Path) -> None:
    path = tmp_path / "sessions.toml"
    assert read_sessions(path) == {}
    path.write_text('[a]\nclock_mhz = 1500\ngpu = "x"\n[b]\n', encoding="utf-8")
    assert read_sessions(path) == {"a": {"clock_mhz": 1500, "gpu": "x"}, "b": {}}
    path.write_text("a = 3\n[b]\nclock_mhz = 1.5\n[c]\nclock_mhz = '1500'\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_sessions(path)
    assert len(caught.value.problems) == 3
