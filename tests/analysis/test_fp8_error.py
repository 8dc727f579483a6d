"""The FP8 error experiment: each variant computes what it says, and the scenario gives the values of the paper."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashsim.analysis import fp8_error
from flashsim.analysis.fp8_error import VariantError, fp8_errors, fused_attention, seed_errors, summarize, with_outliers
from flashsim.cli import main
from flashsim.errors import InputError
from flashsim.io.experiment import VARIANTS, Experiment, read_experiment
from flashsim.numerics.fp8 import Blocks, emulated_attention, quantize
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to

SCENARIO = Path(__file__).parents[2] / "scenarios" / "fa3-fp8-error.toml"
SMALL = """
title = "Small"
[fp8_error]
seqlen = 200
head_dim = 24
heads = 2
seeds = 3
rows = 20
BLOCK_M = 64
BLOCK_N = 48
[[published]]
variant = "fp8-fa3"
rmse = 1e-2
source = "a test"
"""

Array = NDArray[np.float64]


@functools.cache
def errors_of_the_scenario() -> dict[str, VariantError]:
    """The scenario is run once for all tests of this file."""
    scenario = read_experiment(SCENARIO)
    return {error.variant: error for error in summarize(scenario, list(seed_errors(scenario.experiment)))}


def median(variant: str) -> float:
    value = errors_of_the_scenario()[variant].median
    assert value is not None
    return value


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_paper_s_values(variant: str) -> None:
    """Within a factor of 1.3; 1.5 without incoherent processing, which varies with the seed by a fifth."""
    error = errors_of_the_scenario()[variant]
    factor = 1.5 if variant == "fp8-fa3-no-incoherent-processing" else 1.3
    assert error.ratio is not None
    assert 1 / factor < error.ratio < factor, error


def test_the_paper_s_order() -> None:
    """Of all variants that are more than a tenth apart in the paper.

    `fp8-fa3` and `fp8-fa3-no-block-quantization` are not, 9.1e-3 and 9.3e-3, and chance puts one or the other first:
    e4m3 is a floating-point format, to which a scale matters little once no outlier is left.
    """
    errors = errors_of_the_scenario().values()
    for low, high in itertools.permutations(errors, 2):
        assert low.published is not None
        assert high.published is not None
        if low.published < high.published / 1.1:
            assert median(low.variant) < median(high.variant), (low.variant, high.variant)
    assert median("fp8-fa3") == pytest.approx(median("fp8-fa3-no-block-quantization"), rel=0.1)


def test_fa3_is_much_more_accurate_than_one_scale_per_tensor() -> None:
    """2.6 times, says the paper."""
    assert median("fp8-per-tensor") >= 2.3 * median("fp8-fa3")


def test_the_scenario_is_the_paper_s_experiment() -> None:
    experiment = read_experiment(SCENARIO).experiment
    assert experiment == Experiment()
    assert (experiment.seqlen, experiment.head_dim) == (8192, 128)
    assert experiment.heads >= 4
    assert all(len(error.rmse) == 5 for error in errors_of_the_scenario().values())
    published = {error.variant: error.published for error in errors_of_the_scenario().values()}
    assert list(published.values()) == [3.2e-4, 1.9e-4, 2.4e-2, 9.1e-3, 9.3e-3, 2.4e-2]


def test_inputs_have_outliers() -> None:
    """N(0, 1) + N(0, 100) * Bernoulli(0.001): variance 1.1, fourth moment 3 (0.999 + 0.001 * 101**2)."""
    x = with_outliers(np.random.default_rng(0), (1, 8192, 4, 128))
    assert abs(np.mean(x)) < 0.005
    assert np.mean(x**2) == pytest.approx(1.1, rel=0.01)
    assert np.mean(x**4) == pytest.approx(3 * (0.999 + 0.001 * 101**2), rel=0.1)
    normal = np.random.default_rng(0).standard_normal(x.shape)
    outlier = x != normal
    added = (x - normal)[outlier]
    assert np.mean(outlier) == pytest.approx(0.001, rel=0.05)
    assert np.std(added) == pytest.approx(10, rel=0.05)
    assert abs(np.corrcoef(added, normal[outlier])[0, 1]) < 0.05


def tensors(seed: int = 0) -> tuple[Array, Array, Array]:
    """Keys whose scores rise, so that the maximum moves in every tile."""
    rng = np.random.default_rng(seed)
    q, k, v = (with_outliers(rng, (1, 200, 2, 32)) for _ in range(3))
    return q, k * np.linspace(0.2, 2, 200)[:, None, None], v


@pytest.mark.parametrize("block", [None, 48])
@pytest.mark.parametrize(("dtype", "p_scale"), [("fp16", 1.0), ("e4m3", 256.0)])
def test_fused_attention_is_the_textbook_s_loop(
    block: int | None, dtype: str, p_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, tile by tile, O rescaled in every step; some rows, a few at a time, and O not rounded to fp16."""
    q, k, v = (quantize(x, None if block is None else tile) for x, tile in zip(tensors(), (64, 48, 48), strict=True))
    rows = np.array([0, 3, 63, 64, 65, 150, 199])
    monkeypatch.setattr(fp8_error, "MAX_SCORES", 3 * 200)
    monkeypatch.setattr(fp8_error, "round_to", lambda x, _: x)
    found = fused_attention(q, k, v, rows, dtype, 48, 0.2)
    expected = np.empty((1, len(rows), 2, 32))
    for head in range(2):
        m, total, acc = np.full(len(rows), -np.inf), np.zeros(len(rows)), np.zeros((len(rows), 32))
        for first in range(0, 200, 48):
            tile = slice(first, first + 48)
            s = q.values[0, rows, head] @ k.values[0, tile, head].T * 0.2
            highest = np.maximum(m, s.max(axis=1))
            p, rescale = np.exp(s - highest[:, None]), np.exp(m - highest)
            total = total * rescale + p.sum(axis=1)
            rounded = round_to(p * p_scale, dtype) / p_scale
            acc = acc * rescale[:, None] + rounded @ v.values[0, tile, head]
            m = highest
        expected[0, :, head] = acc / total[:, None]
    # A P of float32 may lie on the other side of a rounding boundary; that is rare.
    unfused = attention_reference(q.values[:, rows], k.values, v.values, scale=0.2)[0]
    assert 0 < np.abs(found - expected).mean() < 0.05 * np.abs(found - unfused).mean()
    assert np.abs(found - unfused).max() < (0.01 if dtype == "fp16" else 0.3)


def test_one_tile_is_the_twin_of_fp8_kernels() -> None:
    q, k, v = (quantize(x, None) for x in tensors())
    found = fused_attention(q, k, v, np.arange(200), "e4m3", 200, 32**-0.5)
    twin = emulated_attention(q.values, k.values, v.values, "fp16")
    assert np.mean(found != twin) < 0.02
    assert np.abs(found - twin).max() < 0.01


@pytest.mark.parametrize("dtype", ["fp16", "e4m3"])
def test_probabilities_are_rounded_once(dtype: str) -> None:
    """Numbers, ties and neighbors of ties, down to the smallest subnormal and to zero."""
    steps = np.arange(2**12, 2**13) / 2**12
    x = (steps * 2.0 ** np.arange(-26, 8)[:, None]).ravel()
    x = np.concatenate([[0.0, 448.0], x, np.nextafter(x.astype(np.float32), np.float32(0))]).astype(np.float32)
    np.testing.assert_array_equal(fp8_error.round_p(x, dtype), round_to(x, dtype))


def outputs(q: Array, k: Array, v: Array, rows: Array, variants: Sequence[str] = VARIANTS) -> dict[str, Array]:
    experiment = Experiment(head_dim=q.shape[3], BLOCK_M=64, BLOCK_N=48, variants=list(variants))
    return dict(fp8_error._outputs(experiment, 0, q, k, v, rows))


def rmse(o: Array, truth: Array) -> float:
    return float(np.sqrt(np.mean((o - truth) ** 2)))


def test_some_rows_are_those_of_all_rows() -> None:
    """Scales come from all rows of Q, K and V, whichever rows of O are looked at."""
    rows = np.array([1, 70, 199])
    some, whole = (outputs(*tensors(), x) for x in (rows, np.arange(200)))
    assert list(some) == list(VARIANTS)
    for variant, o in some.items():
        np.testing.assert_allclose(o, whole[variant][:, rows], rtol=2e-3, atol=2e-5, err_msg=variant)


@pytest.mark.parametrize("loud", range(3))
def test_one_scale_for_all_heads_or_one_for_each_tile(loud: int) -> None:
    """A head of large numbers in Q, K or V spoils the other where they share a scale, and changes no bit elsewhere."""
    plain = tensors()
    changed = [x * np.array([1e6, 1])[:, None] if i == loud else x for i, x in enumerate(plain)]
    before, after = (outputs(q, k, v, np.arange(200), VARIANTS[2:]) for q, k, v in (plain, changed))
    truth = attention_reference(*plain)[0][:, :, 1]
    for variant in ("fp8-per-tensor", "fp8-fa3-no-block-quantization"):
        assert rmse(after[variant][:, :, 1], truth) > 3 * rmse(before[variant][:, :, 1], truth), variant
    for variant in ("fp8-fa3", "fp8-fa3-no-incoherent-processing"):
        np.testing.assert_array_equal(after[variant][:, :, 1], before[variant][:, :, 1], err_msg=variant)


def test_incoherent_processing_saves_the_rest_of_a_tile_from_an_outlier() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 192, 2, 64)) for _ in range(3))
    q[0, 5, 1, 7] = 60_000
    rows = np.delete(np.arange(64), 5)  # the rest of the first tile of Q
    truth = attention_reference(q, k, v)[0][:, rows, 1]
    error = {name: rmse(o[:, :, 1], truth) for name, o in outputs(q, k, v, rows).items()}
    assert error["fp8-fa3-no-incoherent-processing"] > 1.5 * error["fp8-fa3"]
    assert error["fp8-per-tensor"] > 1.5 * error["fp8-fa3-no-block-quantization"]


def test_fp8_variants_round_p_to_e4m3() -> None:
    """Q, K and V of -1, 0 and 1 are exact in e4m3; what is lost is lost in P."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(-1, 2, (1, 200, 2, 32)).astype(float) for _ in range(3))
    truth = attention_reference(q, k, v)[0]
    error = {name: rmse(o, truth) for name, o in outputs(q, k, v, np.arange(200)).items()}
    for variant in ("fp8-per-tensor", "fp8-fa3-no-incoherent-processing"):
        assert 20 * error["fp16-fa3"] < error[variant] < 200 * error["fp16-fa3"], variant


def test_fp16_variants_round_where_they_say() -> None:
    """fp16 inputs, of which FA3 loses little and the standard, which rounds S, loses more."""
    q, k, v = (round_to(x, "fp16") for x in tensors())
    rows = np.arange(200)
    truth = attention_reference(q, k, v)[0]
    error = {name: rmse(o, truth) for name, o in outputs(q, k, v, rows, VARIANTS[:2]).items()}
    ideal = rmse(round_to(truth, "fp16"), truth)
    assert ideal <= error["fp16-fa3"] < 2 * ideal
    assert error["fp16-standard"] > 2 * error["fp16-fa3"]


def test_the_standard_rounds_k_s_p_and_o() -> None:
    """NumPy's float16 where `attention_ref` of FlashAttention-3's tests has a tensor, float64 between them."""
    half = np.float16
    q, k, v = (x.astype(half) for x in tensors())
    scaled = (k.astype(np.float64) / 32**0.5).astype(half)
    s = np.einsum("bthd,bshd->bhts", q.astype(np.float64), scaled.astype(np.float64)).astype(half).astype(np.float64)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p = (p / p.sum(axis=-1, keepdims=True)).astype(half)
    expected = np.einsum("bhts,bshd->bthd", p.astype(np.float64), v.astype(np.float64)).astype(half)
    found = outputs(*tensors(), np.arange(200), ["fp16-standard"])["fp16-standard"]
    assert np.mean(found != expected) < 0.05


def test_seeds_differ_and_are_repeatable() -> None:
    sizes: dict[str, Any] = {"seqlen": 64, "head_dim": 16, "heads": 1, "seeds": 3}
    first, second = fp8_errors(**sizes), fp8_errors(**sizes)
    assert first == second
    assert [error.variant for error in first] == list(VARIANTS)
    assert all(len(set(error.rmse)) == 3 for error in first)
    (only,) = fp8_errors(**sizes, variants=["fp8-fa3"])
    assert only == first[3]
    assert fp8_errors(**sizes, rows=64) == fp8_errors(**sizes, rows=9999)


def test_a_head_dim_that_is_padded() -> None:
    """24 columns become 32 for the Hadamard matrix; scores keep the scale of 24."""
    q, k, v = (x[..., :24] for x in tensors())
    truth = attention_reference(q, k, v)[0]
    error = {name: rmse(o, truth) for name, o in outputs(q, k, v, np.arange(200)).items()}
    assert error["fp16-fa3"] < 1e-3
    assert error["fp8-fa3"] < 1.3 * error["fp8-fa3-no-incoherent-processing"] < 0.1


def test_bad_values_are_all_said() -> None:
    with pytest.raises(InputError) as caught:
        fp8_errors(seqlen=0, heads=2.5, variants=["fp8-fa4"], row=3)
    assert [line.split(":")[0] for line in caught.value.problems] == ["seqlen", "heads", "variants[1]", "fp8_errors"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def test_run_prints_a_table(capsys: pytest.CaptureFixture[str], small: Path) -> None:
    assert main(["run", str(small)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[:2] == ["Small", "seqlen 200, head_dim 24, heads 2, tile 64 x 48"]
    table = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("fp")}
    assert list(table) == list(VARIANTS)
    value, low, high, published, ratio = table["fp8-fa3"]
    assert float(low) <= float(value) <= float(high)
    assert published == "1.00e-02"
    assert float(ratio) == pytest.approx(float(value) / 1e-2, abs=0.01)
    assert table["fp8-per-tensor"][-2:] == ["-", "-"]
    assert any("20 rows of O" in line and "3 seeds" in line for line in lines)
    assert lines[-1] == "published: a test"
    assert max(map(len, lines)) <= 100


def test_run_json(capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out.json"
    assert main(["run", str(small), "--json", "--output", str(copy)]) == 0
    text = capsys.readouterr().out
    assert copy.read_text(encoding="utf-8") == text
    report = json.loads(text)
    assert (report["scenario"], report["title"], report["complete"]) == (str(small), "Small", True)
    assert report["fp8_error"] == read_experiment(small).experiment.model_dump()
    assert [entry["variant"] for entry in report["variants"]] == list(VARIANTS)
    for entry in report["variants"]:
        values = entry["rmse"]
        assert len(values) == 3
        assert (entry["min"], entry["median"], entry["max"]) == tuple(sorted(values))
    found = report["variants"][3]
    assert (found["published"], found["source"]) == (1e-2, "a test")
    assert found["ratio"] == pytest.approx(found["median"] / 1e-2)
    assert [report["variants"][0][key] for key in ("published", "source", "ratio")] == [None] * 3


@pytest.mark.parametrize("finished", [0, 1])
def test_ctrl_c_leaves_the_seeds_that_were_finished(
    capsys: pytest.CaptureFixture[str], small: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    def one_seed(experiment: Experiment, seed: int) -> dict[str, float]:
        if seed == finished:
            raise KeyboardInterrupt
        return dict.fromkeys(experiment.variants, 0.5)

    monkeypatch.setattr(fp8_error, "one_seed", one_seed)
    assert main(["run", str(small), "--json"]) == 130
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert f"interrupted after {finished} of 3" in err
    assert report["complete"] is False
    assert report["variants"][0]["rmse"] == [0.5] * finished
    assert report["variants"][0]["median"] == (0.5 if finished else None)
    assert main(["run", str(small)]) == 130
    assert ("5.00e-01" in capsys.readouterr().out) == bool(finished)


def test_run_says_all_mistakes(capsys: pytest.CaptureFixture[str], small: Path) -> None:
    small.write_text(SMALL.replace("heads = 2", "head = 2").replace("fp8-fa3", "fp8-fa"), encoding="utf-8")
    assert main(["run", str(small)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "fp8_error: unknown key 'head', did you mean 'heads'?" in err
    assert "published[1].variant: unknown variant 'fp8-fa', did you mean 'fp8-fa3'?" in err


def test_scales_of_blocks_reach_their_rows() -> None:
    """Each tile of K and V with its own scale, each row of Q with its tile's: nothing else is told apart by them."""
    codes = np.ones((1, 4, 1, 1))
    scales = [np.array(x, dtype=float)[None, :, None] for x in ([1, 2], [0, 3], [5, 7])]
    q, k, v = (Blocks(codes, scale, 2) for scale in scales)
    o = fused_attention(q, k, v, np.arange(4), "fp16", 2, 1.0)[0, :, 0, 0]
    weight = np.exp([3, 3, 6, 6]) / (1 + np.exp([3, 3, 6, 6]))
    np.testing.assert_allclose(o, 5 * (1 - weight) + 7 * weight, rtol=2e-3)
