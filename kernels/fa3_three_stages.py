"""The 3-stage variant of FlashAttention-3's consumer, in Gluon (Shah et al., arXiv 2407.08608, appendix B.3).

The softmax of one KV tile runs under the PV product of the tile before and the QK product of the tile after. It takes
the place of `fa3.attend`; `flashsim.schedules.fa3_three_stages` is its schedule.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from flashsim_kernels.fa3_shared import (
    convert,
    issue_pv,
    issue_qk,
    online_softmax,
    pass_turn,
    rescale,
    start,
    wait_turn,
)


@gluon.jit
def attend_three_stages(p, s, tile, INDEX: gl.constexpr):
    """S is the scores of the last item whose QK product has been awaited, P the exponentials of the item before."""
    first, last = tile.first, tile.first + tile.count - 1
    turns = tile.turns
    O, m, l = start(p)
    s.Q.wait_full(tile.index)
    s.K.wait_full(first)
    qk = issue_qk(p, s, first, INDEX)
    S = warpgroup_mma_wait(0, deps=[qk])
    s.K.release(first)
    if tile.count > 1:
        s.K.wait_full(first + 1)
        qk = issue_qk(p, s, first + 1, INDEX)
        P, m, l, alpha = online_softmax(p, tile, S, m, l, first, INDEX, True)
        S = warpgroup_mma_wait(0, deps=[qk])
        s.K.release(first + 1)
    else:
        P, m, l, alpha = online_softmax(p, tile, S, m, l, first, INDEX, True)
    P = convert(p, s, P, INDEX)
    s.K.wait_full(first + 2, pred=tile.count > 2)
    unmasked = first + 2
    if p.CAUSAL:
        unmasked = first + gl.maximum(gl.minimum(tile.masked + 1, tile.count), 2)
        for j in range(first + 2, unmasked):
            O, P, S, m, l, turns = step(p, s, tile, O, P, S, m, l, turns, j, INDEX, True)
    for j in range(unmasked, first + tile.count):
        O, P, S, m, l, turns = step(p, s, tile, O, P, S, m, l, turns, j, INDEX, False)
    s.Q.release(tile.index)
    if tile.count > 1:
        s.V.wait_full(last - 1)
        pv = issue_pv(p, s, P, O, last - 1, INDEX)
        S, m, l, alpha = online_softmax(p, tile, S, m, l, last, INDEX, True)
        O, P = warpgroup_mma_wait(0, deps=[pv, P])
        s.V.release(last - 1)
        P = convert(p, s, S, INDEX)
        O = rescale(p, O, alpha)
    s.V.wait_full(last)
    pv = issue_pv(p, s, P, O, last, INDEX)
    O, P = warpgroup_mma_wait(0, deps=[pv, P])
    s.V.release(last)
    return O, m, l, turns


@gluon.jit
def step(p, s, tile, O, P, S, m, l, turns, j, INDEX: gl.constexpr, MASKED: gl.constexpr):
    wait_turn(p, s, turns, INDEX)
    qk = issue_qk(p, s, j, INDEX)  # S of the tile after
    s.V.wait_full(j - 2)
    pv = issue_pv(p, s, P, O, j - 2, INDEX)  # P V of the tile before
    pass_turn(p, s, INDEX)
    S, m, l, alpha = online_softmax(p, tile, S, m, l, j - 1, INDEX, MASKED)  # under both
    s.K.wait_full(j + 1, pred=j + 1 < tile.first + tile.count)  # here, so that ptxas does not hoist the waits below
    S_next = warpgroup_mma_wait(1, deps=[qk])
    s.K.release(j)
    O, P = warpgroup_mma_wait(0, deps=[pv, P])
    s.V.release(j - 2)
    P = convert(p, s, S, INDEX)
    O = rescale(p, O, alpha)
    return O, P, S_next, m, l, turns + 1
