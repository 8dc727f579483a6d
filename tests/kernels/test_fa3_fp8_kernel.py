"""kernels/fa3_fp8.py, kernels/quantize_fp8.py: FP8 attention, as exact on what was quantized as its twin in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from kernel_tests import case_of, examples, tiled_cases  # noqa: E402

from flashsim.analysis.fp8_error import fused_attention, with_outliers  # noqa: E402
from flashsim.numerics.compare import compare_fp8  # noqa: E402
from flashsim.numerics.fp8 import Blocks, emulated_attention, fp8_bounds, quantize  # noqa: E402
from flashsim.numerics.hadamard import hadamard_transform  # noqa: E402
from flashsim.numerics.reference import attention_reference  # noqa: E402
from flashsim.numerics.rounding import FORMATS, round_to, saturate  # noqa: E402
from flashsim.testing import KINDS, AttentionCase, Layout, layouts  # noqa: E402
from flashsim_kernels import fa3_fp8 as module  # noqa: E402
from flashsim_kernels import quantize_fp8 as quantize_module  # noqa: E402
from flashsim_kernels.arguments import ArgumentError  # noqa: E402
from flashsim_kernels.fa3_fp8 import fa3_fp8, fa3_fp8_quantized  # noqa: E402
from flashsim_kernels.quantize_fp8 import quantize_fp8  # noqa: E402

Tiled = tuple[AttentionCase, dict[str, int]]
Array = NDArray[np.float64]
MASKS = ("full", "causal")
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32}
FEW = case_of(batch=1, heads_q=2, heads_kv=1, seqlen_q=17)
OUT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def numbers(x: Any) -> Array:
    found: Array = x.double().numpy()
    return found


def values(codes: Any, scale: Any, block: int) -> Array:
    """What codes stand for."""
    return Blocks(numbers(codes), numbers(scale), block).values


def judge(o: Any, lse: Any, q: Array, k: Array, v: Array, mask: str, scale: float) -> None:
    """The rule for FP8: as good as unfused attention of the same numbers that rounds where the kernel does."""
    dtype = OUT[o.dtype]
    exact = attention_reference(q, k, v, mask, scale)
    twin = emulated_attention(q, k, v, dtype, mask, scale)
    found = compare_fp8(numbers(o), numbers(lse), *exact, twin, fp8_bounds(q, k, v, dtype, mask, scale))
    assert found.accepted, found.broken


def judge_case(
    case: AttentionCase,
    tile: dict[str, int],
    layout: Layout | None = None,
    incoherent: bool = True,
    seed: int = 0,
    **options: Any,
) -> tuple[Any, Any]:
    """O and LSE, of the two steps that `fa3_fp8` is made of."""
    q, k, v = case.torch("cpu", layout)
    rows, keys = tile["BLOCK_M"], tile["BLOCK_N"]
    how = {"incoherent": incoherent, "seed": seed}
    tensors = quantize_fp8(q, rows, **how), quantize_fp8(k, keys, **how), quantize_fp8(v, keys, transposed=True)
    codes, scales = zip(*tensors, strict=True)
    scale = case.problem.head_dim**-0.5
    o, lse = fa3_fp8_quantized(
        *codes, *scales, q_block=rows, k_block=keys, causal=case.causal, scale=scale, return_lse=True, **tile, **options
    )
    blocks = rows, keys, keys
    judge(o, lse, *(values(*x, block) for x, block in zip(tensors, blocks, strict=True)), case.mask, scale)
    return o, lse


def at_least_32(tile: dict[str, int]) -> dict[str, int]:
    return tile | {"BLOCK_N": max(32, tile["BLOCK_N"])}


@examples()
@given(tiled_cases(5e5, masks=MASKS), layouts(), st.booleans(), st.integers(0, 99), st.sampled_from(list(OUT)))
def test_exact(tiled: Tiled, layout: Layout, incoherent: bool, seed: int, out_dtype: Any) -> None:
    case, tile = tiled
    judge_case(case, at_least_32(tile), layout, incoherent=incoherent, seed=seed, out_dtype=out_dtype)


def judge_both_ways(case: AttentionCase, tile: dict[str, int], layout: Layout | None, incoherent: bool) -> None:
    o, lse = judge_case(case, tile, incoherent=incoherent, seed=5)
    once = fa3_fp8(
        *case.torch("cpu", layout), causal=case.causal, incoherent=incoherent, seed=5, return_lse=True, **tile
    )
    assert torch.equal(o, once[0])
    assert torch.equal(lse, once[1])


@examples(dev=3, ci=12, nightly=60)
@given(tiled_cases(1e6, masks=MASKS), layouts(), st.booleans())
def test_both_steps_in_one_call(tiled: Tiled, layout: Layout, incoherent: bool) -> None:
    case, tile = tiled
    judge_both_ways(case, at_least_32(tile), layout, incoherent)


@pytest.mark.parametrize("incoherent", [False, True])
@pytest.mark.parametrize("head_dims", [(40, 80), (96, 16), (16, 24)])
def test_head_dims_that_are_padded(head_dims: tuple[int, int], incoherent: bool) -> None:
    """The scale of the scores is that of the head dim that was given."""
    d, d_v = head_dims
    case = case_of(batch=1, heads_q=2, heads_kv=1, seqlen_q=20, seqlen_k=40, head_dim=d, head_dim_v=d_v)
    judge_both_ways(case, SMALL, None, incoherent)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_values(kind: str) -> None:
    judge_case(case_of(kind, batch=1, heads_q=1, heads_kv=1), SMALL)


@examples(dev=3, ci=12, nightly=50)
@given(tiled_cases(masks=MASKS, head_dims=(192, 256), max_flops=4e6), st.booleans())
def test_wide_heads(tiled: Tiled, incoherent: bool) -> None:
    case, tile = tiled
    judge_case(case, at_least_32(tile), incoherent=incoherent)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 239), (128, 128), (150, 31)])
def test_with_the_tiles_of_the_launch_table(mask: str, seqlens: tuple[int, int]) -> None:
    case = case_of(mask=mask, seqlen_q=seqlens[0], seqlen_k=seqlens[1], batch=1, heads_q=2, heads_kv=1)
    o, lse = judge_case(case, {"BLOCK_M": 128, "BLOCK_N": 128})
    again = fa3_fp8(*case.torch(), causal=case.causal, return_lse=True)
    assert torch.equal(o, again[0])
    assert torch.equal(lse, again[1])


# Quantization.


@examples()
@given(tiled_cases(), layouts(), st.sampled_from([16, 32, 64]), st.booleans())
def test_quantization(tiled: Tiled, layout: Layout, block: int, transposed: bool) -> None:
    """Scales are max|x| / 448 in fp32, codes x / scale rounded to fp32 and then to e4m3."""
    x = tiled[0].torch("cpu", layout)[1]
    codes, scale = quantize_fp8(x, block, transposed=transposed)
    expected = quantize(numbers(x), block)
    np.testing.assert_array_equal(numbers(scale), expected.scales)
    quotients = numbers(x) / np.repeat(expected.scales, block, axis=1)[:, : x.shape[1], :, None]
    np.testing.assert_array_equal(numbers(codes), round_to(saturate(round_to(quotients, "fp32"), "e4m3"), "e4m3"))
    assert codes.stride(1 if transposed else 3) == 1
    assert not any(n % 16 for n in (codes.data_ptr(), codes.stride(0), codes.stride(2)))


@examples(dev=8, ci=30, nightly=100)
@given(tiled_cases(), st.sampled_from([16, 32, 64]), st.integers(0, 2**31 - 1))
def test_incoherent_processing(tiled: Tiled, block: int, seed: int) -> None:
    """x diag(signs) H / sqrt(D'), with the signs that a unit matrix shows; rounded as e4m3 is."""
    x = tiled[0].torch()[1]
    codes, scale = quantize_fp8(x, block, incoherent=True, seed=seed)
    signs = signs_of(seed, codes.shape[3])
    padded = np.zeros((*x.shape[:3], codes.shape[3]))
    padded[..., : x.shape[3]] = numbers(x)
    expected = hadamard_transform(padded * signs)
    largest = quantize(expected, block).scales
    # Sums of D' numbers in fp32, one after the other log2(D') times.
    size = np.abs(padded).sum(axis=3).max(initial=0.0)
    np.testing.assert_allclose(
        numbers(scale), np.where(largest == 1, numbers(scale), largest), rtol=1e-5, atol=1e-6 * size
    )
    scales = np.repeat(numbers(scale), block, axis=1)[:, : x.shape[1], :, None]
    error = np.abs(numbers(codes) * scales - expected)
    assert (error <= np.abs(expected) / 16 + scales * 2**-10 + 1e-6 * size).all()


def signs_of(seed: int, dim: int) -> Array:
    rows = torch.eye(dim, dtype=torch.float16)[None, :, None]
    block = min(dim, 256)
    codes, scale = quantize_fp8(rows, block, incoherent=True, seed=seed)
    matrix = numbers(codes)[0, :, 0] / FORMATS["e4m3"].max
    signs: Array = matrix[:, 0]
    np.testing.assert_array_equal(matrix, signs[:, None] * np.rint(hadamard_transform(np.eye(dim)) * dim**0.5))
    np.testing.assert_allclose(numbers(scale), dim**-0.5 / 448, rtol=1e-6)
    return signs


def test_signs_are_random() -> None:
    signs = np.array([signs_of(seed, 128) for seed in range(8)])
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert np.abs(signs.mean()) < 0.1
    overlap = signs @ signs.T / 128
    assert np.abs(overlap[~np.eye(8, dtype=bool)]).max() < 0.5


def test_blocks_of_zeros_have_scale_one() -> None:
    x = torch.zeros(1, 48, 1, 16, dtype=torch.bfloat16)
    x[0, 20, 0, 3] = -7
    codes, scale = quantize_fp8(x, 16)
    assert scale.flatten().tolist() == [1, numbers(torch.tensor(7 / 448)).item(), 1]
    assert codes.float().abs().sum() == 448


# Tensors that are quantized already.


def quantized(case: AttentionCase, transposed: bool = True) -> tuple[Any, ...]:
    q, k, v = case.torch()
    pairs = quantize_fp8(q, 16), quantize_fp8(k, 32), quantize_fp8(v, 32, transposed=transposed)
    return (*(codes for codes, _ in pairs), *(scale for _, scale in pairs))


@pytest.mark.parametrize("mask", MASKS)
def test_v_by_rows_or_by_columns(mask: str) -> None:
    case = case_of(mask=mask, batch=1)
    options = {"q_block": 16, "k_block": 32, "causal": case.causal, "return_lse": True, **SMALL}
    by_rows, by_columns = (fa3_fp8_quantized(*quantized(case, transposed), **options) for transposed in (False, True))
    assert torch.equal(by_rows[0], by_columns[0])
    assert torch.equal(by_rows[1], by_columns[1])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("blocks", [(16, 64), (32, 32), (64, 96), (1024, 1024)])
def test_a_scale_for_more_rows_than_a_tile(blocks: tuple[int, int], mask: str) -> None:
    case = case_of(mask=mask, seqlen_q=70, seqlen_k=130, batch=1)
    parts = [quantize(numbers(x), block) for x, block in zip(case.torch(), (*blocks, blocks[1]), strict=True)]
    codes = [torch.from_numpy(x.codes).to(torch.float8_e4m3fn) for x in parts]
    scales = [torch.from_numpy(x.scales).float() for x in parts]
    o, lse = fa3_fp8_quantized(
        *codes, *scales, q_block=blocks[0], k_block=blocks[1], causal=case.causal, return_lse=True,
        out_dtype=torch.float16, **SMALL,
    )  # fmt: skip
    judge(o, lse, *(x.values for x in parts), mask, 32**-0.5)


@pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e10])
def test_scales_that_differ_by_much(factor: float) -> None:
    """Of blocks of V and of K: no scale is a factor of what other blocks have added."""
    case = case_of(mask="full", dtype="bf16", batch=1, heads_q=2, heads_kv=1)
    q, k, v = case.torch()
    v[:, 32:64] *= factor
    k[:, :32] *= min(factor, 1.0)
    o, lse = fa3_fp8(q, k, v, incoherent=False, return_lse=True, **SMALL)
    parts = [values(*quantize_fp8(x, block), block) for x, block in ((q, 16), (k, 32), (v, 32))]
    judge(o, lse, *parts, "full", 32**-0.5)


def test_fp32_output_is_what_others_round() -> None:
    o = fa3_fp8(*FEW.torch(), out_dtype=torch.float32, **SMALL)
    for dtype in OUT:
        assert torch.equal(o.to(dtype), fa3_fp8(*FEW.torch(), out_dtype=dtype, **SMALL))


# What the paper is after.


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


def per_tensor(tensors: list[Array], **options: Any) -> tuple[Any, list[Blocks]]:
    """O with one scale for each tensor, and the tensors as quantized."""
    parts = [quantize(x, None) for x in tensors]
    codes = [torch.from_numpy(x.codes).to(torch.float8_e4m3fn) for x in parts]
    scales = [torch.from_numpy(x.scales).float() for x in parts]
    seqlen = tensors[0].shape[1]
    return fa3_fp8_quantized(*codes, *scales, q_block=seqlen, k_block=seqlen, **options), parts


def test_outliers_are_spread() -> None:
    """Section 4.3 in small: over three seeds, the error is less than with one scale and without the matrix."""
    options = {"BLOCK_M": 128, "BLOCK_N": 128, "out_dtype": torch.float16}
    errors: dict[str, list[float]] = {"baseline": [], "fa3": [], "no incoherent processing": []}
    for seed in (1, 2, 3):
        generator = np.random.default_rng(seed)
        tensors = [round_to(with_outliers(generator, (1, 384, 1, 128)), "fp16") for _ in range(3)]
        exact, _ = attention_reference(*tensors)
        given = [torch.from_numpy(x).half() for x in tensors]
        baseline, parts = per_tensor(tensors, **options)
        emulated = fused_attention(*parts, np.arange(384), "e4m3", 128, 128**-0.5)
        assert rms(numbers(baseline) - exact) == pytest.approx(rms(emulated - exact), rel=1e-4)
        errors["baseline"].append(rms(numbers(baseline) - exact))
        errors["fa3"].append(rms(numbers(fa3_fp8(*given, **options)) - exact))
        errors["no incoherent processing"].append(rms(numbers(fa3_fp8(*given, incoherent=False, **options)) - exact))
    fa3 = np.mean(errors.pop("fa3"))
    for other in errors.values():
        assert fa3 < 0.85 * np.mean(other)


def test_a_block_of_small_numbers_keeps_its_digits() -> None:
    """Rows that see it alone. With one scale for the tensor it is zero."""
    tensors = [np.random.default_rng(n).standard_normal((1, 64, 1, 16)) for n in range(3)]
    tensors[2][:, :32] *= 2e-6
    tensors = [round_to(x, "bf16") for x in tensors]
    options = {"BLOCK_M": 32, "BLOCK_N": 32, "causal": True}
    exact = attention_reference(*tensors, "causal")[0][:, :32]
    o = numbers(fa3_fp8(*(torch.from_numpy(x).bfloat16() for x in tensors), **options))[:, :32]
    assert rms(o - exact) < 0.1 * rms(exact)
    assert not per_tensor(tensors, **options)[0][:, :32].any()


# Edge cases, and the operators.


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["no batch", "no queries", "no keys"])
def test_nothing_to_compute(sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = sizes
    q, k = torch.ones(batch, seqlen_q, 4, 16, dtype=torch.float16), torch.ones(batch, seqlen_k, 2, 16).half()
    for causal in (False, True):
        o, lse = fa3_fp8(q, k, k, causal=causal, return_lse=True)
        assert torch.equal(o, torch.zeros(batch, seqlen_q, 4, 16, dtype=torch.bfloat16))
        assert torch.equal(lse, torch.full((batch, 4, seqlen_q), float("-inf")))


def test_rows_without_keys() -> None:
    o, lse = fa3_fp8(*case_of(seqlen_q=50, seqlen_k=20).torch(), causal=True, return_lse=True, **SMALL)
    assert not o[:, :30].any()
    assert torch.equal(lse[:, :, :30], torch.full((2, 4, 30), float("-inf")))


@pytest.mark.parametrize("scale", [0.0, 0.3, 2, 1e-3])
def test_scale(scale: float) -> None:
    case = case_of()
    o, lse = fa3_fp8(*case.torch(), causal=True, scale=scale, incoherent=False, return_lse=True, **SMALL)
    parts = [values(*quantize_fp8(x, block), block) for x, block in zip(case.torch(), (16, 32, 32), strict=True)]
    judge(o, lse, *parts, "causal", scale)


def test_gradients_are_refused() -> None:
    leaves = [x.requires_grad_() for x in FEW.torch()]
    with pytest.raises(NotImplementedError, match="fa3_fp8 has no backward pass; fa2, fa3 and fa3_triton have one"):
        fa3_fp8(*leaves, **SMALL).sum().backward()


def test_the_operators() -> None:
    options = (True, None, torch.bfloat16, 16, 32, None, None)
    torch.library.opcheck(module.fa3_fp8_op, (*FEW.torch(), True, None, True, 3, torch.float16, 16, 32, None, None))
    # The test of the schema compares inputs before and after, which torch cannot do with FP8 on a CPU.
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # It copies V without the padding of its rows, so that there must be none.
    tensors = quantized(case_of(batch=1, heads_q=2, heads_kv=1, seqlen_q=17, seqlen_k=64))
    torch.library.opcheck(module.fa3_fp8_quantized_op, (*tensors, 16, 32, *options), test_utils=others)


def test_compiled_into_a_model() -> None:
    def model(q: Any, k: Any, v: Any) -> Any:
        return fa3_fp8(q + 0, k, v, causal=True, **SMALL) * 1

    o = torch.compile(model, backend="eager", fullgraph=True)(*FEW.torch())
    assert torch.equal(o, model(*FEW.torch()))


def test_lse_is_returned_only_where_it_is_asked_for() -> None:
    assert isinstance(fa3_fp8(*FEW.torch(), **SMALL), torch.Tensor)
    assert isinstance(fa3_fp8_quantized(*quantized(FEW), q_block=16, k_block=32, **SMALL), torch.Tensor)


@pytest.fixture
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "in_scratch_context", lambda launch: pytest.fail("launched"))
    monkeypatch.setattr(quantize_module, "quantize_fp8_rows", None)


@pytest.mark.usefixtures("_no_launch")
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"BLOCK_N": 16}, "BLOCK_N: got 16, must be at least 32, k of a product in 8 bits"),
        (
            {"out_dtype": torch.int32},
            "out_dtype: got torch.int32, allowed are torch.bfloat16, torch.float16, torch.float32",
        ),
        ({"scale": -1.0}, "scale: got -1.0, must be a finite number from 0"),
        ({"BLOCK_M": 48}, "BLOCK_M: got 48, allowed are the powers of two from 16 to 256"),
    ],
    ids=["tile", "out_dtype", "scale", "power"],
)
def test_bad_arguments(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        fa3_fp8(*FEW.torch(), **options)
    assert raised.value.problems == (f"fa3_fp8: {line}",)


@pytest.mark.usefixtures("_no_launch")
def test_bad_dtypes() -> None:
    q, k, v = FEW.torch()
    with pytest.raises(ArgumentError, match=r"fa3_fp8: q: dtype torch\.float32, allowed are torch\.float16"):
        fa3_fp8(q.float(), k.float(), v.float())
    with pytest.raises(ArgumentError, match=r"fa3_fp8: k: must be a torch\.Tensor, got NoneType"):
        fa3_fp8(q, None, v)
    with pytest.raises(
        ArgumentError, match=r"quantize_fp8: block: got 24, allowed are the powers of two from 16 to 256"
    ):
        quantize_fp8(q, 24)
    with pytest.raises(ArgumentError, match="quantize_fp8: incoherent, transposed: both True"):
        quantize_fp8(q, 16, incoherent=True, transposed=True)


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("q_block", 24, "q_block: got 24, must be a multiple of BLOCK_M, 16"),
        ("k_block", 0, "k_block: got 0, must be a multiple of BLOCK_N, 32"),
        (
            "k_scale",
            lambda x: x[:, :1],
            "k_scale: shape (1, 1, 1), torch.float32, on cpu, must be (1, 3, 1), torch.float32, on cpu",
        ),
        (
            "v_scale",
            lambda x: x.double(),
            "v_scale: shape (1, 3, 1), torch.float64, on cpu, must be (1, 3, 1), torch.float32, on cpu",
        ),
        ("q8", lambda x: x.half(), "q: dtype torch.float16, allowed are torch.float8_e4m3fn"),
        (
            "v8",
            lambda x: x.as_strided(x.shape, (2240, 1, 2240, 70)),
            "v8: strides (2240, 1, 2240, 70), all but seqlen's must be multiples of 16",
        ),
        ("v8", lambda x: x[:, :9], "k, v: (seqlen, heads) (70, 1) and (9, 1), must be the same"),
    ],
    ids=["q_block", "k_block", "k_scale", "v_scale", "dtype", "strides", "shape"],
)
def test_bad_quantized_tensors(name: str, change: Any, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("q8", "k8", "v8", "q_scale", "k_scale", "v_scale")
    arguments = dict(zip(names, quantized(FEW), strict=True)) | {"q_block": 16, "k_block": 32}
    arguments[name] = change(arguments[name]) if callable(change) else change
    monkeypatch.setattr(module, "in_scratch_context", lambda launch: pytest.fail("launched"))
    with pytest.raises(ArgumentError) as raised:
        fa3_fp8_quantized(**arguments, **SMALL)
    assert f"fa3_fp8_quantized: {line}" in raised.value.problems
