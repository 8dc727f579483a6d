"""The online softmax, made of the verbs: what FA1, FA2 and FA3 share (Milakov and Gimelshein, arXiv 1805.02867)."""

from __future__ import annotations

from dataclasses import dataclass

from flashsim.schedules.verbs import Operand, Registers, Warpgroup, WorkTile


@dataclass
class Statistics:
    """Of each row: the maximum so far, the sum of exponentials so far, and the factor that the last step rescaled
    by."""

    m: Operand
    l: Operand  # noqa: E741 - the papers' name
    m_old: Operand
    alpha: Operand

    @classmethod
    def declare(cls, registers: Registers, rows: int) -> Statistics:
        return cls(*(registers.rows(name, rows) for name in ("m", "l", "m_old", "alpha")))


def start(wg: Warpgroup, O: Operand, stats: Statistics) -> None:  # noqa: E741
    """O = 0, m = -inf, l = 0: the neutral element of the merge."""
    wg.map("fill", 0.0, into=O)
    wg.map("fill", float("-inf"), into=stats.m)
    wg.map("fill", 0.0, into=stats.l)


def online_softmax(
    wg: Warpgroup, S: Operand, stats: Statistics, tile: WorkTile, j: int, masked: bool, times: float = 1.0
) -> None:
    """S becomes P~ = exp(S - m) with the new maximum m; l is brought up to date; alpha is what O must be rescaled
    by. P~ and l are `times` as large."""
    if masked:
        wg.map("mask", S, tile, j, into=S)
    wg.map("copy", stats.m, into=stats.m_old)
    wg.reduce("max", S, into=stats.m)
    wg.map("rescale_factor", stats.m_old, stats.m, into=stats.alpha)
    wg.map("exp", S, stats.m, times, into=S)
    wg.map("mul", stats.l, stats.alpha, into=stats.l)
    wg.reduce("sum", S, into=stats.l)


def rescale(wg: Warpgroup, O: Operand, stats: Statistics) -> None:  # noqa: E741
    """O = diag(alpha) O."""
    wg.map("mul", O, stats.alpha, into=O)


def finish(wg: Warpgroup, O: Operand, stats: Statistics) -> None:  # noqa: E741
    """O = diag(l)^-1 O and L = m + log l, left in l. Rows that saw no key give 0 and -inf."""
    wg.map("div", O, stats.l, into=O)
    wg.map("lse", stats.m, stats.l, into=stats.l)
