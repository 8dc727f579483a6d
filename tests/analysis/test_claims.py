"""Claims held against simulations: every file of the repository, and each quantity against another way to it."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from flashsim.analysis import claims as module
from flashsim.analysis.claims import Answer, Verdict, jobs_of, judge, run_claims, run_jobs
from flashsim.cli import main
from flashsim.devices import load_device
from flashsim.errors import Deadlock, InputError
from flashsim.io.claims import QUANTITIES, Claim, ClaimFile, is_claims, read_claims
from flashsim.problem import AttentionProblem
from flashsim.simulate import simulate

FOLDER = Path(__file__).parents[2] / "scenarios"
FILES = [path for path in sorted(FOLDER.glob("*.toml")) if is_claims(path)]
DIFFERS = 0.10
"""A claim that is further off says why."""

CASE = '[claim.case]\ngpu = "a100-sxm4-80gb"\nbatch = 2\nheads = 4\nseqlen = 300\nhead_dim = 64\n'
PROBLEM = AttentionProblem(batch=2, heads_q=4, seqlen_q=300, head_dim=64)


@functools.cache
def verdicts_of(name: str) -> list[Verdict]:
    """Each file is run once for all tests of this file."""
    return run_claims(read_claims(FOLDER / f"{name}.toml"))


def file_of(folder: Path, *claims: str) -> ClaimFile:
    path = folder / "claims.toml"
    path.write_text("\n".join(claims), encoding="utf-8")
    return read_claims(path)


def claim(quantity: str, schedule: str = "fa2", rest: str = "", than: str = "", says: str = "1") -> str:
    case = CASE + f'schedule = "{schedule}"\n'
    return f'[[claim]]\nclaim = "C"\nsource = "S"\nsays = {says}\nquantity = "{quantity}"\n{rest}\n{case}{than}\n'


def value(folder: Path, *arguments: str) -> float:
    (found,) = run_claims(file_of(folder, claim(*arguments)))
    assert found.simulated is not None
    assert found.simulated[0] == found.simulated[1]
    return found.simulated[0]


def said(low: float, high: float, values: tuple[float, ...], up_to: bool = False) -> Verdict:
    """The verdict on a claim that says *low* to *high*."""
    point = module.Point("", read_claims(FOLDER / "memory.toml").claims[0].points[0].case)
    made = Claim("C", "S", (low, high), "tflops", (point,), up_to=up_to)
    return Verdict(made, tuple((point, each) for each in values))


def test_there_are_files() -> None:
    assert [path.stem for path in FILES] == ["claims", "hbm-traffic", "memory"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_claim_of_a_file_runs(path: Path) -> None:
    verdicts = verdicts_of(path.stem)
    assert [verdict.failure for verdict in verdicts if verdict.failure] == []
    assert all(verdict.simulated is not None for verdict in verdicts)
    assert len(verdicts) == len(read_claims(path).claims)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_claim_that_differs_says_why_and_no_other(path: Path) -> None:
    for verdict in verdicts_of(path.stem):
        if max(verdict.below, verdict.above) > DIFFERS:
            assert verdict.claim.why, (verdict.claim.claim, verdict.simulated)
        if verdict.claim.why:
            assert not verdict.within, verdict.claim.claim


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_claim_stands_twice_in_a_file(path: Path) -> None:
    found = [(each.claim, each.source) for each in read_claims(path).claims]
    assert len(set(found)) == len(found)


def test_the_simulation_moves_what_the_theorems_count_to_the_byte() -> None:
    found = [v for v in verdicts_of("hbm-traffic") if v.claim.quantity == "hbm_formula_ratio" and not v.claim.l2]
    assert len(found) == 4
    assert all(verdict.simulated == (1.0, 1.0) for verdict in found), [verdict.simulated for verdict in found]


def test_memory_is_the_published_within_15_percent() -> None:
    verdicts = verdicts_of("memory")
    assert len(verdicts) == 14
    assert all(max(v.below, v.above) <= 0.15 for v in verdicts)


# Quantities, each by another way.


def test_what_a_simulation_says(tmp_path: Path) -> None:
    result = simulate(PROBLEM, "fa2", "a100-sxm4-80gb")
    moved = result.hbm_bytes.read + result.hbm_bytes.written
    expected = {
        "time_us": result.time_us,
        "tflops": result.tflops,
        "fraction": result.datasheet_fraction,
        "hbm_gb": moved / 1e9,
        "memory_mib": result.peak_memory_bytes / 2**20,
        "kernels": 1,
    }
    assert {quantity: value(tmp_path, quantity) for quantity in expected} == expected


def test_ratios_are_those_of_the_second_case(tmp_path: Path) -> None:
    fa2, standard = (simulate(PROBLEM, name, "a100-sxm4-80gb") for name in ("fa2", "standard"))
    than = '[claim.than]\nschedule = "standard"\n'
    moved = [result.hbm_bytes.read + result.hbm_bytes.written for result in (standard, fa2)]
    expected = {
        "time_ratio": standard.time_us / fa2.time_us,
        "hbm_ratio": moved[0] / moved[1],
        "memory_ratio": standard.peak_memory_bytes / fa2.peak_memory_bytes,
    }
    assert {quantity: value(tmp_path, quantity, "fa2", "", than) for quantity in expected} == expected
    assert min(expected.values()) > 1


@pytest.mark.parametrize("schedule", ["standard", "fa1", "fa2", "fa3"])
def test_memory_is_what_the_simulation_says_backward_too(tmp_path: Path, schedule: str) -> None:
    gpu = "h100-sxm5" if schedule == "fa3" else "a100-sxm4-80gb"
    problem = replace(PROBLEM, batch=1, heads_q=1, heads_kv=1, seqlen_q=64, seqlen_k=64, direction="fwd+bwd")
    rest = claim("memory_mib", schedule).replace("batch = 2", "batch = 1").replace("heads = 4", "heads = 1")
    text = rest.replace("seqlen = 300", 'seqlen = 64\ndirection = "fwd+bwd"').replace("a100-sxm4-80gb", gpu)
    (found,) = run_claims(file_of(tmp_path, text))
    assert found.simulated == (simulate(problem, schedule, gpu).peak_memory_bytes / 2**20,) * 2


@pytest.mark.parametrize("schedule", ["standard", "fa1", "fa2"])
def test_one_head_stands_for_all_without_an_l2(tmp_path: Path, schedule: str) -> None:
    gpu = load_device("a100-sxm4-80gb")
    gpu = replace(gpu, memory=replace(gpu.memory, l2_share_byte=0))
    moved = simulate(PROBLEM, schedule, gpu).hbm_bytes
    assert value(tmp_path, "hbm_gb", schedule, 'l2 = "none"') == (moved.read + moved.written) / 1e9
    if schedule != "fa1":  # whose heads are one CTA each: it reads nothing that another has read
        assert value(tmp_path, "hbm_gb", schedule) < value(tmp_path, "hbm_gb", schedule, 'l2 = "none"')


def test_rates_of_hardware(tmp_path: Path) -> None:
    case = '[claim.case]\ngpu = "h100-sxm5"\n'
    head = '[[claim]]\nclaim = "C"\nsource = "S"\nsays = 1\n'
    texts = [head + f'quantity = "{name}"\n{case}' for name in ("flop_per_exp", "flop_per_fp32_flop")]
    texts.append(head + 'quantity = "exp_time_fraction"\n' + case + "head_dim = 64\n")
    exp, fp32, fraction = (verdict.simulated for verdict in run_claims(file_of(tmp_path, *texts)))
    assert exp == pytest.approx((4096 / 16,) * 2, rel=1e-3)
    assert fp32 == (4096 / 256,) * 2
    assert fraction == pytest.approx((256 / 256,) * 2, rel=1e-3)  # 2 * (64 + 64) FLOPs for one exp


def test_errors_are_medians_over_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_seed(experiment: object, seed: int) -> dict[str, float]:
        return {"fp8-per-tensor": [6.0, 8.0, 1.0][seed], "fp8-fa3": [2.0, 2.0, 9.0][seed]}

    monkeypatch.setattr(module, "one_seed", one_seed)
    text = '[[claim]]\nclaim = "C"\nsource = "S"\nsays = 3\nquantity = "error_ratio"\ncase = { seeds = 3 }\n'
    (found,) = run_claims(file_of(tmp_path, text))
    assert found.simulated == (3.0, 3.0)


# Closed forms, by hand: one head, 128 queries and 128 keys, head dim 64, fp16; a tensor like Q has 16384 bytes.

Q_BYTE, LSE_BYTE, S_BYTE = 128 * 64 * 2, 128 * 4, 128 * 128 * 2


@pytest.mark.parametrize(
    ("schedule", "direction", "options", "expected"),
    [
        # copies of Q, K, V; Q, K in, S out; S in, P and LSE out; P, V in, O out
        ("standard", "fwd", "{}", 6 * Q_BYTE + 2 * Q_BYTE + 4 * S_BYTE + LSE_BYTE + 2 * Q_BYTE),
        # the same with two blocks of queries, each of which reads K and V
        ("standard", "fwd", "{ BLOCK_M = 64 }", 12 * Q_BYTE + 4 * S_BYTE + LSE_BYTE),
        # O = 0, L = -inf; K and V; for each of two blocks of keys Q in, O and L in and out
        ("fa1", "fwd", '{ build = "paper", BLOCK_N = 64 }', (1 + 2 + 2 * 3) * Q_BYTE + (1 + 2 * 2) * LSE_BYTE),
        # dQ = 0; K, V in, dK, dV out; for each of two blocks of keys Q, O, dO, L in, dQ in and out
        ("fa1", "bwd", '{ build = "paper", bwd_BLOCK_N = 64 }', (1 + 4 + 2 * 5) * Q_BYTE + 2 * LSE_BYTE),
        # Q in, O and LSE out; K and V for each of two blocks of queries
        ("fa2", "fwd", "{ BLOCK_M = 64 }", (2 + 2 * 2) * Q_BYTE + LSE_BYTE),
    ],
)
def test_closed_forms(tmp_path: Path, schedule: str, direction: str, options: str, expected: int) -> None:
    text = claim("time_us", schedule).replace("batch = 2", "batch = 3").replace("heads = 4", "heads = 5")
    text = text.replace("seqlen = 300", f'seqlen = 128\ndirection = "{direction}"\nset = {options}')
    case = file_of(tmp_path, text).claims[0].points[0].case
    assert module.formula_byte(case) == 15 * expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "direction"),
    [("standard", "fwd"), ("standard", "bwd"), ("fa1", "fwd"), ("fa1", "bwd"), ("fa2", "fwd")],
)
def test_closed_forms_hold_for_lengths_and_widths_that_differ(tmp_path: Path, schedule: str, direction: str) -> None:
    text = claim("hbm_formula_ratio", schedule, 'l2 = "none"')
    keys = f'seqlen = 200\nseqlen_k = 333\nhead_dim_v = 32\ndirection = "{direction}"'
    text = text.replace("seqlen = 300", keys + ('\nset = { build = "paper" }' if schedule == "fa1" else ""))
    (found,) = run_claims(file_of(tmp_path, text))
    assert found.simulated == (1.0, 1.0)


def test_a_causal_mask_leaves_its_part_of_the_closed_forms(tmp_path: Path) -> None:
    text = claim("time_us", "fa2").replace("seqlen = 300", 'seqlen = 128\nmask = "causal"\nset = { BLOCK_M = 64 }')
    text = text.replace("head_dim = 64", "head_dim = 256")  # 64 keys in a block
    case = file_of(tmp_path, text).claims[0].points[0].case
    assert module.formula_byte(case) == 8 * (4 * (2 + 2 * 0.75 * 2) * Q_BYTE + LSE_BYTE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "keys"),
    [
        ("fa1", ""),
        ("fa2", 'direction = "bwd"\n'),
        ("fa2", "kv_heads = 2\n"),
        ("fa2", "dropout = 0.1\n"),
        ("fa2", 'mask = "padding"\n'),
        ("standard", 'mask = "causal"\n'),
        ("split_kv", ""),
    ],
)
def test_what_has_no_closed_form_is_refused(tmp_path: Path, schedule: str, keys: str) -> None:
    with pytest.raises(InputError, match=f"claim\\[1\\]: there is no closed form for {schedule}"):
        run_claims(file_of(tmp_path, claim("hbm_formula_ratio", schedule).replace("heads = 4\n", "heads = 4\n" + keys)))


# Verdicts.


@pytest.mark.parametrize(
    ("says", "values", "simulated", "below", "above"),
    [
        ((2, 4), (2, 3), (2, 3), 0, 0),
        ((2, 4), (1, 3), (1, 3), 0.5, 0),
        ((2, 4), (6, 3), (3, 6), 0, 0.5),
        ((2, 4), (1, 5), (1, 5), 0.5, 0.25),
        ((4, 4), (5,), (5, 5), 0, 0.25),
        ((4, 4), (3,), (3, 3), 0.25, 0),
    ],
)
def test_how_far_off_a_claim_is(
    says: tuple[float, float], values: tuple[float, ...], simulated: tuple[float, float], below: float, above: float
) -> None:
    verdict = said(*says, values)
    assert (verdict.simulated, verdict.below, verdict.above) == (simulated, below, above)
    assert verdict.within == (below == above == 0)


def test_up_to_is_about_the_highest_value() -> None:
    assert said(4, 4, (1, 2, 4), up_to=True).within
    assert said(4, 4, (1, 2, 3), up_to=True).below == 0.25
    assert said(4, 4, (1, 2, 5), up_to=True).above == 0.25


def test_rounding_is_no_difference() -> None:
    assert said(4, 4, (4.015,)).within
    assert not said(4, 4, (4.025,)).within
    assert not said(4, 4, (3.975,)).within


# Runs.


def test_a_simulation_that_two_claims_need_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def count(problem: AttentionProblem, schedule: type, *arguments: object, **options: object) -> object:
        ran.append(schedule.__name__)
        return simulate(problem, schedule, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "simulate", count)
    than = '[claim.than]\nschedule = "standard"\n'
    file = file_of(tmp_path, claim("time_us"), claim("time_ratio", "fa2", "", than), claim("tflops"), claim("kernels"))
    assert len(run_claims(file)) == 4
    assert ran == ["FA2", "Standard"]


def test_everything_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    large = claim("time_us").replace("batch = 2", "batch = 2000000")
    with pytest.raises(InputError) as caught:
        run_claims(file_of(tmp_path, large, claim("time_us"), large.replace("heads = 4", "heads = 8")))
    places = [line.removeprefix(f"{tmp_path / 'claims.toml'}: ").split(":")[0] for line in caught.value.problems]
    assert places == ["claim[1]", "claim[3]"]


def test_a_claim_whose_simulation_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(problem: AttentionProblem, schedule: type, *arguments: object, **options: object) -> object:
        if schedule.__name__ == "Standard":
            raise Deadlock("everybody waits")
        return simulate(problem, schedule, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "simulate", fail)
    file = file_of(tmp_path, claim("time_us", "standard"), claim("time_us"))
    first, second = run_claims(file)
    assert (first.failure, first.simulated, first.within) == ("Deadlock: everybody waits", None, False)
    assert second.simulated is not None
    assert main(["run", file.path, "--json"]) == 1
    out, err = capsys.readouterr()
    assert [each["simulated"] is None for each in json.loads(out)["claims"]] == [True, False]
    assert "Deadlock: everybody waits" in err
    assert main(["run", file.path]) == 1


def test_a_mistake_in_a_schedule_file_is_a_failure_too(tmp_path: Path) -> None:
    text = "from flashsim.schedules.fa2 import FA2\n\nclass My(FA2):\n    def kernels(self, problem):\n        1 / 0\n"
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    (found,) = run_claims(file_of(tmp_path, claim("kernels", "./mine.py:My")))
    assert found.failure is not None
    assert "mine.py:5: ZeroDivisionError" in found.failure


def test_claims_of_which_a_simulation_is_missing_are_left_out(tmp_path: Path) -> None:
    than = '[claim.than]\nschedule = "standard"\n'
    file = file_of(tmp_path, claim("time_us"), claim("time_ratio", "fa2", "", than), claim("kernels"))
    first, _ = jobs_of(file.claims)
    done = judge(file.claims, dict(run_jobs([first])))
    assert [verdict.claim.quantity for verdict in done] == ["time_us", "kernels"]


def test_ctrl_c_leaves_the_claims_that_were_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(job: object) -> Answer:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_job", interrupt)
    file = file_of(tmp_path, claim("time_us"), claim("kernels"))
    assert main(["run", file.path, "--json"]) == 130
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["complete"], len(report["claims"])) == (False, 1)
    assert "interrupted after 0 of 1" in err


# The command.

KEYS = {
    *("claim", "source", "quantity", "unit", "says", "simulated", "within", "below", "above"),
    *("values", "l2", "up_to", "why", "failure"),
}


def test_json_keys_are_documented(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    than = '[claim.than]\nschedule = "standard"\n[claim.over]\nseqlen = [100, 200]\n'
    text = claim("memory_ratio", "fa2", 'why = "W"', than, "[0.5, 0.75]").replace("seqlen = 300\n", "")
    file = file_of(tmp_path, 'title = "T"', text)
    assert main(["run", file.path, "--json", "--output", str(tmp_path / "out.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == report
    assert set(report) == {"scenario", "title", "complete", "claims"}
    (found,) = report["claims"]
    assert set(found) == KEYS
    assert (found["says"], found["why"], found["unit"]) == ([0.5, 0.75], "W", "x")
    assert found["simulated"] == sorted(each["value"] for each in found["values"])
    assert [each["case"]["seqlen"] for each in found["values"]] == [100, 200]
    assert {each["than"]["schedule"] for each in found["values"]} == {"standard"}
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in text for key in KEYS)


def test_what_people_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    far = claim("kernels", "fa2", 'why = "the reason"', says="[2, 4]")
    file = file_of(tmp_path, 'title = "T"', far, claim("kernels"), claim("fraction", says="0.0001"))
    assert main(["run", file.path]) == 0
    title, head, _, first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert title == "T"
    assert head.split() == ["claim", "source", "says", "simulated", "verdict", "why"]
    assert first.split("  ")[-1].strip() == "the reason"
    assert "2 to 4 launches" in first
    assert "below by 50 %" in first
    assert "within" in second
    assert "0.01 %" in third
    assert "above by " in third


def test_run_says_all_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text(claim("time_u") + claim("time_ratio"), encoding="utf-8")
    assert main(["run", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "claim[1].quantity: unknown quantity 'time_u', did you mean 'time_us'?" in err
    assert "claim[2].than: is required" in err


def test_every_quantity_has_a_docstring() -> None:
    assert all(module.VALUES[name].__doc__ for name in QUANTITIES)
