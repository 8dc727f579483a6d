"""Masks of a kind for given sizes, from a few drawn numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from flashsim.masks import SPELLING

KINDS_WITH_NUMBERS = tuple(kind for kind, text in SPELLING.items() if text != kind and kind != "blocks")
"""`blocks` is a file, which nobody can draw."""
NUMBERS = 3
LARGEST = 2**16 - 1


def mask_text(kind: str, numbers: Sequence[int], batch: int, seqlen_q: int, seqlen_k: int) -> str:
    """A mask of this kind that goes with these sizes, from three numbers from 0; smaller ones make smaller masks.

    `documents` needs as many queries as keys.
    """
    a, b, c = numbers
    keys = seqlen_k + 1
    both = min(seqlen_q, seqlen_k)
    entries = [numbers[entry % NUMBERS] for entry in range(batch)]
    varlen = ",".join(str(both - number % (both + 1)) for number in entries)
    texts = {
        "window": f"window:{a % keys},{b % keys}",
        "prefix": f"prefix:{a % keys}",
        "chunked": f"chunked:{1 + a % seqlen_k}",
        "global": f"global:{a % min(keys, 64)}+window:{b % keys},{c % keys}",
        "butterfly": f"butterfly:{1 + a % seqlen_k}",
        "padding": "padding:" + ",".join(str(seqlen_k - number % keys) for number in entries),
        "varlen": f"varlen:{varlen}",
        "varlen-causal": f"varlen-causal:{varlen}",
    }
    if kind == "documents":
        cuts = sorted({0, seqlen_k, *(number % seqlen_k for number in numbers)})
        return "documents:" + "+".join(str(end - begin) for begin, end in pairwise(cuts))
    return texts[kind]
