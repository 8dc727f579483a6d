"""Device files: what the built-in ones hold, and what is refused in a user's."""

import copy
import dataclasses
import pickle
import re
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from flashsim.devices import DeviceSpec, device_names, load_device
from flashsim.devices.load import STATUSES
from flashsim.devices.spec import SECTIONS
from flashsim.errors import InputError

HOPPER = ("h100-pcie", "h100-sxm5", "h200-sxm")
NAMES = ("a100-pcie-80gb", "a100-sxm4-40gb", "a100-sxm4-80gb", *HOPPER, "l4")


def built_in_text(name: str) -> str:
    return (resources.files("flashsim.devices") / f"{name}.toml").read_text(encoding="utf-8")


def edited(key: str, line: str, name: str = "h100-sxm5") -> str:
    """The device's file with the one line that sets `key` replaced."""
    text, count = re.subn(rf"(?m)^{key} = .*$", lambda _: line, built_in_text(name))
    assert count == 1, f"{key} is not set exactly once in {name}"
    return text


def entry(key: str, value: str, status: str = "assumed", source: str = "a note in our lab book") -> str:
    return f'{key} = {{ value = {value}, status = "{status}", source = "{source}" }}'


def load_text(tmp_path: Path, text: str | bytes) -> DeviceSpec:
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_device(str(path))


def problems_of(tmp_path: Path, text: str | bytes) -> list[str]:
    with pytest.raises(InputError) as refused:
        load_text(tmp_path, text)
    prefix = f"{tmp_path / 'mine.toml'}: "
    assert all(problem.startswith(prefix) for problem in refused.value.problems)
    return [problem.removeprefix(prefix) for problem in refused.value.problems]


def test_device_names_are_the_files():
    assert device_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_built_in_device_is_cited(name: str):
    device = load_device(name)
    assert device.name == name
    assert device.citations.keys() == device.numbers().keys()
    for key, citation in device.citations.items():
        assert citation.value == device.numbers()[key]
        assert citation.status in STATUSES
        assert len(citation.source) > 10, key


@pytest.mark.parametrize("name", NAMES)
def test_derived_fitted_and_assumed_numbers_say_how(name: str):
    silent = [
        key
        for key, citation in load_device(name).citations.items()
        if citation.status in ("derived", "fitted", "assumed") and len(citation.note) < 10
    ]
    assert silent == []


@pytest.mark.parametrize("name", NAMES)
def test_numbers_agree_with_each_other(name: str):
    device = load_device(name)
    peak = device.tensor.fp16_flop_per_clk * device.sm.count * device.clock.datasheet_mhz * 1e6
    assert peak == pytest.approx(device.tensor.fp16_tflops * 1e12, rel=0.01)
    assert device.library.gemm_flop_per_ns * 1e9 < peak
    # One warp per sub-partition issuing mma.sync m16n8k16 (4096 FLOP) cannot beat the tensor cores.
    mma_sync = device.sm.sub_partitions * 2 * 16 * 8 * 16 / device.tensor.mma_sync_clk
    assert mma_sync <= device.tensor.fp16_flop_per_clk
    assert device.memory.l2_latency_ns < device.memory.hbm_latency_ns
    assert device.memory.hbm_byte_per_ns < device.memory.l2_byte_per_ns
    assert device.smem.per_cta_max_byte + device.smem.reserved_per_cta_byte == device.smem.per_sm_byte
    assert device.sm.max_warps % device.sm.sub_partitions == 0


@pytest.mark.parametrize("name", NAMES)
def test_wgmma_and_tma_exist_on_hopper_only(name: str):
    device = load_device(name)
    present = (device.wgmma is not None, device.tma is not None, device.architecture == "hopper")
    assert present == ((True,) * 3 if name in HOPPER else (False,) * 3)


@pytest.mark.parametrize("name", HOPPER)
def test_wgmma_law_meets_the_published_issue_intervals(name: str):
    """Table of unit-mma.md, revollllt/flash-vla: clk per m64nNk16, both operands in shared memory."""
    published = {8: 18.9, 16: 20.7, 32: 24.7, 64: 32.8, 96: 48.7, 128: 65.0, 192: 97.1, 256: 129.3}
    wgmma = load_device(name).wgmma
    assert wgmma is not None
    for n, clk in published.items():
        law = max(wgmma.clk_fixed + wgmma.clk_per_n * n, wgmma.smem_clk_fixed + wgmma.smem_clk_per_n * n)
        assert law == pytest.approx(clk, rel=0.01), f"N = {n}"


def test_fp8_is_absent_where_the_part_has_none():
    without = [name for name in NAMES if load_device(name).tensor.fp8_flop_per_clk is None]
    assert without == ["a100-pcie-80gb", "a100-sxm4-40gb", "a100-sxm4-80gb"]
    assert "tensor.fp8_flop_per_clk" not in load_device("a100-sxm4-40gb").citations


def test_counts_are_integers_and_rates_are_floats():
    numbers = load_device("h100-sxm5").numbers()
    whole = {key for key, value in numbers.items() if type(value) is int}
    assert "memory.hbm_byte" in whole
    assert "sm.count" in whole
    assert {key for key in numbers if key.endswith(("_clk", "_ns", "_us", "_mhz"))}.isdisjoint(whole)


def test_a_users_file_is_loaded_by_its_path(tmp_path: Path):
    device = load_text(tmp_path, edited("exp_op_per_clk", entry("exp_op_per_clk", "32")))
    assert device.pipes.exp_op_per_clk == 32
    assert device.citations["pipes.exp_op_per_clk"].source == "a note in our lab book"
    assert load_device(tmp_path / "mine.toml") == device


def test_windows_line_ends_and_byte_order_mark_are_read(tmp_path: Path):
    text = built_in_text("l4").replace("\n", "\r\n")
    assert load_text(tmp_path, b"\xef\xbb\xbf" + text.encode()) == load_device("l4")


def test_a_whole_float_is_a_count(tmp_path: Path):
    device = load_text(tmp_path, edited("hbm_byte", entry("hbm_byte", "96e9")))
    assert type(device.memory.hbm_byte) is int
    assert device.memory.hbm_byte == 96_000_000_000


def test_costs_may_be_zero_but_not_negative(tmp_path: Path):
    assert load_text(tmp_path, edited("kernel_us", entry("kernel_us", "0"))).launch.kernel_us == 0
    line = edited("kernel_us", entry("kernel_us", "-1"))
    assert problems_of(tmp_path, line) == ["launch.kernel_us.value: must not be negative, got -1"]


def test_hash_follows_the_numbers_and_not_the_sources(tmp_path: Path):
    base = load_device("h100-sxm5")
    assert re.fullmatch("[0-9a-f]{12}", base.device_hash)
    same_number = edited("tdp_w", entry("tdp_w", "700.0"))
    assert load_text(tmp_path, same_number).device_hash == base.device_hash
    renamed = edited("title", 'title = "another title"')
    assert load_text(tmp_path, renamed).device_hash == base.device_hash
    other_number = edited("tdp_w", entry("tdp_w", "701"))
    assert load_text(tmp_path, other_number).device_hash != base.device_hash
    assert len({load_device(name).device_hash for name in NAMES}) == len(NAMES)


def test_hash_follows_a_replaced_number():
    base = load_device("h100-sxm5")
    wider = dataclasses.replace(base, pipes=dataclasses.replace(base.pipes, exp_op_per_clk=32.0))
    assert wider.device_hash != base.device_hash
    assert dataclasses.replace(wider, pipes=base.pipes).device_hash == base.device_hash


def test_a_device_survives_pickle_and_deepcopy():
    device = load_device("h200-sxm")
    for twin in (pickle.loads(pickle.dumps(device)), copy.deepcopy(device)):
        assert twin == device
        assert twin.citations == device.citations
    assert hash(device) == hash(load_device("h200-sxm"))


BAD_ENTRIES = {
    "bare number": (
        "mma_sync_clk = 6.26",
        "tensor.mma_sync_clk: a bare value without status and source; "
        'write { value = ..., status = "...", source = "..." }, got 6.26',
    ),
    "missing number": ("", "tensor.mma_sync_clk: missing number"),
    "misspelt key": (
        entry("mma_snyc_clk", "6.26"),
        "tensor.mma_snyc_clk: unknown number 'mma_snyc_clk', did you mean 'mma_sync_clk'? (allowed: "
        "fp16_flop_per_clk, fp16_tflops, mma_sync_clk, mma_sync_latency_clk, fp8_flop_per_clk)",
    ),
    "NaN": (entry("mma_sync_clk", "nan"), "tensor.mma_sync_clk.value: must be a finite number below 1e+18, got nan"),
    "infinity": (
        entry("mma_sync_clk", "inf"),
        "tensor.mma_sync_clk.value: must be a finite number below 1e+18, got inf",
    ),
    "zero": (entry("mma_sync_clk", "0"), "tensor.mma_sync_clk.value: must be positive, got 0"),
    "negative": (entry("mma_sync_clk", "-6.26"), "tensor.mma_sync_clk.value: must be positive, got -6.26"),
    "tiny": (entry("mma_sync_clk", "1e-300"), "tensor.mma_sync_clk.value: must be at least 1e-09, got 1e-300"),
    "bool": (entry("mma_sync_clk", "true"), "tensor.mma_sync_clk.value: must be a number, got true"),
    "text": (entry("mma_sync_clk", '"6.26"'), 'tensor.mma_sync_clk.value: must be a number, got "6.26"'),
    "date": (entry("mma_sync_clk", "2024-07-11"), 'tensor.mma_sync_clk.value: must be a number, got "2024-07-11"'),
    "no value": (
        'mma_sync_clk = { status = "measured", source = "our lab book" }',
        "tensor.mma_sync_clk.value: missing number",
    ),
    "no status": (
        'mma_sync_clk = { value = 6.26, source = "our lab book" }',
        "tensor.mma_sync_clk.status: missing text",
    ),
    "no source": (
        'mma_sync_clk = { value = 6.26, status = "measured" }',
        "tensor.mma_sync_clk.source: missing text",
    ),
    "blank source": (
        entry("mma_sync_clk", "6.26", source=" "),
        'tensor.mma_sync_clk.source: must be text in quotes, not blank, got " "',
    ),
    "unknown status": (
        entry("mma_sync_clk", "6.26", status="mesured"),
        "tensor.mma_sync_clk.status: unknown status 'mesured', did you mean 'measured'? "
        "(allowed: datasheet, measured, derived, fitted, assumed)",
    ),
    "misspelt source": (
        'mma_sync_clk = { value = 6.26, status = "measured", sorce = "our lab book" }',
        "tensor.mma_sync_clk.sorce: unknown key 'sorce', did you mean 'source'? (allowed: value, status, source, note)",
    ),
    "note is no text": (
        'mma_sync_clk = { value = 6.26, status = "measured", source = "our lab book", note = 5 }',
        "tensor.mma_sync_clk.note: must be text in quotes, not blank, got 5",
    ),
}


@pytest.mark.parametrize(("line", "problem"), BAD_ENTRIES.values(), ids=BAD_ENTRIES.keys())
def test_one_mistake_in_one_number_is_one_line(tmp_path: Path, line: str, problem: str):
    assert problems_of(tmp_path, edited("mma_sync_clk", line)) == [problem]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("count", "131.5", "sm.count.value: must be a whole number, got 131.5"),
        ("pack_on_exp_pipe", "2", "pipes.pack_on_exp_pipe.value: must be 0 or 1, got 2"),
        ("stream_efficiency", "77.5", "library.stream_efficiency.value: must be at most 1, got 77.5"),
        ("datasheet_mhz", "1981", "clock.datasheet_mhz: must be at most clock.max_mhz = 1980.0, got 1981.0"),
        ("per_sm_byte", "200_000", "smem.per_cta_max_byte: must be at most smem.per_sm_byte = 200000, got 232448"),
        ("l2_byte", "20e6", "memory.l2_share_byte: must be at most memory.l2_byte = 20000000, got 26214400"),
        (
            "hbm_byte_per_ns",
            "3e12",
            "memory.hbm_byte_per_ns: must be at most memory.hbm_peak_byte_per_ns = 3350.0, got 3000000000000.0",
        ),
    ],
)
def test_impossible_values_are_refused(tmp_path: Path, key: str, value: str, problem: str):
    assert problems_of(tmp_path, edited(key, entry(key, value))) == [problem]


def test_all_mistakes_are_reported_at_once(tmp_path: Path):
    text = edited("mma_sync_clk", "mma_sync_clk = 6.26")
    text = text.replace("[launch]", "[lunch]").replace('architecture = "hopper"', 'architecture = "hoper"')
    text = text.replace('compute_capability = "9.0"', "compute_capability = 9.0")
    sections = "name, title, architecture, compute_capability, " + ", ".join(SECTIONS)
    assert problems_of(tmp_path, text) == [
        f"lunch: unknown entry 'lunch', did you mean 'launch'? (allowed: {sections})",
        "compute_capability: must be text in quotes, not blank, got 9.0",
        "architecture: unknown architecture 'hoper', did you mean 'hopper'? (allowed: ampere, ada, hopper)",
        "tensor.mma_sync_clk: a bare value without status and source; "
        'write { value = ..., status = "...", source = "..." }, got 6.26',
    ]


def test_two_mistakes_in_one_number_are_two_lines(tmp_path: Path):
    text = edited("mma_sync_clk", entry("mma_sync_clk", "nan", status="guess"))
    assert [problem.partition(":")[0] for problem in problems_of(tmp_path, text)] == [
        "tensor.mma_sync_clk.status",
        "tensor.mma_sync_clk.value",
    ]


@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in ("wgmma", "tma")])
def test_a_missing_section_is_refused(tmp_path: Path, section: str):
    text = re.sub(rf"(?ms)^\[{section}\]\n.*?(^\n|\Z)", "", built_in_text("h100-sxm5"))
    assert section not in tomllib.loads(text)
    assert problems_of(tmp_path, text) == [f"{section}: missing section"]


def test_an_optional_section_must_be_complete(tmp_path: Path):
    assert problems_of(tmp_path, edited("drain_clk", "")) == ["wgmma.drain_clk: missing number"]


def test_a_number_in_place_of_a_section(tmp_path: Path):
    text = "power = 700\n" + re.sub(r"\[power\]\n.*\n", "", built_in_text("h100-sxm5"))
    assert problems_of(tmp_path, text) == ["power: must be a section, opened by [power], got 700"]


def test_broken_toml_names_the_line(tmp_path: Path):
    text = edited("tdp_w", "tdp_w = { value = 700")
    line = 1 + text[: text.index("tdp_w")].count("\n")
    (problem,) = problems_of(tmp_path, text)
    assert problem.startswith("not TOML: ")
    assert f"(at line {line}, " in problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfen\x00", "not UTF-8 text, at byte 0"),
        (b"a = " + b"[" * 20_000, "not TOML: "),
        (b"a = 1" + b"0" * 5000, "not TOML: "),
    ],
    ids=["UTF-16", "deep nesting", "huge integer"],
)
def test_files_that_are_no_toml_at_all(tmp_path: Path, content: bytes, problem: str):
    (found,) = problems_of(tmp_path, content)
    assert found.startswith(problem)


@pytest.mark.parametrize("given", ["./nowhere.toml", "nowhere.toml", "some/folder"])
def test_a_file_that_does_not_exist(given: str):
    with pytest.raises(InputError, match=re.escape(f"{given}: no such file (built-in GPUs: a100-pcie-80gb, ")):
        load_device(given)


def test_a_folder_is_not_a_device(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        load_device(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("h100", "h100-sxm5"), ("H100-PCIE", "h100-pcie"), ("a100-80gb", "a100-sxm4-80gb"), ("L4", "l4")],
)
def test_an_unknown_name_gets_the_nearest(given: str, meant: str):
    with pytest.raises(InputError, match=f"unknown GPU '{given}', did you mean '{meant}'"):
        load_device(given)
