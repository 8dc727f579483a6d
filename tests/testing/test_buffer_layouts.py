"""Views with the strides of a layout: the same values, and NaN in all memory around them."""

from __future__ import annotations

from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import find, given, settings
from numpy.typing import NDArray
from testing_doc import my_attention

from flashsim.errors import InputError
from flashsim.problem import AttentionProblem
from flashsim.testing import (
    LAYOUTS,
    AttentionCase,
    Layout,
    assert_attention_close,
    attention_cases,
    layouts,
    nan_padded,
    with_layout,
)

PROBLEM = AttentionProblem(batch=2, heads_q=4, heads_kv=2, seqlen_q=5, seqlen_k=7, head_dim=16, dtype="fp16")
NAMES = pytest.mark.parametrize("name", LAYOUTS)


def root(view: NDArray[Any]) -> NDArray[Any]:
    """The buffer that a view lies in."""
    memory: Any = view
    while getattr(memory, "base", None) is not None:
        memory = memory.base
    assert isinstance(memory, np.ndarray)
    return memory


@NAMES
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_the_values_are_kept_and_all_around_them_is_nan(name: str, dtype: Any) -> None:
    layout = LAYOUTS[name]
    k = AttentionCase(PROBLEM, shared_kv=True).k.astype(dtype)
    view = with_layout(k, layout, part=1)
    assert view.dtype == dtype
    np.testing.assert_array_equal(view, k)
    memory = root(view)
    written = memory[~np.isnan(memory)]
    distinct = k[:1] if layout.broadcast else k
    np.testing.assert_array_equal(np.sort(written, axis=None), np.sort(distinct, axis=None))
    if name not in ("contiguous", "heads first", "sequence first", "column-major", "broadcast"):
        assert memory.size > written.size


def test_strides_by_hand() -> None:
    """Of (2, 7, 3, 16): strides in elements, offset, elements of the buffer; the second of three where packed."""
    expected = {
        "contiguous": ((336, 48, 16, 1), 0, 672),
        "heads first": ((336, 16, 112, 1), 0, 672),
        "sequence first": ((48, 96, 16, 1), 0, 672),
        "padded rows": ((504, 72, 24, 1), 0, 1008),
        "odd rows": ((357, 51, 17, 1), 0, 714),
        "padded sequences": ((71 * 48, 48, 16, 1), 0, 2 * 71 * 48),
        "packed": ((1008, 144, 16, 1), 48, 2016),
        "unaligned": ((336, 48, 16, 1), 1, 673),
        "column-major": ((336, 1, 112, 7), 0, 672),
        "broadcast": ((0, 48, 16, 1), 0, 336),
    }
    assert set(expected) == set(LAYOUTS)
    for name, (stride, offset, elements) in expected.items():
        strided = LAYOUTS[name].strided((2, 7, 3, 16), part=1)
        assert strided == ((2, 7, 3, 16), stride, offset, elements), name
        view = with_layout(np.ones((2, 7, 3, 16), np.float16), LAYOUTS[name], part=1)
        assert view.strides == tuple(2 * n for n in stride), name


def test_all_paddings_at_once() -> None:
    layout = Layout("bhsd", row_padding=3, seqlen_padding=2, packed=True, offset=5)
    strided = layout.strided((2, 7, 3, 16), part=2)
    assert strided == ((2, 7, 3, 16), (9 * 9 * 19, 19, 9 * 19, 1), 5 + 2 * 3 * 9 * 19, 5 + 2 * 9 * 9 * 19)
    x = np.arange(2 * 7 * 3 * 16.0).reshape(2, 7, 3, 16)
    view = with_layout(x, layout, part=2)
    np.testing.assert_array_equal(view, x)
    assert np.sum(~np.isnan(root(view))) == x.size


def test_alignment() -> None:
    """An offset of one element is no multiple of 16 bytes; without one, buffers start at such a multiple."""
    x = np.ones((1, 2, 1, 8), np.float16)
    assert with_layout(x, LAYOUTS["contiguous"]).ctypes.data % 16 == 0
    assert with_layout(x, LAYOUTS["unaligned"]).ctypes.data % 16 == 2
    assert with_layout(x, LAYOUTS["odd rows"])[0, 1].ctypes.data % 16 == 2


def test_strides_beyond_16_bits() -> None:
    view = with_layout(np.ones((1, 3, 1, 8), np.float16), Layout(row_padding=1 << 16))
    assert view.strides[1] == 2 * ((1 << 16) + 8)
    np.testing.assert_array_equal(view, 1)


def drawn(**options: Any) -> set[Layout]:
    found = set()

    @settings(max_examples=500, derandomize=True, database=None)
    @given(layouts(**options))
    def collect(layout: Layout) -> None:
        found.add(layout)

    collect()
    return found


def test_named_layouts_and_combinations_are_drawn() -> None:
    everything = drawn(column_major=True, broadcast=True)
    assert set(LAYOUTS.values()) < everything
    assert any(x.packed and x.offset and x.row_padding and x.seqlen_padding for x in everything)
    usual = drawn()
    assert {x.order for x in usual} == {"bshd", "bhsd", "sbhd"}
    assert not any(x.broadcast for x in usual)
    aligned = drawn(alignment=8)
    assert all(x.offset % 8 == x.row_padding % 8 == 0 for x in aligned)
    assert {x.offset for x in aligned} == {0, 8}


def test_shrinks_to_the_contiguous_layout() -> None:
    assert find(layouts(), lambda _: True, random=Random(0)) == Layout()


@settings(max_examples=settings().max_examples // 2)
@given(attention_cases(tile=(16, 16), shared_kv=True), layouts(column_major=True, broadcast=True))
def test_a_kernel_that_follows_strides_is_accepted(case: AttentionCase, layout: Layout) -> None:
    q, k, v = case.numpy(layout)
    assert q.strides[0] > 0
    assert (k.strides[0] == v.strides[0] == 0) == layout.broadcast
    assert_attention_close(my_attention(q, k, v, causal=case.causal), case)


def reading_whole_tiles(x: NDArray[Any], block: int) -> NDArray[Any]:
    """What a kernel reads that forgets where the sequence ends."""
    rows = -(-x.shape[1] // block) * block
    return np.lib.stride_tricks.as_strided(x, (x.shape[0], rows, *x.shape[2:]), x.strides)


def test_a_read_beyond_the_sequence_is_noticed() -> None:
    """The usual mistake: P is 0 there, and P V is computed for whole tiles."""
    case = AttentionCase(AttentionProblem(batch=2, heads_q=1, seqlen_q=5, seqlen_k=5, head_dim=16, mask="causal"))
    q, k, v = case.numpy(LAYOUTS["padded sequences"])
    o = my_attention(q, k, v, causal=True)
    assert_attention_close(o, case)
    tail = reading_whole_tiles(v, 8)[:, 5:, 0]
    with pytest.raises(AssertionError, match="NaN, the first at"):
        assert_attention_close(o + (np.zeros((2, 5, 3)) @ tail)[:, :, None], case)


def test_nan_padded() -> None:
    k = AttentionCase(PROBLEM).numpy()[1]
    buffer, view = nan_padded(k, 9)
    assert buffer.shape == (2, 16, 2, 16)
    assert buffer.dtype == np.float16
    assert np.all(np.isnan(buffer[:, 7:]))
    assert np.shares_memory(buffer, view)
    np.testing.assert_array_equal(view, k)


def test_mistakes() -> None:
    with pytest.raises(InputError) as caught:
        Layout(order="bshh", row_padding=-1, offset=-2)
    assert caught.value.problems == (
        "order: got 'bshh', must have each of the letters b, s, h, d once",
        "row_padding: got -1, must be at least 0",
        "offset: got -2, must be at least 0",
    )
    with pytest.raises(InputError, match="its batches differ"):
        with_layout(AttentionCase(PROBLEM).k, LAYOUTS["broadcast"])
    with pytest.raises(InputError, match=r"got shape \(3, 4\)"):
        with_layout(np.ones((3, 4)), Layout())
    with pytest.raises(InputError, match="must be a NumPy array or a torch tensor, got list"):
        nan_padded([[[[1.0]]]], 1)
    with pytest.raises(InputError, match="alignment: got 0"):
        layouts(alignment=0)
