"""The options of a schedule: how they are given, what is decided where none is, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from flashsim.errors import InputError
from flashsim.problem import AttentionProblem
from flashsim.schedules import Schedule, load_schedule, switch
from flashsim.schedules.fa2 import FA2
from flashsim.schedules.fa3 import FA3


def problem(head_dim: int = 128, **others: Any) -> AttentionProblem:
    return AttentionProblem(**{"batch": 1, "heads_q": 1, "seqlen_q": 1024, "head_dim": head_dim} | others)


def refused(
    kind: type[Schedule], options: dict[str, Any], architecture: str = "hopper", **sizes: Any
) -> tuple[str, ...]:
    with pytest.raises(InputError) as error:
        kind.configure(problem(**sizes), architecture, options)
    return error.value.problems


# What there is.


def test_the_switches_of_fa3() -> None:
    listed = [(s.name, s.type_name, s.default, s.choices) for s in FA3.switches()]
    assert listed == [
        ("BLOCK_M", "int", None, ()),
        ("BLOCK_N", "int", None, ()),
        ("pack_gqa", "bool", False, ()),
        ("build", "str", "2025-01", ("2024-07", "2025-01")),
        ("impl", "str", "published", ("published", "gluon", "triton")),
        ("num_stages", "int", None, ()),
        ("warp_specialized", "bool", None, ()),
        ("pingpong", "bool", None, ()),
        ("intra_wg_overlap", "bool", None, ()),
        ("overlap_stages", "int", 2, ()),
        ("persistent", "bool", None, ()),
        ("P_in_shared", "bool", None, ()),
        ("incoherent", "str", "off", ("off", "fused", "separate")),
        ("bwd_BLOCK_M", "int", None, ()),
        ("bwd_BLOCK_N", "int", None, ()),
        ("deterministic", "bool", False, ()),
    ]
    assert all(s.help for s in FA3.switches())


def test_the_switches_of_fa2() -> None:
    forward, backward = (
        ["BLOCK_M", "BLOCK_N", "pack_gqa"],
        ["bwd_BLOCK_M", "bwd_BLOCK_N", "bwd_stages", "deterministic"],
    )
    assert [s.name for s in FA2.switches()] == [*forward, "impl", "mma", "num_warps", "num_stages", *backward]
    assert all(s.help for s in FA2.switches())


def test_a_schedule_is_called_like_its_class() -> None:
    assert (FA2.name(), FA3.name()) == ("fa2", "fa3")


# Text and values.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ({"num_stages": "3"}, {"num_stages": 3}),
        ({"num_stages": " 3 "}, {"num_stages": 3}),
        ({"pingpong": "true"}, {"pingpong": True}),
        ({"pingpong": "FALSE"}, {"pingpong": False}),
        ({"build": "2024-07"}, {"build": "2024-07"}),
        ({"BLOCK_M": "64", "BLOCK_N": "80"}, {"BLOCK_M": 64, "BLOCK_N": 80}),
    ],
)
def test_text_says_what_a_value_says(text: dict[str, str], value: dict[str, Any]) -> None:
    by_text, by_value = (FA3.configure(problem(), "hopper", options) for options in (text, value))
    assert by_text == by_value
    assert by_text.options() | value == by_text.options()
    assert all(type(by_text.options()[key]) is type(value[key]) for key in value)


@pytest.mark.parametrize("given", ["0", "-1", "2.0", 2.0, "two", "", "1e2", "٣", "4097", True, None])
def test_what_is_no_whole_number(given: object) -> None:
    expected = f"switch num_stages of fa3: {str(given)!r} is not a whole number from 1 to 4096"
    assert refused(FA3, {"num_stages": given}) == (expected,)


@pytest.mark.parametrize("given", ["yes", "1", 1, 0, "", None, "tru"])
def test_what_is_neither_true_nor_false(given: object) -> None:
    expected = f"switch pingpong of fa3: {str(given)!r} is neither true nor false"
    assert refused(FA3, {"pingpong": given}) == (expected,)


def test_a_value_that_is_not_among_the_choices() -> None:
    (line,) = refused(FA3, {"build": "2024-7"})
    assert line == ("switch build of fa3: unknown value '2024-7', did you mean '2024-07'? (allowed: 2024-07, 2025-01)")


def test_an_unknown_switch_is_told_the_nearest() -> None:
    (line,) = refused(FA3, {"ping_pong": "true"})
    assert line.startswith(
        "unknown switch of fa3 'ping_pong', did you mean 'pingpong'? (allowed: BLOCK_M, BLOCK_N, pack_gqa, build,"
    )


def test_a_switch_of_another_schedule_is_unknown() -> None:
    (line,) = refused(FA2, {"pingpong": True})
    assert line.startswith("unknown switch of fa2 'pingpong'")


def test_all_mistakes_come_at_once() -> None:
    lines = refused(FA3, {"num_stage": 2, "pingpong": "perhaps", "build": "2023"}, architecture="ada")
    assert len(lines) == 4
    assert [word in line for word, line in zip(("ada", "num_stage", "perhaps", "2023"), lines, strict=True)] == [
        True
    ] * 4


# What a combination must be.


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"BLOCK_M": 96}, "schedule fa3: BLOCK_M = 96, allowed are 64, 128, 192"),
        ({"BLOCK_N": 20}, "schedule fa3: BLOCK_N = 20, allowed are"),
        ({"BLOCK_N": 272}, "schedule fa3: BLOCK_N = 272, allowed are"),
        ({"num_stages": 9}, "schedule fa3: num_stages = 9, allowed are 1 to 8"),
        ({"warp_specialized": False, "persistent": True}, "schedule fa3: persistent needs warp_specialized"),
    ],
)
def test_what_fa3_cannot_be(options: dict[str, Any], line: str) -> None:
    (found,) = refused(FA3, options)
    assert found.startswith(line)


@pytest.mark.parametrize("options", [{"BLOCK_M": 32}, {"BLOCK_N": 24}, {"BLOCK_N": 272}])
def test_what_fa2_cannot_be(options: dict[str, Any]) -> None:
    (found,) = refused(FA2, options, architecture="ampere")
    ((name, value),) = options.items()
    assert found.startswith(f"schedule fa2: {name} = {value}, allowed are")


def test_complaints_come_at_once_too() -> None:
    assert len(refused(FA3, {"BLOCK_M": 96, "BLOCK_N": 20, "num_stages": 9})) == 3


@dataclass(frozen=True)
class FullOnly(Schedule):
    """A schedule that does not do much."""

    masks = ("full",)
    dtypes = ("bf16",)
    architectures = ("hopper",)

    fast: bool = switch(True, "be fast")


def test_what_a_schedule_has_not() -> None:
    assert refused(FullOnly, {"fats": False}, "ampere", mask="causal", dtype="fp16") == (
        "schedule full_only has no mask 'causal' (it has: full)",
        "schedule full_only has no dtype 'fp16' (it has: bf16)",
        "schedule full_only does not run on ampere (it runs on: hopper)",
        "unknown switch of full_only 'fats', did you mean 'fast'? (allowed: BLOCK_M, BLOCK_N, pack_gqa, fast)",
    )


# What is decided where nothing is given.


@pytest.mark.parametrize(
    ("options", "head_dim", "mask", "decided"),
    [
        ({}, 128, "full", {"BLOCK_M": 128, "BLOCK_N": 176, "pingpong": True, "persistent": True, "P_in_shared": False}),
        ({}, 128, "causal", {"BLOCK_M": 128, "BLOCK_N": 128}),
        ({}, 64, "full", {"BLOCK_M": 192, "BLOCK_N": 192, "P_in_shared": True}),
        ({"build": "2024-07"}, 64, "full", {"BLOCK_M": 192, "BLOCK_N": 128, "P_in_shared": False}),
        ({}, 256, "full", {"BLOCK_M": 128, "BLOCK_N": 80, "pingpong": False}),
        ({"intra_wg_overlap": False}, 256, "full", {"pingpong": True}),
        ({"BLOCK_M": 64}, 128, "full", {"BLOCK_M": 64, "BLOCK_N": 176, "pingpong": False}),
        ({"warp_specialized": False}, 128, "full", {"persistent": False}),
        ({"pingpong": False, "P_in_shared": True}, 128, "full", {"pingpong": False, "P_in_shared": True}),
    ],
)
def test_what_fa3_decides(options: dict[str, Any], head_dim: int, mask: str, decided: dict[str, Any]) -> None:
    found = FA3.configure(problem(head_dim, mask=mask), "hopper", options).options()
    assert {key: found[key] for key in decided} == decided


def test_the_larger_head_dim_decides() -> None:
    wide = FA3.configure(problem(64, head_dim_v=256), "hopper", {})
    assert (wide.BLOCK_M, wide.BLOCK_N) == (128, 80)


@pytest.mark.parametrize(("architecture", "tile"), [("ampere", (128, 64)), ("ada", (128, 32)), ("hopper", (128, 64))])
def test_what_fa2_decides_at_head_dim_128(architecture: str, tile: tuple[int, int]) -> None:
    chosen = FA2.configure(problem(), architecture, {}).options()
    assert (chosen["BLOCK_M"], chosen["BLOCK_N"]) == tile


def test_nothing_is_left_undecided() -> None:
    for name in ("fa2", "fa3"):
        options = load_schedule(name).configure(problem(), "hopper", {}).options()
        assert None not in options.values()
