"""The audit: a good kernel passes, each kind of bad one fails, and says why; what the command line makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flashsim.analysis.charges import Charges, charges
from flashsim.cli import kernels as command
from flashsim.cli import main
from flashsim.devices import load_device
from flashsim.errors import InputError
from flashsim.gpu import audit as auditing
from flashsim.gpu.audit import CaseReport, LaunchReport, Report, audit
from flashsim.gpu.compile import Call, Tensor, compile_call
from flashsim.gpu.kernels import KERNELS, TARGETS, Case, Entry, Need, Sizes, expected_mma, forward
from flashsim.io.costs import read_costs
from flashsim.problem import AttentionProblem

SAMPLES = str(Path(__file__).with_name("audit_samples.py"))
compile_once = cache(compile_call)


class Arguments(dict[str, Any]):
    """Of a call that is compiled once."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def look(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    target: str = "sm_90",
    head_dim: int = 128,
    work: Callable[[Sizes], Need] = forward,
    dtype: str = "float16",
    promises: tuple[str, ...] = (),
    schedule: str | None = None,
    **arguments: Any,
) -> CaseReport:
    """The audit of one call of a sample."""
    monkeypatch.setattr(auditing, "compile_call", compile_once)
    x = Tensor((1024, head_dim), dtype)
    case = Case("a sample", Call(f"{SAMPLES}:{name}", Arguments(q=x, k=x, v=x, **arguments)), head_dim, dtype)
    case = replace(case, **dict.fromkeys(promises, True))
    works = {"attention_kernel": work, "descriptors_kernel": work}
    report = audit(Entry(name, works, lambda entry, number: (case,), schedule=schedule), target)
    (found,) = report.cases
    assert report.passed == (not found.problems)
    return found


def only_launch(report: CaseReport) -> LaunchReport:
    (launch,) = report.launches
    return launch


def changed(**factors: float) -> Callable[[Sizes], Need]:
    def work(sizes: Sizes) -> Need:
        need = forward(sizes)
        return replace(need, **{name: int(getattr(need, name) * factor) for name, factor in factors.items()})

    return work


@pytest.mark.parametrize(("target", "mma"), [("sm_80", {"HMMA": 1024.0}), ("sm_90", {"HGMMA": 24.0})])
def test_a_good_kernel_passes(target: str, mma: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    report = look("attention", monkeypatch, target)
    assert report.problems == ()
    launch = only_launch(report)
    assert (launch.tile, launch.spills, launch.specialized) == ({"BLOCK_M": 128, "BLOCK_N": 64}, 0, False)
    (loop,) = launch.loops
    assert (loop.masked, loop.tiles, loop.mma) == (False, 1, mma)
    assert loop.flop == 4 * 128 * 64 * 128
    assert loop.exps == (32 + 2) * 256
    assert loop.bytes == 2 * 64 * 128 * 2
    assert loop.counts["convert"] == 128 * 64 / 2 / 32
    assert loop.per_warp["exp"] == 34
    assert loop.counts["issue"] > sum(loop.counts[name] for name in ("exp", "fma", "alu", "convert"))
    assert loop.overlap == (None if target == "sm_80" else "absent")


def test_descriptors_count_as_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    (loop,) = only_launch(look("by_descriptors", monkeypatch)).loops
    assert loop.bytes == loop.need.bytes == 2 * 128 * 128 * 2
    assert loop.counts["tma"] > 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "attention, spilled": ({"target": "sm_80", "num_warps": 4, "BLOCK_N": 128}, "LDL or STL in inner loops"),
    "attention, too large": ({"num_stages": 5, "BLOCK_N": 128}, "bytes of shared memory, sm_90 has 232448"),
    "attention, without tensor cores": (
        {"target": "sm_80", "head_dim": 32, "upcast": True, "BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4},
        "products by no tensor core, expected HMMA",
    ),
    "attention, in order": ({"promises": ("overlapped",)}, "overlap was promised and is lost: 0 of 34"),
    "by_descriptors, specialized with 8 warps": (
        {"specialize": True, "promises": ("specialized",)},
        "warp specialization was promised and is absent: 8 warps, 8 asked for",
    ),
    "attention, half of the products needed": ({"work": changed(flop=0.5)}, "FLOP of products a tile"),
    "attention, fewer exponentials needed": ({"work": changed(exps=0.5)}, "8704 exponentials a tile, 4096 needed"),
    "attention, more exponentials needed": ({"work": changed(exps=1.1)}, "8704 exponentials a tile, 9011 needed"),
    "attention, more bytes needed": ({"work": changed(bytes=1.25)}, "32768 bytes loaded a tile, 40960 needed"),
    "attention, half of the bytes needed": ({"work": changed(bytes=0.5)}, "2097152 FLOP of products a tile"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_kernel_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, message = BAD[name]
    report = look(name.partition(",")[0], monkeypatch, **arguments)
    assert any(message in problem for problem in report.problems), report.problems


def test_an_unrolled_loop_is_divided_by_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the work of a tile, in all respects: as of a loop that handles two."""
    report = look("attention", monkeypatch, work=changed(flop=0.5, exps=0.5, bytes=0.5))
    assert report.problems == ()
    (loop,) = only_launch(report).loops
    assert loop.tiles == 2
    assert loop.flop == loop.need.flop
    assert loop.mma == {"HGMMA": 12.0}


def test_too_much_tensor_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "TMEM_LIMIT", -1)
    assert any("columns of tensor memory" in line for line in look("attention", monkeypatch).problems)


def test_what_cannot_be_compiled_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    report = look("attention", monkeypatch, BLOCK_N=100)
    assert report.launches == ()
    assert report.failure is not None
    assert "power of 2" in report.failure


def test_a_function_that_launches_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look("nothing", monkeypatch).problems == (
        "launched nothing, expected one of attention_kernel, descriptors_kernel",
    )


def charged(**changes: Any) -> Callable[..., dict[str, Charges]]:
    told = {"BLOCK_M": 128, "BLOCK_N": 64, "warps": 8, "mma_flop": 4194304, "load_byte": 32768, "smem_byte": 131072.0}
    told |= {"copies": 0.0, "instructions": {"exp": 34.0, "fma": 132.0, "alu": 0.0, "pack": 16.0}, **changes}
    return lambda *_: {"attention_kernel": Charges(**told)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"mma_flop": 4194305}, "4194304 FLOP of products a tile, the simulator charges 4194305"),
        ({"load_byte": 32767}, "32768 bytes loaded a tile, the simulator charges 32767"),
        ({"instructions": {"exp": 30.0}}, "8704 exponentials a tile, the simulator charges 7680"),
        (
            {"BLOCK_N": 128},
            "the simulator cannot say what it charges: its tile is 128 x 128, the compiled one 128 x 64",
        ),
    ],
)
def test_what_the_simulator_charges(
    changes: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "_charges", charged(**changes))
    report = look("attention", monkeypatch, schedule="fa2")
    assert [message in line for line in report.problems] == ([] if message is None else [True])
    if message is None:
        ratios = only_launch(report).loops[0].ratios
        assert (ratios["mma_flop"], ratios["load_byte"], ratios["exp"], ratios["convert"]) == (1, 1, 1, 1)
        assert "alu" not in ratios  # nothing is charged
        assert 0.9 < ratios["fma"] < 1.1


def test_expected_tensor_core_instructions() -> None:
    assert [expected_mma(target, 128, "float16") for target in TARGETS.values()] == ["HMMA", "HGMMA", "UTCHMMA"]
    assert [expected_mma(target, 16, "bfloat16") for target in TARGETS.values()] == ["HMMA"] * 3
    assert [expected_mma(target, 64, "float8_e4m3fn") for target in (89, 90, 100)] == ["QMMA", "QGMMA", "UTCQMMA"]


def test_a_kernel_that_does_not_exist_for_a_target() -> None:
    report = audit("fa3", "sm_80")
    assert not report.exists
    assert report.passed


@pytest.mark.parametrize(
    ("kernel", "target", "near"), [("fa2_bakward", "sm_90", "fa2_backward"), ("fa2", "sm90", "sm_90")]
)
def test_unknown_names(kernel: str, target: str, near: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{near}'"):
        audit(kernel, target)


def first_case(name: str, target: int, label: str) -> Entry:
    (case,) = (case for case in KERNELS[name].cases_for(target) if case.label == label)
    return replace(KERNELS[name], cases=lambda entry, number: (case,))


def test_fa3_on_hopper_overlaps() -> None:
    report = audit(first_case("fa3", 90, "fp16 D 128"), "sm_90")
    assert report.cases[0].problems == ()
    launch = only_launch(report.cases[0])
    (loop,) = launch.loops
    assert launch.tile == {"BLOCK_M": 128, "BLOCK_N": 128}
    assert (launch.total_warps, launch.spills, launch.specialized) == (12, 0, True)
    assert launch.shared <= 232448
    assert loop.mma == {"HGMMA": 32.0}
    assert loop.exps_in_flight is not None
    assert loop.exps_in_flight >= 64


def test_fa2_on_ampere_does_not_spill() -> None:
    report = audit(first_case("fa2", 80, "fp16 D 128 causal"), "sm_80")
    assert report.cases[0].problems == ()
    launch = only_launch(report.cases[0])
    assert sorted(loop.masked for loop in launch.loops) == [False, True]
    assert all(set(loop.mma) == {"HMMA"} for loop in launch.loops)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["audit", *arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> CaseReport:
    """The audits of all kernels are that of a sample."""
    case = look("attention", monkeypatch)

    def prepared_audit(entry: Entry, target: str, advance: Callable[[], object]) -> Report:
        there = TARGETS[target] in entry.targets
        return Report(entry.name, target, entry.implementation, (case,) if there else ())

    monkeypatch.setattr(auditing, "audit", prepared_audit)
    return case


def test_json(prepared: CaseReport, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "fa3", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert (told["passed"], told["complete"]) == (True, True)
    assert [(one["target"], one["exists"]) for one in told["reports"]] == [
        ("sm_80", False),
        ("sm_90", True),
        ("sm_100", False),
    ]
    ((case,),) = [one["cases"] for one in told["reports"] if one["cases"]]
    assert set(case) == {
        *("case", "dtype", "head_dim", "causal", "promised", "triton", "failure", "problems", "launches"),
    }
    (launch,) = case["launches"]
    assert launch["kernel"] == "attention_kernel"
    (loop,) = launch["loops"]
    assert loop["need"] == {"flop": 4194304, "exps": 8192, "bytes": 32768, "factors": 1, "beside": 0}
    assert loop["mma"] == {"HGMMA": 24.0}


def test_every_key_is_documented(prepared: CaseReport, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    told = json.loads(run(capsys, "fa3", "--target", "sm_90", "--json")[1])

    def keys(value: Any) -> set[str]:
        if isinstance(value, list):
            return {key for part in value for key in keys(part)}
        if not isinstance(value, dict):
            return set()
        inner = {name: part for name, part in value.items() if name not in ("tile", "mma", "charged")}
        return set(value) | keys(list(inner.values()))

    assert {key for key in keys(told) if key not in text} == set()


def test_for_people(prepared: CaseReport, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--target", "sm_90")
    assert code == 0
    assert "fa2 (triton) for sm_90" in out
    assert "24 HGMMA" in out
    assert "0 of 34" in out
    assert f"{len(KERNELS)} audited, 0 failed" in out
    assert "does not exist" in run(capsys, "fa3", "--target", "sm_80")[1]


def test_problems_are_told(
    monkeypatch: pytest.MonkeyPatch, prepared: CaseReport, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Report("fa2", "sm_90", "triton", (CaseReport(prepared.case, failure="not compiled: because\n  of it"),))
    monkeypatch.setattr(auditing, "audit", lambda *_: bad)
    code, out, _ = run(capsys, "fa2", "--target", "sm_90")
    assert code == 1
    assert "FAILED" in out
    assert "a sample: not compiled: because of it" in out
    assert run(capsys, "fa2", "--target", "sm_90", "--json")[0] == 1


def test_costs(
    monkeypatch: pytest.MonkeyPatch, prepared: CaseReport, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "costs.json"
    assert run(capsys, "fa2", "--target", "sm_90", "--as-costs", str(path))[0] == 0
    assert read_costs(str(path)) == []  # no simulation charges for the sample
    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=1, head_dim=128)
    charged = charges("fa2", problem, load_device("h100-sxm5"), {"impl": "triton"})["fa2_fwd"]
    launch = prepared.launches[0]
    loops = tuple(replace(loop, charged=charged) for loop in launch.loops)
    again = replace(prepared, launches=(replace(launch, loops=loops),))
    monkeypatch.setattr(auditing, "audit", lambda *_: Report("fa2", "sm_90", "triton", (again,)))
    assert run(capsys, "fa2", "--target", "sm_90", "--as-costs", str(path))[0] == 0
    (cost,) = read_costs(str(path))
    assert (cost.schedule, cost.target) == ("fa2", "sm_90")
    assert cost.options.items() >= {"impl": "triton", "BLOCK_M": 128, "BLOCK_N": 64}.items()
    assert cost.counts["exp"] == cost.charged["exp"] == 34
    assert cost.counts["issue"] > cost.counts["fma"] > 100
    code, _, err = run(capsys, "fa2", "--as-costs", str(tmp_path / "nowhere" / "costs.json"))
    assert code == 2
    assert "--as-costs" in err


def test_interruption(
    monkeypatch: pytest.MonkeyPatch, prepared: CaseReport, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(auditing, "audit", interrupted)
    code, out, err = run(capsys, "--json")
    assert code == 130
    assert json.loads(out) == {"passed": False, "complete": False, "reports": []}
    assert "interrupted after 0 of" in err


def test_bad_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(capsys, "fa22", "--target", "sm90")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 2
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, _, err = run(capsys)
    assert code == 2
    assert "pip install 'flashsim[kernels]'" in err
