"""Where a tensor's elements lie in memory: strides that a kernel may meet, with NaN in every gap between them."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from flashsim.errors import InputError

AXES = "bshd"
"""batch, seqlen, heads, head_dim: the order of the dimensions, whatever their order in memory."""
PARTS = 3
"""Q, K and V of a packed tensor."""


class Strided(NamedTuple):
    """A view of a buffer of `elements` elements; strides and offset in elements, as `torch.as_strided` takes them."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    elements: int


@dataclass(frozen=True)
class Layout:
    """How a (batch, seqlen, heads, head_dim) tensor lies in one buffer. The default is contiguous.

    order: the dimensions from the slowest to the fastest: `bhsd` has the heads first, `bhds` is column-major.
    row_padding: elements after the head_dim of each row.
    seqlen_padding: rows after each sequence.
    packed: strides as in one (batch, seqlen, 3, heads, head_dim) tensor of Q, K and V.
    offset: elements before the first; 1 is not aligned to 16 bytes.
    broadcast: all batches are one, with stride 0.

    Raises InputError with one line per mistake.
    """

    order: str = AXES
    row_padding: int = 0
    seqlen_padding: int = 0
    packed: bool = False
    offset: int = 0
    broadcast: bool = False

    def __post_init__(self) -> None:
        problems = []
        if sorted(self.order) != sorted(AXES):
            problems.append(f"order: got {self.order!r}, must have each of the letters {', '.join(AXES)} once")
        for name in ("row_padding", "seqlen_padding", "offset"):
            if getattr(self, name) < 0:
                problems.append(f"{name}: got {getattr(self, name)}, must be at least 0")
        if problems:
            raise InputError(problems)

    def strided(self, shape: tuple[int, ...], part: int = 0) -> Strided:
        """Strides for a tensor of `shape`; `part` is 0, 1 or 2 for Q, K or V of a packed layout."""
        batch, seqlen, heads, head_dim = shape
        memory = {
            "b": 1 if self.broadcast else batch,
            "s": seqlen + self.seqlen_padding,
            "h": heads * (PARTS if self.packed else 1),
            "d": head_dim + self.row_padding,
        }
        stride = {axis: math.prod(memory[inner] for inner in self.order[n + 1 :]) for n, axis in enumerate(self.order)}
        offset = self.offset + (part * heads * stride["h"] if self.packed else 0)
        if self.broadcast:
            stride["b"] = 0
        return Strided(tuple(shape), tuple(stride[a] for a in AXES), offset, self.offset + math.prod(memory.values()))


LAYOUTS = {
    "contiguous": Layout(),
    "heads first": Layout(order="bhsd"),
    "sequence first": Layout(order="sbhd"),
    "padded rows": Layout(row_padding=8),
    "odd rows": Layout(row_padding=1),
    "padded sequences": Layout(seqlen_padding=64),
    "packed": Layout(packed=True),
    "unaligned": Layout(offset=1),
    "column-major": Layout(order="bhds"),
    "broadcast": Layout(broadcast=True),
}


def layouts(*, alignment: int = 1, column_major: bool = False, broadcast: bool = False) -> st.SearchStrategy[Layout]:
    """The layouts of `LAYOUTS`, and combinations of them; they shrink to the contiguous one.

    alignment: offsets and row paddings are multiples of so many elements; 8 keeps rows of fp16 at 16 bytes.
    column_major: also layouts whose fastest dimension is not head_dim.
    broadcast: also stride 0 over the batch, which only equal batches can have: see `AttentionCase.shared_kv`.
    """
    if alignment < 1:
        raise InputError(f"alignment: got {alignment}, must be at least 1")
    orders = sorted({layout.order for layout in LAYOUTS.values()}, key=lambda order: (order != AXES, order))
    combined = st.builds(
        Layout,
        order=st.sampled_from([order for order in orders if column_major or order.endswith("d")]),
        row_padding=st.sampled_from((0, alignment, 8 * alignment)),
        seqlen_padding=st.sampled_from((0, 1, 64)),
        packed=st.booleans(),
        offset=st.sampled_from((0, alignment)),
        broadcast=st.booleans() if broadcast else st.just(False),
    )
    named = [
        layout
        for layout in LAYOUTS.values()
        if (column_major or layout.order.endswith("d"))
        and (broadcast or not layout.broadcast)
        and layout.row_padding % alignment == layout.offset % alignment == 0
    ]
    return st.one_of(st.sampled_from(named), combined)


def is_torch(x: object) -> bool:
    """Whether `x` is a torch tensor; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def with_layout(array: Any, layout: Layout, part: int = 0) -> Any:
    """A view with the values of `array` and the strides of `layout`; the rest of its buffer is NaN.

    array: (batch, seqlen, heads, head_dim), a NumPy array (ml_dtypes included) or a torch tensor, whose device the
        buffer is on. A torch tensor gets its strides from `as_strided`, since copies to a device lose those with gaps.
    part: 0, 1 or 2 for Q, K or V of a packed layout.

    Raises InputError for anything else, and for batches that differ in a broadcast layout.
    """
    given = _check(array)
    size, stride, offset, elements = layout.strided(tuple(given.shape), part)
    values = given
    if layout.broadcast:
        if not bool((given == given[:1]).all()):
            raise InputError("array: its batches differ, so that they cannot share memory in a broadcast layout")
        values = given[:1]
    buffer = _nan(given, (elements,))
    _strided(buffer, tuple(values.shape), stride, offset)[...] = values
    return _strided(buffer, size, stride, offset)


def nan_padded(array: Any, rows: int) -> tuple[Any, Any]:
    """(buffer, view): a buffer (batch, seqlen + rows, heads, head_dim) that is NaN beyond seqlen, and its first rows.

    For kernels that are given buffers and lengths. Raises InputError as `with_layout` does.
    """
    given = _check(array)
    batch, seqlen, heads, head_dim = given.shape
    buffer = _nan(given, (batch, seqlen + rows, heads, head_dim))
    buffer[:, :seqlen] = given
    return buffer, buffer[:, :seqlen]


def _check(array: Any) -> Any:
    if not (isinstance(array, np.ndarray) or is_torch(array)):
        raise InputError(f"array: must be a NumPy array or a torch tensor, got {type(array).__name__}")
    if array.ndim != len(AXES):
        raise InputError(
            f"array: must have 4 dimensions (batch, seqlen, heads, head_dim), got shape {tuple(array.shape)}"
        )
    return array


def _nan(like: Any, shape: tuple[int, ...]) -> Any:
    if is_torch(like):
        return like.detach().new_full(shape, math.nan)
    return np.full(shape, math.nan, dtype=like.dtype)


def _strided(buffer: Any, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Any:
    if is_torch(buffer):
        return buffer.as_strided(size, stride, offset)
    return np.lib.stride_tricks.as_strided(buffer[offset:], size, tuple(n * buffer.itemsize for n in stride))
