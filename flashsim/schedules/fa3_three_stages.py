"""The 3-stage variant of FlashAttention-3's consumer (Shah et al., arXiv 2407.08608, appendix B.3).

Three KV tiles are under way at a time: the softmax of one runs under the PV product of the tile before and the QK
product of the tile after. That takes a second S in registers, so tiles have to be smaller, and reads more of K and V
for each query.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashsim.problem import AttentionProblem
from flashsim.schedules.softmax import online_softmax, rescale
from flashsim.schedules.verbs import Program, Warpgroup, WorkTile


def keys_of_three_stages(rows: int, head_dim: int) -> int:
    """BLOCK_N for which two S tiles, P and O fit the registers of a consumer, 24 others included."""
    left = {64: 255, 128: 240, 192: 160}[rows] - 24 - head_dim // 2
    return max(16, int(left / (2 * 0.5 + 0.25)) // 16 * 16)


class ThreeStages:
    """Takes the place of `FA3.attend`; `r` has two tiles of scores."""

    def complaints(self, problem: AttentionProblem, switches: Mapping[str, Any]) -> list[str]:
        """What FA3's switches have to be."""
        lines, on = [], switches["warp_specialized"] and switches["intra_wg_overlap"]
        if not on or switches["P_in_shared"] or problem.dtype == "fp8":
            lines.append("overlap_stages = 3 needs warp_specialized, intra_wg_overlap, P in registers and 16 bits")
        if switches["num_stages"] < 2:
            lines.append("overlap_stages = 3 needs num_stages of at least 2: K runs two tiles ahead of V")
        return lines

    def attend(self, wg: Warpgroup, s: Any, r: Any, tile: WorkTile) -> Program:
        Q, scores, first = s.Q[tile.index].rows(64 * wg.index, 64), (r.S, r.S_next), tile.first
        yield s.Q.full(tile.index)
        yield s.K.full(first)
        yield wg.gemm(Q, s.K[first].T, into=scores[first % 2])
        s.K.release(first)
        if tile.count > 1:
            yield s.K.full(first + 1)
            qk = wg.gemm(Q, s.K[first + 1].T, into=scores[(first + 1) % 2])
        online_softmax(wg, scores[first % 2], r.stats, tile, first, masked=True)
        if tile.count > 1:
            yield qk
            s.K.release(first + 1)
        wg.convert(scores[first % 2], into=r.P)
        for j in wg.kv_tiles(tile, start=2):
            yield s.K.full(j)
            yield s.turn.wait()
            qk = wg.gemm(Q, s.K[j].T, into=scores[j % 2])  # S of the tile after
            yield s.V.full(j - 2)
            pv = wg.gemm(r.P, s.V[j - 2], into=r.O, accumulate=True)  # P V of the tile before
            s.turn.pass_on()
            online_softmax(wg, scores[(j - 1) % 2], r.stats, tile, j - 1, masked=tile.partial(j - 1))  # under both
            yield qk
            s.K.release(j)
            yield pv
            s.V.release(j - 2)
            wg.convert(scores[(j - 1) % 2], into=r.P)
            rescale(wg, r.O, r.stats)
        s.Q.release(tile.index)
        if tile.count > 1:
            yield s.V.full(tile.last - 1)
            pv = wg.gemm(r.P, s.V[tile.last - 1], into=r.O, accumulate=True)
            online_softmax(wg, scores[tile.last % 2], r.stats, tile, tile.last, masked=tile.partial(tile.last))
            yield pv
            s.V.release(tile.last - 1)
            wg.convert(scores[tile.last % 2], into=r.P)
            rescale(wg, r.O, r.stats)
        yield s.V.full(tile.last)
        yield wg.gemm(r.P, s.V[tile.last], into=r.O, accumulate=True)
        s.V.release(tile.last)
