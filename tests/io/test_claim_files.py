"""Files of claims: what they mean, and one line for every mistake in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsim.errors import InputError
from flashsim.io.case import Case
from flashsim.io.claims import QUANTITIES, Claim, ClaimFile, is_claims, read_claims
from flashsim.io.experiment import Experiment

CASE = '[claim.case]\ngpu = "h100-sxm5"\nschedule = "fa3"\nbatch = 1\nheads = 2\nseqlen = 256\nhead_dim = 64\n'


def claim(quantity: str = "time_us", rest: str = "", case: str = CASE) -> str:
    return f'[[claim]]\nclaim = "C"\nsource = "S"\nsays = 2\nquantity = "{quantity}"\n{rest}\n{case}'


def read(folder: Path, text: str) -> ClaimFile:
    path = folder / "claims.toml"
    path.write_text(text, encoding="utf-8")
    assert is_claims(path)
    return read_claims(path)


def read_one(folder: Path, text: str) -> Claim:
    (found,) = read(folder, text).claims
    return found


def problems(folder: Path, text: str) -> list[str]:
    """The complaints about a file, without its path."""
    with pytest.raises(InputError) as caught:
        read(folder, text)
    prefix = f"{folder / 'claims.toml'}: "
    assert all(line.startswith(prefix) for line in caught.value.problems), caught.value.problems
    return [line.removeprefix(prefix) for line in caught.value.problems]


def test_every_key_is_read(tmp_path: Path) -> None:
    text = claim("hbm_ratio", 'why = "W"\nl2 = "none"\nup_to = true') + '[claim.than]\nschedule = "fa2"\n'
    file = read(tmp_path, 'title = "T"\n' + text.replace("says = 2", "says = [1.5, 2]"))
    (found,) = file.claims
    assert (file.title, found.claim, found.source, found.why) == ("T", "C", "S", "W")
    assert (found.says, found.quantity, found.l2, found.up_to) == ((1.5, 2.0), "hbm_ratio", False, True)


def test_what_may_be_left_out(tmp_path: Path) -> None:
    found = read_one(tmp_path, claim())
    assert (found.says, found.why, found.l2, found.up_to) == ((2.0, 2.0), None, True, False)
    (point,) = found.points
    assert (point.label, point.than) == ("", None)


def test_a_second_case_has_the_keys_of_the_first_but_another_schedule_s_switches(tmp_path: Path) -> None:
    case = CASE + 'clock_mhz = 1500\nset = { build = "2024-07", pingpong = false }\n'
    (same,) = read_one(tmp_path, claim("time_ratio", case=case) + "[claim.than]\nset = { pingpong = true }\n").points
    (other,) = read_one(tmp_path, claim("time_ratio", case=case) + '[claim.than]\nschedule = "fa2"\n').points
    assert same.than is not None
    assert other.than is not None
    assert same.than.options == {"build": "2024-07", "pingpong": True}
    assert (other.than.options, other.than.schedule.name(), other.than.clock_mhz) == ({}, "fa2", 1500)
    assert other.than.problem == other.case.problem  # type: ignore[union-attr]


def test_over_lists_values_for_both_cases_the_last_key_fastest(tmp_path: Path) -> None:
    over = '[claim.over]\nmask = ["full", "causal"]\nseqlen = [128, 256]\n'
    points = read_one(tmp_path, claim("time_ratio") + '[claim.than]\nschedule = "fa2"\n' + over).points
    found = [(point.case.problem.mask, point.case.problem.seqlen_q) for point in points]  # type: ignore[union-attr]
    assert found == [("full", 128), ("full", 256), ("causal", 128), ("causal", 256)]
    assert [point.than.problem for point in points if point.than] == [point.case.problem for point in points]  # type: ignore[union-attr]
    assert points[1].label == "mask full, seqlen 256"


def test_tokens_give_each_length_its_batch(tmp_path: Path) -> None:
    case = CASE.replace("batch = 1", "tokens = 512").replace("seqlen = 256\n", "")
    points = read_one(tmp_path, claim(case=case) + "[claim.over]\nseqlen = [128, 512]\n").points
    assert [point.case.problem.batch for point in points] == [4, 1]  # type: ignore[union-attr]


def test_a_claim_about_a_gpu_names_the_gpu_alone(tmp_path: Path) -> None:
    (point,) = read_one(tmp_path, claim("flop_per_exp", case='[claim.case]\ngpu = "l4"\n')).points
    assert isinstance(point.case, Case)
    assert point.case.gpu.name == "l4"


def test_a_claim_about_fp8_errors_has_the_experiment_s_keys(tmp_path: Path) -> None:
    (point,) = read_one(tmp_path, claim("error_ratio", case="[claim.case]\nseqlen = 64\n")).points
    assert isinstance(point.case, Experiment)
    assert (point.case.seqlen, point.case.variants) == (64, ["fp8-per-tensor", "fp8-fa3"])
    (point,) = read_one(tmp_path, claim("error_ratio", case="")).points
    assert isinstance(point.case, Experiment)
    assert point.case.seqlen == 8192


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    text = """
        title = 3
        grid = {}
        tilte = "T"
        [[claim]]
        claim = " "
        sourc = "S"
        says = [2, 1]
        quantity = "time_ms"
        l2 = "off"
        up_to = "yes"
        than = 3
        [claim.case]
        gpu = "h100"
        schedule = "fa3"
        batch = "1"
        heads = 2
        seqlen = 256
        head_dim = 64
        [claim.over]
        seqlen = 5
        mask = ["full", "causl"]
        [[claim]]
        claim = "C"
        source = "S"
        says = 1
        quantity = "time_ratio"
    """
    names = ", ".join(QUANTITIES)
    found = problems(tmp_path, text)
    expected = [
        "title: 3 is not text",
        "grid: does not go with claim",
        "unknown key 'tilte', did you mean 'title'? (allowed: title, claim)",
        "claim[1].claim: is blank",
        "claim[1]: unknown key 'sourc', did you mean 'source'? "
        "(allowed: claim, source, says, quantity, why, l2, up_to, case, than, over)",
        "claim[1].says: [2, 1] begins above its end",
        "claim[1].l2: unknown l2 'off' (allowed: none)",
        "claim[1].than: 3 is not a table",
        "claim[1].over.seqlen: 5 is not a list of values",
        "claim[2].than: is required",
        "claim[2].case: is required",
    ]
    assert [line for line in expected if line not in found] == []
    assert any(
        line.startswith("claim[1].quantity: unknown quantity 'time_ms'") and line.endswith(f"(allowed: {names})")
        for line in found
    )
    assert not any(line.startswith("claim[1].source") for line in found)  # a misspelt key is not missing as well
    for place in ("claim[1].up_to: ", "claim[1].case.gpu: ", "claim[1].case.batch: ", "claim[1].over.mask"):
        assert sum(line.startswith(place) for line in found) == 1, (place, found)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("claim = 3\n", "claim: 3 is not a table"),
        ("claim = []\n", "claim: there is none"),
        (claim("time_us", "than = {}"), "claim[1].than: does not go with time_us"),
        (claim("time_ratio"), "claim[1].than: is required"),
        (claim("time_us", case=""), "claim[1].case: is required"),
        (claim("time_us", case="[claim.case]\n"), "claim[1].case: is required"),
        (claim("time_us", "case = 3", ""), "claim[1].case: 3 is not a table"),
        (claim("time_us", 'l2 = "none"'), "claim[1].l2: does not go with time_us"),
        (
            claim("hbm_gb", 'l2 = "none"', CASE + "kv_heads = 1\n"),
            "claim[1].l2: needs heads that are alike and have K and V of their own, so that one stands for all",
        ),
        (
            claim().replace("says = 2", "says = [1, 2, 3]"),
            "claim[1].says: [1, 2, 3] is neither a number nor a range of two numbers",
        ),
        (claim().replace("says = 2", "says = 0"), "claim[1].says: 0 is not a number above 0"),
        (claim().replace("says = 2", "says = [1, inf]"), "claim[1].says: inf is not a number above 0"),
        (claim() + "[claim.over]\nseqlen = []\n", "claim[1].over.seqlen: [] is not a list of values"),
        (claim() + f"[claim.over]\nseqlen = {list(range(1, 102))}\n", "claim[1].over: has more than 100 cases"),
        (
            claim("error_ratio", case="[claim.case]\nvariants = []\n"),
            "claim[1].case.variants: does not go with error_ratio",
        ),
        (claim("error_ratio", "over = {}", ""), "claim[1].over: does not go with error_ratio"),
        (claim("error_ratio", case="[claim.case]\nseeds = 0\n"), "claim[1].case.seeds: 0 is not between 1 and 1000"),
        (
            claim("time_ratio") + "[claim.than]\nhead_dim = 1000\n",
            "claim[1].than.head_dim: got 1000, must be a whole number from 1 to 512",
        ),
        (
            claim() + "[claim.over]\nseqlen = [128, 0]\n",
            "claim[1].over.seqlen: got 0, must be a whole number from 1 to 2147483647",
        ),
    ],
)
def test_a_mistake(tmp_path: Path, text: str, complaint: str) -> None:
    assert problems(tmp_path, text) == [complaint]


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text("[case]\n", encoding="utf-8")
    assert not is_claims(path)
    with pytest.raises(InputError, match="no such file"):
        is_claims(tmp_path / "none.toml")
