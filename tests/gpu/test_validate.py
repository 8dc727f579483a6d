"""`flashsim validate`: what it asks for, reports, writes and refuses. The GPU is made up, where there has to be one."""

from __future__ import annotations

import csv
import importlib.util
import json
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashsim.analysis.accuracy import accuracy
from flashsim.cli import main
from flashsim.errors import InputError
from flashsim.gpu import validate as module
from flashsim.gpu import variants
from flashsim.gpu.clocks import State
from flashsim.gpu.timing import Times
from flashsim.gpu.validation import fields
from flashsim.gpu.variants import VARIANTS, chosen, problems
from flashsim.gpu.worker import WorkerDied
from flashsim.io.measured import COLUMNS, read_measured
from flashsim.problem import AttentionProblem

pytest.importorskip("torch")
pytest.importorskip("triton")

MACHINE = {
    "gpu": "NVIDIA H200",
    "capability": 90,
    "memory_byte": 150_000_000_000,
    "l2_byte": 60 << 20,
    "sms": 132,
    "uuid": "GPU-1",
    "driver": "580.1",
    "power_limit_w": 700.0,
    "max_sm_mhz": 1980,
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "cuda": "13.0",
}
STATE = State(1500.0, 3201.0, 650.0, 61.0, {"power cap": 0.5}, 40)
SPEED = {"fa3": 600e6, "SDPA cuDNN": 500e6, "SDPA math": 50e6}
"""FLOPs a microsecond of the GPU that is made up; of the others, the last number."""
SOME = [
    AttentionProblem(batch=1, heads_q=16, seqlen_q=1024, head_dim=128),
    AttentionProblem(batch=1, heads_q=16, seqlen_q=1024, head_dim=128, mask="causal", direction="bwd"),
    AttentionProblem(batch=1, heads_q=32, heads_kv=8, seqlen_q=1, seqlen_k=8192, head_dim=128),
    AttentionProblem(batch=1, heads_q=16, seqlen_q=1024, head_dim=128, dtype="fp8"),
]


class FakeGpu:
    """Stands in for the processes that run kernels."""

    def __init__(self, machine: Mapping[str, Any] = MACHINE) -> None:
        self.machine = dict(machine)
        self.failing: dict[str, dict[str, Any]] = {}
        self.dying: set[str] = set()
        """Kernels or variants that take their process with them; "later" does so while it is timed."""
        self.refused = {"SDPA math": "OutOfMemoryError: CUDA out of memory"}
        self.asked: list[Any] = []

    def reports(self, generator: str, request: dict[str, Any], *_: Any) -> Iterator[dict[str, Any]]:
        self.asked.append((generator, request))
        name = generator.replace("flashsim.gpu.", "").replace(":", "_")
        return getattr(self, name)(request)  # type: ignore[no-any-return]

    def clocks_describe(self, _: Any) -> Iterator[dict[str, Any]]:
        yield self.machine

    def exactness_work(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"tried": 5}
        if request["kernel"] in self.dying:
            raise WorkerDied("ended by signal 11\nillegal memory access")
        yield {"examples": request["examples"], "failure": self.failing.get(request["kernel"])}

    def variants_work(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for number, given in enumerate(request["problems"]):
            problem, times = AttentionProblem(**given), {}
            for variant in chosen(problem, request["kernels"], request["capability"]):
                if variant.name in request["left_out"]:
                    continue
                yield {"problem": number, "trying": variant.name}
                if variant.name in self.dying:
                    raise WorkerDied("ended by signal 11\nillegal memory access")
                if variant.name in self.refused:
                    times[variant.name] = Times(failure=self.refused[variant.name])
                    continue
                us = problem.flops / SPEED.get(variant.name, 100e6)
                times[variant.name] = Times([us, us * 1.01, us * 0.99], [us * 0.9] * 3)
            yield {"problem": number, "trying": ""}
            if "later" in self.dying and number == 1:
                self.dying.discard("later")
                raise WorkerDied("nothing came for 180 s")
            yield {
                "problem": number,
                "times": {name: asdict(value) for name, value in times.items()},
                "state": None if "clock_unknown" in self.machine else asdict(STATE),
            }

    def proton_work(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        events = [{"name": "softmax", "pid": "CTA0", "tid": "warp 4", "ts": 0, "dur": 1, "ph": "X"}]
        Path(request["path"]).write_text(json.dumps({"traceEvents": events}))
        yield {"consumers": 2}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(module, "reports", fake.reports)
    monkeypatch.setattr(module, "problems", lambda quick: SOME)
    return fake


def validated(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["validate", "--json", *arguments]) == code, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_rows_are_read_back_and_predicted(gpu: FakeGpu, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "h200.csv"
    found = validated(capsys, "--output", str(path))
    assert found["passed"]
    assert found["complete"]
    rows = read_measured(path)
    assert [row.id for row in rows] == [m["id"] for m in found["measurements"]]
    by_name = {(row.schedule, row.options.get("impl", ""), row.direction): row for row in rows}
    ours = by_name["fa3", "gluon", "fwd"]
    assert (ours.device, ours.clock_mhz, ours.dtype, ours.batch, ours.heads_q) == ("h200-sxm", 1500, "fp16", 1, 16)
    assert ours.time_us == pytest.approx(SOME[0].flops / SPEED["fa3"], rel=1e-5)
    assert ours.value_kind == "measured"
    assert "torch 2.11.0+cu130, triton 3.6.0" in ours.source
    assert "warm L2" in ours.notes
    assert "power cap in 50% of the time" in ours.notes
    assert {"fa2", "standard", "fa1", "split_kv", "sdpa_cudnn", "sdpa_flash"} <= {row.schedule for row in rows}
    assert len({row.session for row in rows}) == 1

    report = accuracy(path)
    assert report.skipped["schedule sdpa_cudnn"] == 3
    assert report.skipped["schedule sdpa_flash"] == 1
    assert {p.row.schedule for p in report.predictions} >= {"fa2", "fa3", "split_kv", "standard", "fa1"}
    mine = {m["id"]: m["predicted_us"] for m in found["measurements"]}
    for prediction in report.predictions:
        assert prediction.clock_source == "row"
        assert mine[prediction.row.id] == pytest.approx(prediction.predicted_us)


def test_sessions(gpu: FakeGpu, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "sessions.toml").write_text("[before]\nclock_mhz = 1500\n", encoding="utf-8")
    validated(capsys, "fa3", "--output", str(tmp_path / "a.csv"))
    sessions = tomllib.loads((tmp_path / "sessions.toml").read_text(encoding="utf-8"))
    (session,) = {row.session for row in read_measured(tmp_path / "a.csv")}
    assert list(sessions) == ["before", session]
    known = sessions[session]
    assert known["gpu"] == "NVIDIA H200"
    assert (known["torch"], known["triton"], known["cuda"], known["driver"]) == (
        "2.11.0+cu130",
        "3.6.0",
        "13.0",
        "580.1",
    )
    assert known["power_limit_w"] == 700
    assert "clock_mhz" not in known


def test_what_the_report_says(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    found = validated(capsys)
    assert found["machine"]["gpu"] == "NVIDIA H200"
    assert found["gpu"] == "h200-sxm"
    assert [one["kernel"] for one in found["exactness"]] == [subject.kernel for subject in module.subjects_of([])]
    assert all(one["place"] == "cuda" and one["examples"] == 60 for one in found["exactness"])
    first = next(m for m in found["measurements"] if m["variant"] == "fa3")
    assert first["runs"] == 3
    assert first["warm_time_us"] == pytest.approx(0.9 * first["time_us"])
    assert first["error"] == pytest.approx(first["predicted_us"] / first["time_us"] - 1)
    assert first["state"]["sm_mhz"] == 1500
    cudnn = next(m for m in found["measurements"] if m["variant"] == "SDPA cuDNN")
    assert (cudnn["predicted_us"], cudnn["refused"]) == (None, "there is no schedule sdpa_cudnn")
    figure = found["figures"][0]
    assert (figure["ours"], figure["other"]) == ("fa3", "SDPA cuDNN")
    assert figure["speed"] == pytest.approx(1.2)
    assert any("SDPA math" in line and "out of memory" in line for line in found["not_run"])


def test_quick(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    assert {one["examples"] for one in validated(capsys, "fa3", "--quick")["exactness"]} == {30}
    (timed,) = [request for name, request in gpu.asked if name.endswith("variants:work")]
    assert timed["budget_s"] == module.QUICK_BUDGET_S


def test_what_people_are_told(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "fa3", "fa2"]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA H200, torch 2.11.0+cu130, triton 3.6.0" in said
    assert "fa3           exact: 60 random problems on the GPU" in said
    assert "1500 MHz  650 W" in said
    assert "fa3 is 1.200 times as fast as SDPA cuDNN" in said
    assert "there is no schedule sdpa_cudnn" in said
    assert said.endswith("all that was run passed\n")


def test_a_kernel_that_is_not_exact(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.failing["fa2"] = {"kind": "NotAccepted", "message": "wrong\nat 3", "problem": {}, "trial": "Trial(...)"}
    found = validated(capsys, code=1)
    assert not found["passed"]
    assert found["complete"]
    (failed,) = [one for one in found["exactness"] if not one["passed"]]
    assert (failed["kernel"], failed["failure"]["message"]) == ("fa2", "wrong\nat 3")
    assert any(m["variant"] == "fa2" for m in found["measurements"]), "it is timed all the same"
    assert main(["validate", "fa2"]) == 1
    said = capsys.readouterr().out
    assert (
        "fa2           FAILED: 60 random problems on the GPU; NotAccepted\n    wrong\n    at 3\n    Trial(...)" in said
    )
    assert said.endswith("failed: fa2\n")


def test_a_kernel_whose_process_dies_is_a_failure_and_is_not_timed(
    gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.dying.add("fa3")
    found = validated(capsys, code=1)
    (failed,) = [one for one in found["exactness"] if not one["passed"]]
    assert (failed["kernel"], failed["failure"]["kind"], failed["examples"]) == ("fa3", "WorkerDied", 5)
    assert "illegal memory access" in failed["failure"]["message"]
    assert "fa3" not in {m["variant"] for m in found["measurements"]}
    assert "fa3: not timed, since its process died" in found["not_run"]
    assert any(m["variant"] == "fa2" for m in found["measurements"])


def test_a_variant_whose_process_dies_while_it_is_timed_is_left_out_from_there_on(
    gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.dying.add("SDPA cuDNN")
    found = validated(capsys)
    assert "SDPA cuDNN" not in {m["variant"] for m in found["measurements"]}
    assert sum("it is left out from here on" in line for line in found["not_run"]) == 1
    assert {m["problem"]["direction"] for m in found["measurements"]} == {"fwd", "bwd"}
    timed = [request for name, request in gpu.asked if name.endswith("variants:work")]
    assert [len(request["problems"]) for request in timed] == [4, 4]
    assert timed[1]["left_out"] == ["SDPA cuDNN"]


def test_a_problem_at_which_the_process_dies_is_left_out(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.dying.add("later")
    found = validated(capsys)
    assert {m["problem"]["direction"] for m in found["measurements"]} == {"fwd"}
    assert any("all of them at bwd" in line and "nothing came for 180 s" in line for line in found["not_run"])


def test_what_was_finished_is_in_the_file_when_a_run_ends(
    gpu: FakeGpu, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / "rows.csv", gpu.variants_work
    lengths = []

    def interrupted(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for report in original(request):
            if report.get("times") and report["problem"] == 1:
                lengths.append(len(path.read_text(encoding="utf-8").splitlines()) - 1)
                raise KeyboardInterrupt
            yield report

    monkeypatch.setattr(gpu, "variants_work", interrupted)
    found = validated(capsys, "fa3", "fa2_backward", "--output", str(path), code=130)
    assert not found["complete"]
    assert not found["passed"]
    assert lengths == [len(read_measured(path))] == [len(found["measurements"])]
    assert lengths[0] > 0


def test_an_unknown_clock_is_said(gpu: FakeGpu, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gpu.machine["clock_unknown"] = "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    found = validated(capsys, "fa3", "--output", str(tmp_path / "rows.csv"))
    assert any("clock, power and temperature are unknown: nvidia-ml-py is not installed" in s for s in found["not_run"])
    assert all(row.clock_mhz is None for row in read_measured(tmp_path / "rows.csv"))
    assert any(m["predicted_us"] for m in found["measurements"])
    sessions = tomllib.loads((tmp_path / "sessions.toml").read_text(encoding="utf-8"))
    assert "nvidia-ml-py is not installed" in next(iter(sessions.values()))["clock_status"]


def test_a_gpu_without_a_device_file(gpu: FakeGpu, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gpu.machine["gpu"] = "NVIDIA H900 NVL"
    found = validated(capsys, "fa2", "--output", str(tmp_path / "rows.csv"), "--timelines", str(tmp_path))
    assert found["gpu"] is None
    assert all(m["predicted_us"] is None for m in found["measurements"])
    assert any("there is no device file for NVIDIA H900 NVL" in line for line in found["not_run"])
    assert {row.device for row in read_measured(tmp_path / "rows.csv")} == {"nvidia-h900-nvl"}
    assert set(accuracy(tmp_path / "rows.csv").skipped) == {"device nvidia-h900-nvl"}


def test_kernels_that_the_gpu_does_not_have(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.machine |= {"gpu": "NVIDIA A100-SXM4-80GB", "capability": 80}
    found = validated(capsys)
    assert found["gpu"] == "a100-sxm4-80gb"
    assert "fa3: does not exist for sm_80" in found["not_run"]
    assert not {"fa3", "fa3_triton"} & {one["kernel"] for one in found["exactness"]}
    assert not {"fa3", "fa3_triton"} & {m["variant"] for m in found["measurements"]}


def test_another_gpu_than_was_asked_for(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--gpu", "a100-sxm4-80gb"]) == 2
    said = capsys.readouterr().err
    assert "a100-sxm4-80gb is of compute capability 8.0, the GPU here, NVIDIA H200, is sm_90" in said


def test_timelines(gpu: FakeGpu, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "PROBLEM", AttentionProblem(batch=1, heads_q=1, seqlen_q=256, head_dim=128))
    folder = tmp_path / "new" / "folder"
    found = validated(capsys, "fa3", "--timelines", str(folder))
    names = ["fa3-h200-sxm-simulated.json", "fa3-h200-sxm-measured.json"]
    assert found["timelines"] == [str(folder / name) for name in names]
    simulated, measured = (json.loads((folder / name).read_text(encoding="utf-8")) for name in names)
    assert any(event["name"] == "softmax" for event in simulated["traceEvents"])
    assert measured["traceEvents"][0]["tid"] == "consumer 1 (warp 4)"


def test_proton_that_does_not_work(
    gpu: FakeGpu, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Any) -> Iterator[dict[str, Any]]:
        raise WorkerDied("ended with exit code 1\nRuntimeError: no CUPTI")
        yield

    monkeypatch.setattr(gpu, "proton_work", fails)
    monkeypatch.setattr(module, "PROBLEM", AttentionProblem(batch=1, heads_q=1, seqlen_q=256, head_dim=128))
    found = validated(capsys, "fa3", "--timelines", str(tmp_path))
    assert [Path(path).name for path in found["timelines"]] == ["fa3-h200-sxm-simulated.json"]
    assert "measured timeline: RuntimeError: no CUPTI" in found["not_run"]


def audits(*problems: str) -> Any:
    """In place of the audit, which takes a minute."""

    def audit(kernel: str, target: str) -> Any:
        cases = (SimpleNamespace(case=SimpleNamespace(label="D 128"), problems=problems),)
        return SimpleNamespace(kernel=kernel, target=target, exists=True, passed=not problems, cases=cases)

    return audit


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real processes, one in Triton's interpreter and one with the stand-in for Gluon."""
    monkeypatch.setattr("flashsim.gpu.audit.audit", audits())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = validated(capsys, "fa2", "fa3", "--examples", "2")
    places = {one["kernel"]: (one["place"], one["examples"], one["failure"]) for one in found["exactness"]}
    assert places == {"fa2": ("interpreter", 2, None), "fa3": ("stand-in", 2, None)}
    assert [(one["kernel"], one["target"]) for one in found["audits"]] == [("fa2", "sm_90"), ("fa3", "sm_90")]
    assert found["passed"]
    assert found["machine"]["gpu"] is None
    assert found["measurements"] == []
    (line,) = found["not_run"]
    assert "finds no CUDA GPU: kernels were not run on one, nothing was timed, and there are no timelines" in line


def test_an_audit_that_fails(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("flashsim.gpu.audit.audit", audits("fa2_fwd: spills"))
    gpu.machine |= {"gpu": None}
    found = validated(capsys, "fa2", "--gpu", "a100-sxm4-80gb", code=1)
    assert found["audits"] == [
        {"kernel": "fa2", "target": "sm_80", "exists": True, "passed": False, "problems": ["fa2_fwd: spills"]}
    ]
    assert main(["validate", "fa2"]) == 1
    said = capsys.readouterr().out
    assert "fa2           audit on sm_90: FAILED\n    D 128: fa2_fwd: spills" in said
    assert said.endswith("failed: fa2 (audit)\n")


def test_all_mistakes_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    arguments = ["fa22", "--gpu", "h2000", "--output", str(tmp_path / "no" / "rows.csv"), "--timelines", str(file)]
    assert main(["validate", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "did you mean 'fa2'?" in lines[0]
    assert "h2000" in lines[1]
    assert "there is no folder" in lines[2]
    assert "cannot make the folder" in lines[3]


@pytest.mark.parametrize("given", ["0", "-3", "many", "1.5", ""])
def test_bad_numbers_of_examples(capsys: pytest.CaptureFixture[str], given: str) -> None:
    assert main(["validate", "--examples", given]) == 2
    assert capsys.readouterr().err.startswith("error: --examples: ")


def test_an_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["validate", "--output", str(tmp_path)]) == 2
    assert "is not a regular file" in capsys.readouterr().err
    (tmp_path / "sessions.toml").write_text("not toml", encoding="utf-8")
    assert main(["validate", "--output", str(tmp_path / "rows.csv")]) == 2
    assert "sessions.toml: not valid TOML" in capsys.readouterr().err


def test_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else found(name, *a))
    assert main(["validate"]) == 2
    assert "validate needs torch: pip install 'flashsim[kernels]'" in capsys.readouterr().err


def test_problems() -> None:
    everything, few = problems(), problems(quick=True)
    assert len(everything) == 84
    assert len(few) == 46
    assert set(few) <= set(everything)
    first = everything[0]
    assert (first.direction, first.dtype, first.head_dim, first.seqlen_q, first.mask) == (
        "fwd",
        "fp16",
        128,
        16384,
        "full",
    )
    for p in everything:
        if p.seqlen_q > 1:
            assert (p.batch * p.seqlen_q, p.heads_q * p.head_dim) == (16384, 2048)


def test_variants_of_a_problem() -> None:
    names = {variant.name: variant for variant in VARIANTS.values()}
    forward, backward, decode, _ = SOME
    torchs = {"SDPA cuDNN", "SDPA flash", "SDPA math"}
    assert {v.name for v in chosen(forward, ["fa3", "fa2"], 90)} == {"fa3", "fa2"} | torchs
    assert {v.name for v in chosen(forward, ["fa3", "fa2"], 80)} == {"fa2"} | torchs
    assert chosen(backward, ["fa3", "fa2"], 90) == []
    assert {v.kernel for v in chosen(backward, ["fa2_backward"], 90)} == {"fa2_backward", None}
    assert {v.name for v in chosen(decode, list(names), 90)} == {"split_kv"} | torchs
    assert names["SDPA flash"].schedule_at(forward) == "fa2"
    assert names["SDPA flash"].schedule_at(decode) == "sdpa_flash"
    narrow = AttentionProblem(batch=1, heads_q=16, seqlen_q=1024, head_dim=128, dtype="fp8")
    assert {v.name for v in chosen(narrow, list(names), 90)} == {"fa3_fp8"}
    assert chosen(narrow, ["fa3"], 90) == []
    long = AttentionProblem(batch=1, heads_q=16, seqlen_q=16384, head_dim=128)
    assert "fa1" not in {v.name for v in chosen(long, ["fa1", "fa2"], 90)}


def test_columns_are_those_of_the_schema(gpu: FakeGpu, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    validated(capsys, "fa3", "--output", str(tmp_path / "rows.csv"))
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as stream:
        assert tuple(next(csv.reader(stream))) == COLUMNS


def test_torchs_backends_that_are_not_there_say_why() -> None:
    """On the CPU there is no cuDNN."""
    import torch

    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=4, head_dim=16)
    x = variants.Tensors(*(torch.randn(1, 4, 1, 16) for _ in range(4)))
    with pytest.raises(InputError) as caught:
        VARIANTS["SDPA cuDNN"].prepare(problem, x)
    assert caught.value.problems


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_torchs_attention_has_our_layout(direction: str) -> None:
    import torch

    problem = AttentionProblem(
        batch=2, heads_q=4, heads_kv=2, seqlen_q=5, head_dim=16, mask="causal", direction=direction
    )
    q, do = (torch.randn(2, 5, 4, 16) for _ in range(2))
    k, v = (torch.randn(2, 5, 2, 16) for _ in range(2))
    found = VARIANTS["SDPA math"].prepare(problem, variants.Tensors(q, k, v, do))()
    if direction == "fwd":
        assert found.shape == q.shape
        torch.testing.assert_close(found[:, 0], v[:, 0].repeat_interleave(2, dim=1))
    else:
        assert [g.shape for g in found] == [q.shape, k.shape, v.shape]


class Host:
    """The CPU in place of a GPU: what is issued is done at once."""

    class Event:
        def record(self) -> None:
            self.at = time.perf_counter()

        def passed(self) -> bool:
            return False

        def us_since(self, earlier: Any) -> float:
            return (self.at - earlier.at) * 1e6

    def event(self) -> Event:
        return self.Event()

    def clear_l2(self) -> None:
        pass

    def hold(self, seconds: float) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
def test_the_process_that_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the GPU: kernels run in Triton's interpreter."""
    from flashsim.gpu.interpreter import correct_interpreter

    correct_interpreter()
    monkeypatch.setattr(variants, "Cuda", Host)
    monkeypatch.setattr(variants, "DEVICE", "cpu")
    some = [
        AttentionProblem(batch=1, heads_q=1, seqlen_q=16, head_dim=16, direction=direction)
        for direction in ("fwd", "bwd")
    ]
    asked = {
        "problems": [fields(problem) for problem in some],
        "kernels": ["fa2", "fa2_backward"],
        "capability": 80,
        "uuid": "GPU-1",
        "budget_s": 1e-3,
        "left_out": ["SDPA flash"],
    }
    found = list(variants.work(asked))
    tried = [(report["problem"], report["trying"]) for report in found if "trying" in report]
    torchs = ["SDPA cuDNN", "SDPA math"]
    assert tried == [
        *((0, name) for name in ("fa2", *torchs, "")),
        *((1, name) for name in ("fa2_backward", "fa2_backward, deterministic", *torchs, "")),
    ]
    for report in (report for report in found if "times" in report):
        times = {name: Times(**value) for name, value in report["times"].items()}
        assert times.pop("SDPA cuDNN").failure
        assert all(value.failure is None and len(value.cold_us) >= 5 for value in times.values()), times
        assert json.loads(json.dumps(report)) == report


@pytest.mark.gpu
def test_on_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU")
    monkeypatch.setattr(module, "problems", lambda quick: SOME)
    found = validated(capsys, "fa2", "fa2_backward", "split_kv", "--examples", "5", "--output", str(tmp_path / "a.csv"))
    assert found["passed"]
    assert {row.schedule for row in read_measured(tmp_path / "a.csv")} >= {"fa2", "split_kv"}
