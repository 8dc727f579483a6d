"""Files of a compiled kernel's instruction counts, and a simulation that uses them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashsim.cli import main
from flashsim.devices import load_device
from flashsim.errors import InputError
from flashsim.io.costs import KINDS, CompiledCosts, fitting, read_costs
from flashsim.problem import AttentionProblem
from flashsim.simulate import simulate

CHARGED = {"exp": 34.0, "fma": 132.0, "alu": 32.0, "pack": 16.0, "issue": 274.0}
OPTIONS = {"impl": "triton", "BLOCK_M": 128, "BLOCK_N": 64}
COMMAND = ["simulate", "--schedule", "fa2", "--batch", "4", "--heads", "16", "--seqlen", "2048", "--head-dim", "128"]
AS_COMPILED = [argument for key, value in OPTIONS.items() for argument in ("--set", f"{key}={value}")]


def costs(**counts: float) -> CompiledCosts:
    fields: dict[str, Any] = {"schedule": "fa2", "target": "sm_90", "dtype": "fp16", "head_dim": 128, "head_dim_v": 128}
    return CompiledCosts(**fields, options=OPTIONS, counts=CHARGED | counts, charged=CHARGED)


def text_of(*several: CompiledCosts) -> str:
    return json.dumps({"costs": [one.model_dump() for one in several]})


def test_a_file_reads_as_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text_of(costs(fma=200.5), costs()), encoding="utf-8")
    assert read_costs(str(path)) == [costs(fma=200.5), costs()]


def test_of_several_the_one_that_fits_is_taken() -> None:
    p = AttentionProblem(batch=1, heads_q=1, seqlen_q=1, head_dim=128)
    other = costs(exp=1.0).model_copy(update={"head_dim": 64})
    assert fitting([other, costs()], "fa2", OPTIONS, p) == costs()
    with pytest.raises(InputError, match="head_dim is 128, the counts are those of head_dim 64"):
        fitting([other], "fa2", OPTIONS, p)
    with pytest.raises(InputError, match="no counts"):
        fitting([], "fa2", OPTIONS, p)


def test_counts_as_charged_change_nothing() -> None:
    device = load_device("h100-sxm5")
    assert costs().applied(device) == device


@pytest.mark.parametrize(("kind", "rate"), [("fma", "fma_op_per_clk"), ("issue", "issue_inst_per_clk")])
def test_twice_the_instructions_halve_the_rate(kind: str, rate: str) -> None:
    pipes = load_device("h100-sxm5").pipes
    slower = costs(**{kind: 2 * CHARGED[kind]}).applied(load_device("h100-sxm5")).pipes
    assert getattr(slower, rate) == getattr(pipes, rate) / 2
    assert replace(slower, **{rate: getattr(pipes, rate)}) == pipes


def test_on_a_shared_pipe_conversions_count_as_exponentials() -> None:
    device = load_device("h100-sxm5")
    for shared, exp in ((1, (34 + 32) / (34 + 16)), (0, 1.0)):
        one = replace(device, pipes=replace(device.pipes, pack_on_exp_pipe=shared))
        slower = costs(pack=32.0).applied(one).pipes
        assert slower.exp_op_per_clk == pytest.approx(one.pipes.exp_op_per_clk / exp)
        assert slower.pack_op_per_clk == one.pipes.pack_op_per_clk / 2


def test_more_exponentials_take_more_time() -> None:
    p = AttentionProblem(batch=4, heads_q=16, seqlen_q=2048, head_dim=128)
    device = load_device("h100-sxm5")
    plain, slow = (simulate(p, "fa2", d, options=OPTIONS).time_us for d in (device, costs(exp=170.0).applied(device)))
    assert slow > 1.2 * plain


def test_the_command_line_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text_of(costs(exp=170.0)), encoding="utf-8")
    assert main([*COMMAND, *AS_COMPILED]) == 0
    plain = capsys.readouterr().out
    assert main([*COMMAND, *AS_COMPILED, "--costs", str(path)]) == 0
    assert capsys.readouterr().out != plain


def test_counts_of_another_kernel_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text_of(costs()), encoding="utf-8")
    assert main([*COMMAND, "--dtype", "bf16", "--costs", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert f"error: --costs {path}: dtype is bf16, the counts are those of dtype fp16" in lines
    assert f"error: --costs {path}: impl is published, the counts are those of impl triton" in lines


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('"exp": 34.0, ', "", f"costs.0.counts: must have {', '.join(KINDS)}, has fma, alu, pack, issue"),
        ('"fma": 132.0', '"fma": -1.0', "costs.0.counts.fma"),
        ('"dtype": "fp16", ', "", "costs.0.dtype"),
        ('"dtype": "fp16"', '"dtype": "fp16", "surprise": 1', "surprise"),
        ('{"costs"', '{"cost"', "costs"),
        ('{"costs"', '"costs"', "is no JSON"),
    ],
)
def test_what_a_file_cannot_be(tmp_path: Path, old: str, new: str, line: str) -> None:
    path = tmp_path / "costs.json"
    text = text_of(costs())
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_costs(str(path))
    assert any(line in problem for problem in error.value.problems)
