"""Attention masks: which keys a query sees, as text in the spelling of the files."""

from __future__ import annotations

import re
from collections.abc import Callable

from flashsim.errors import InputError, unknown
from flashsim.masks.base import Mask
from flashsim.masks.blocks import Butterfly, read_block_list
from flashsim.masks.intervals import Causal, Chunked, Documents, Full, Prefix, Window
from flashsim.masks.lengths import Padding, Varlen, VarlenCausal
from flashsim.masks.packed import Packed
from flashsim.masks.union import GlobalWindow
from flashsim.masks.walk import KVWalk

MAX_KEYS = 2**31 - 1
SPELLING = {
    "full": "full",
    "causal": "causal",
    "window": "window:LEFT[,RIGHT]",
    "prefix": "prefix:N",
    "chunked": "chunked:N",
    "documents": "documents:LEN+LEN+...",
    "global": "global:N+window:LEFT[,RIGHT]",
    "blocks": "blocks:FILE",
    "butterfly": "butterfly[:KEYS]",
    "padding": "padding[:LEN,...]",
    "varlen": "varlen:LEN,...",
    "varlen-causal": "varlen-causal:LEN,...",
}
"""How each kind of mask is written."""
PACKED = "packed:GROUP:MASK"
"""How the mask of a packed problem is written (`flashsim.packing`); nobody has to write it."""

__all__ = ["SPELLING", "KVWalk", "Mask", "parse_mask"]


def parse_mask(text: object) -> Mask:
    """The mask that `text` names. Raises InputError with one line for each mistake."""
    if not isinstance(text, str):
        raise InputError(f"mask: must be text, got {type(text).__name__} (allowed: {', '.join(SPELLING.values())})")
    kind, colon, rest = text.partition(":")
    if kind not in _READ:
        raise InputError(f"mask: {unknown('mask', kind, SPELLING)}")
    try:
        return _READ[kind](rest if colon else None)
    except ValueError as error:
        raise InputError(f"mask: {text!r}: {error}; it is written {SPELLING.get(kind, PACKED)}") from None


def _numbers(text: str | None, separator: str, least: int, counts: range) -> list[int]:
    """Whole numbers from `least`, as many as `counts` allows. Raises ValueError."""
    words = [] if text is None else text.split(separator)
    for word in words:
        if not re.fullmatch(r"[0-9]+", word) or not least <= int(word[:12]) <= MAX_KEYS or len(word) > 10:
            raise ValueError(f"{word[:20]!r} is not a whole number from {least} to {MAX_KEYS}")
    if len(words) not in counts:
        raise ValueError("a number is missing" if len(words) < counts[0] else "there are too many numbers")
    return [int(word) for word in words]


def _plain(mask: Mask) -> Callable[[str | None], Mask]:
    def read(rest: str | None) -> Mask:
        if rest is not None:
            raise ValueError("nothing follows the name")
        return mask

    return read


def _global(rest: str | None) -> Mask:
    tokens, plus, window = (rest or "").partition("+window:")
    if not plus:
        raise ValueError("the window is missing")
    return GlobalWindow(_numbers(tokens, ",", 0, range(1, 2))[0], Window(*_numbers(window, ",", 0, range(1, 3))))


def _butterfly(rest: str | None) -> Mask:
    return Butterfly(given=False) if rest is None else Butterfly(_numbers(rest, ",", 1, range(1, 2))[0])


def _blocks(rest: str | None) -> Mask:
    if not rest:
        raise ValueError("the file is missing")
    return read_block_list(rest)


def _packed(rest: str | None) -> Mask:
    group, _, text = (rest or "").partition(":")
    (rows,) = _numbers(group or None, ",", 1, range(1, 2))
    if not text:
        raise ValueError("the mask is missing")
    if text.partition(":")[0] == "packed":
        raise ValueError("a packed mask cannot be packed")
    return Packed(rows, parse_mask(text))


MANY = range(1, 1_000_000)
_READ: dict[str, Callable[[str | None], Mask]] = {
    "full": _plain(Full()),
    "causal": _plain(Causal()),
    "window": lambda rest: Window(*_numbers(rest, ",", 0, range(1, 3))),
    "prefix": lambda rest: Prefix(*_numbers(rest, ",", 0, range(1, 2))),
    "chunked": lambda rest: Chunked(*_numbers(rest, ",", 1, range(1, 2))),
    "documents": lambda rest: Documents(tuple(_numbers(rest, "+", 1, MANY))),
    "global": _global,
    "blocks": _blocks,
    "butterfly": _butterfly,
    "padding": lambda rest: Padding(tuple(_numbers(rest, ",", 0, range(1_000_000)))),
    "varlen": lambda rest: Varlen(tuple(_numbers(rest, ",", 0, MANY))),
    "varlen-causal": lambda rest: VarlenCausal(tuple(_numbers(rest, ",", 0, MANY))),
    "packed": _packed,
}
