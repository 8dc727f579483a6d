"""FlashAttention-3, forward, in Gluon for sm_90a (Shah et al., arXiv 2407.08608, algorithms 1 and 2).

One warp, the producer, keeps rings of K and V tiles full by TMA; consumer warpgroups of 64 query rows each compute on
them. `flashsim.schedules.fa3` is this kernel's schedule, with the same roles, rings, signals and switches. Numbered
comments are the lines of the paper's algorithms. Gradients are those of `fa2_backward`.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from flashsim_kernels.arguments import check_tensors
from flashsim_kernels.fa2_backward import register_gradients
from flashsim_kernels.fa3_launch import launch
from flashsim_kernels.fa3_shared import (
    LN2,
    REINTERPRET_IS_PUBLIC,
    Shared,
    convert,
    first_loads,
    issue_pv,
    issue_qk,
    load_queries,
    make_ring,
    online_softmax,
    pass_turn,
    refill,
    rescale,
    start,
    tma_store,
    wait_for_consumers,
    wait_turn,
)
from flashsim_kernels.fa3_three_stages import attend_three_stages
from flashsim_kernels.fa3_tiles import Problem


@gluon.jit
def producer(p, s):
    """Algorithm 1, lines 2 to 10. K runs one tile ahead of V, since a consumer wants K_j before V_{j-1}."""
    position = gl.program_id(0)
    index = gl.to_tensor(0)
    first = gl.to_tensor(0)
    while position < p.blocks() * p.batch_heads:
        tile = p.work_tile(position, index, first, first)
        head_kv = tile.head // p.group
        s.K.wait_empty(first)  # 7: until stage j mod s is consumed
        s.K.load(first, p.k, tile.batch, head_kv, tile.key(first, p.BLOCK_N))  # 8; 9: the load itself commits
        s.Q.wait_empty(index)
        load_queries(p, s, tile)  # 4
        s.O.wait_empty(index)  # the O of the tile before has left the memory that V needs
        for j in range(first + 1, first + tile.count):
            s.K.wait_empty(j)
            s.K.load(j, p.k, tile.batch, head_kv, tile.key(j, p.BLOCK_N))
            s.V.wait_empty(j - 1)
            s.V.load(j - 1, p.v, tile.batch, head_kv, tile.key(j - 1, p.BLOCK_N))
        first += tile.count
        s.V.wait_empty(first - 1)
        s.V.load(first - 1, p.v, tile.batch, head_kv, 0)
        index += 1
        if p.SCHEDULER == "dynamic":
            position = gl.atomic_add(p.counter, 1) + gl.num_programs(0)
            s.next_position.wait_empty(index - 1)
            s.next_position.slot(index - 1).store(
                gl.full([1], position, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
            )
            s.next_position.commit(index - 1)
        else:
            position += gl.num_programs(0)


@gluon.jit
def consumer(p, s, INDEX: gl.constexpr, OVERLAP_STAGES: gl.constexpr):
    """Algorithm 1, lines 11 to 25, one work tile after the other."""
    position = gl.program_id(0)
    index = gl.to_tensor(0)
    first = gl.to_tensor(0)
    turns = gl.to_tensor(0)
    while position < p.blocks() * p.batch_heads:
        tile = p.work_tile(position, index, first, turns)
        first_loads(p, s, tile, INDEX)
        if OVERLAP_STAGES == 1:
            O, m, l, turns = attend_in_order(p, s, tile, INDEX)
        elif OVERLAP_STAGES == 2:
            O, m, l, turns = attend(p, s, tile, INDEX)
        else:
            O, m, l, turns = attend_three_stages(p, s, tile, INDEX)
        write_output(p, s, tile, O, m, l, INDEX)
        first += tile.count
        index += 1
        if p.SCHEDULER == "dynamic":
            s.next_position.wait_full(index - 1)
            position = gl.max(s.next_position.slot(index - 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
            s.next_position.release(index - 1)
        else:
            position += gl.num_programs(0)


@gluon.jit
def attend(p, s, tile, INDEX: gl.constexpr):
    """Algorithm 2: the softmax of one KV tile runs under the PV product of the tile before."""
    j = tile.first
    turns = tile.turns
    O, m, l = start(p)
    s.Q.wait_full(tile.index)  # 3
    s.K.wait_full(j)
    if p.FIRST_IN_TURN:
        wait_turn(p, s, turns, INDEX)
    qk = issue_qk(p, s, j, INDEX)  # 4: S_cur = Q K_0^T
    if p.FIRST_IN_TURN:
        pass_turn(p, s, INDEX)
        turns += 1
    S = warpgroup_mma_wait(0, deps=[qk])
    s.K.release(j)  # 5
    refill(p, s, s.K, p.k, tile, j, INDEX)
    S, m, l, alpha = online_softmax(p, tile, S, m, l, j, INDEX, True)  # 6: the code always masks the first tile
    P = convert(p, s, S, INDEX)
    s.K.wait_full(j + 1, pred=tile.count > 1)  # 8
    unmasked = tile.first + 1
    if p.CAUSAL:
        unmasked = tile.first + gl.maximum(tile.masked, 1)
        for j in range(tile.first + 1, unmasked):  # 7
            O, P, m, l, alpha, turns = overlapped_step(p, s, tile, O, P, m, l, alpha, turns, j, INDEX, True)
    for j in range(unmasked, tile.first + tile.count):
        O, P, m, l, alpha, turns = overlapped_step(p, s, tile, O, P, m, l, alpha, turns, j, INDEX, False)
    s.Q.release(tile.index)
    if p.RESCALE_EARLY:
        O = rescale(p, O, alpha)
    last = tile.first + tile.count - 1
    s.V.wait_full(last)  # 18
    pv = issue_pv(p, s, P, O, last, INDEX)
    O, P = warpgroup_mma_wait(0, deps=[pv, P])  # 19
    s.V.release(last)
    return O, m, l, turns


@gluon.jit
def overlapped_step(p, s, tile, O, P, m, l, alpha, turns, j, INDEX: gl.constexpr, MASKED: gl.constexpr):
    """Algorithm 2, lines 9 to 16."""
    wait_turn(p, s, turns, INDEX)
    qk = issue_qk(p, s, j, INDEX)  # 9: S_next = Q K_j^T, issued and not awaited
    if p.RESCALE_EARLY:
        O = rescale(p, O, alpha)
    s.V.wait_full(j - 1)  # 10
    pv = issue_pv(p, s, P, O, j - 1, INDEX)  # 11: O += P_cur V_{j-1}, issued and not awaited
    pass_turn(p, s, INDEX)
    S = warpgroup_mma_wait(1, deps=[qk])  # 12
    s.K.release(j)
    refill(p, s, s.K, p.k, tile, j, INDEX)
    S, m, l, alpha = online_softmax(p, tile, S, m, l, j, INDEX, MASKED)  # 13: runs under 11
    # 8 of the next step stands here for a reason: without a loop between the exponentials and the wait of line 14,
    # which the wait on an mbarrier is, ptxas hoists that wait above them, and nothing runs under 11.
    s.K.wait_full(j + 1, pred=j + 1 < tile.first + tile.count)
    O, P = warpgroup_mma_wait(0, deps=[pv, P])  # 14
    s.V.release(j - 1)  # 15
    refill(p, s, s.V, p.v, tile, j - 1, INDEX)
    P = convert(p, s, S, INDEX)  # 16: P_cur = P_next
    if not p.RESCALE_EARLY:
        O = rescale(p, O, alpha)  # 14
    return O, P, m, l, alpha, turns + 1


@gluon.jit
def attend_in_order(p, s, tile, INDEX: gl.constexpr):
    """Algorithm 1, lines 14 to 23: one product at a time; the PV of one tile and the QK of the next share a turn."""
    turns = tile.turns
    O, m, l = start(p)
    s.Q.wait_full(tile.index)  # 14
    wait_turn(p, s, turns, INDEX)
    unmasked = tile.first + gl.maximum(tile.masked, 1)
    for j in range(tile.first, unmasked):  # 15
        O, m, l, turns = step_in_order(p, s, tile, O, m, l, turns, j, INDEX, True)
    for j in range(unmasked, tile.first + tile.count):
        O, m, l, turns = step_in_order(p, s, tile, O, m, l, turns, j, INDEX, False)
    pass_turn(p, s, INDEX)
    s.Q.release(tile.index)
    return O, m, l, turns + 1


@gluon.jit
def step_in_order(p, s, tile, O, m, l, turns, j, INDEX: gl.constexpr, MASKED: gl.constexpr):
    """Algorithm 1, lines 16 to 22."""
    s.K.wait_full(j)  # 16
    qk = issue_qk(p, s, j, INDEX)  # 17
    pass_turn(p, s, INDEX)
    S = warpgroup_mma_wait(0, deps=[qk])
    s.K.release(j)
    refill(p, s, s.K, p.k, tile, j, INDEX)
    S, m, l, alpha = online_softmax(p, tile, S, m, l, j, INDEX, MASKED)  # 18, 19
    P = convert(p, s, S, INDEX)
    O = rescale(p, O, alpha)
    s.V.wait_full(j)  # 20
    wait_turn(p, s, turns + 1, INDEX)
    pv = issue_pv(p, s, P, O, j, INDEX)
    O, P = warpgroup_mma_wait(0, deps=[pv, P])  # 21
    s.V.release(j)  # 22
    refill(p, s, s.V, p.v, tile, j, INDEX)
    return O, m, l, turns + 1


@gluon.jit
def write_output(p, s, tile, O, m, l, INDEX: gl.constexpr):
    """Lines 24 and 25: normalize; O goes to HBM through the shared memory of V, by TMA, which leaves out rows that do
    not exist."""
    rows = tile.row + 64 * INDEX + gl.arange(0, 64, gl.SliceLayout(1, p.S_LAYOUT))
    lse = p.LSE + (tile.batch * p.heads + tile.head).to(gl.int64) * p.seqlen_q
    gl.store(lse + rows, (m + gl.log2(l)) * LN2, mask=rows < p.seqlen_q)  # log2(0) is -inf, as is m of such a row
    O = rescale(p, O, 1.0 / gl.where(l == 0.0, 1.0, l))
    wait_for_consumers(s, 0)  # nobody reads V any more
    s.O.slots.index(INDEX).store(O.to(p.o.dtype))
    fence_async_shared()
    wait_for_consumers(s, 1)  # all of O is there
    if INDEX == p.CONSUMERS - 1:
        for i in gl.static_range(p.CONSUMERS):
            tma_store(p.o, [tile.batch, tile.head, tile.row + 64 * i, 0], s.O.slots.index(i))
        tma.store_wait(0)
        s.O.release(tile.index)


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "heads", "group", "batch_heads", "section"])
def fa3_fwd(
    q, k, v, o, LSE, counter, qk_scale, seqlen_q, seqlen_k, heads, group, batch_heads, section,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, SCHEDULER: gl.constexpr,
    RESCALE_EARLY: gl.constexpr, FIRST_IN_TURN: gl.constexpr, PINGPONG: gl.constexpr, OVERLAP_STAGES: gl.constexpr,
    P_IN_SHARED: gl.constexpr, WARP_SPECIALIZED: gl.constexpr, REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """q, k, v and o are descriptors of (batch, heads, seqlen, head_dim) with boxes of 64, BLOCK_N, BLOCK_N, 64 rows."""
    p = Problem(
        q, k, v, o, LSE, counter, qk_scale, seqlen_q, seqlen_k, heads, group, batch_heads, section,
        BLOCK_M, CAUSAL, SCHEDULER, RESCALE_EARLY, FIRST_IN_TURN, PINGPONG, P_IN_SHARED, WARP_SPECIALIZED,
    )  # fmt: skip
    CONSUMERS: gl.constexpr = p.CONSUMERS
    D: gl.constexpr = q.block_type.shape[3]
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], q.dtype)
    K_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([p.BLOCK_N, D], k.dtype)
    V_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([p.BLOCK_N, p.D_V], v.dtype)
    O_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, p.D_V], o.dtype)
    P_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, p.BLOCK_N], v.dtype)
    # O lies over V, which needs as much memory as the larger of the two.
    V_SLOTS: gl.constexpr = max(STAGES, (BLOCK_M + p.BLOCK_N - 1) // p.BLOCK_N)
    v_slots = gl.allocate_shared_memory(v.dtype, [V_SLOTS, p.BLOCK_N, p.D_V], V_LAYOUT)
    if REINTERPRET_IS_PUBLIC:
        o_slots = v_slots.reinterpret(o.dtype, [CONSUMERS, 64, p.D_V], O_LAYOUT)
    else:
        o_slots = v_slots._reinterpret(o.dtype, [CONSUMERS, 64, p.D_V], O_LAYOUT)
    q_slots = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 64, D], Q_LAYOUT)
    Q = make_ring(q_slots, 1, CONSUMERS)
    K = make_ring(gl.allocate_shared_memory(k.dtype, [STAGES, p.BLOCK_N, D], K_LAYOUT), STAGES, CONSUMERS)
    V = make_ring(v_slots, STAGES, CONSUMERS)
    O = make_ring(o_slots, 1, 1)
    P = q_slots  # never used
    if P_IN_SHARED:
        P = gl.allocate_shared_memory(v.dtype, [CONSUMERS, 64, p.BLOCK_N], P_LAYOUT)
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(i), count=1)
    consumers = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(consumers.index(0), count=CONSUMERS)
    position_slots = gl.allocate_shared_memory(gl.int32, [1, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s = Shared(Q, K, V, O, P, turn, consumers, make_ring(position_slots, 1, CONSUMERS))
    fence_async_shared()
    if PINGPONG:
        mbarrier.arrive(turn.index(0), count=1)  # the first consumer goes first
    if CONSUMERS == 1 and not WARP_SPECIALIZED:
        consumer(p, s, gl.constexpr(0), OVERLAP_STAGES)
    else:
        gl.warp_specialize(
            [
                (consumer, (p, s, gl.constexpr(0), OVERLAP_STAGES)),
                (consumer, (p, s, gl.constexpr(1), OVERLAP_STAGES)),
                (consumer, (p, s, gl.constexpr(2), OVERLAP_STAGES)),
            ][:CONSUMERS]
            + [(producer, (p, s))][:WARP_SPECIALIZED],
            # Of all but the first consumer, whose warps are those of the launch.
            [4, 4, 1][3 - CONSUMERS : 2 + WARP_SPECIALIZED],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS][3 - CONSUMERS : 2 + WARP_SPECIALIZED],
        )


@torch.library.custom_op("flashsim_kernels::fa3", mutates_args=())
def fa3_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None,
    right: int | None,
    scale: float | None,
    deterministic: bool,
    build: str,
    num_stages: int | None,
    warp_specialized: bool,
    pingpong: bool | None,
    intra_wg_overlap: bool,
    overlap_stages: int,
    persistent: bool | None,
    P_in_shared: bool | None,
    BLOCK_M: int | None,
    BLOCK_N: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch(
        fa3_fwd, q, k, v, right == 0, scale, build=build, num_stages=num_stages, warp_specialized=warp_specialized,
        pingpong=pingpong, intra_wg_overlap=intra_wg_overlap, overlap_stages=overlap_stages, persistent=persistent,
        P_in_shared=P_in_shared, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip


@fa3_op.register_fake
def _(q, k, v, *_):
    batch, seqlen_q, heads, _ = q.shape
    o = torch.empty(batch, seqlen_q, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return o, torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)


register_gradients(fa3_op)


def fa3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    build: str = "2025-01",
    num_stages: int | None = None,
    warp_specialized: bool = True,
    pingpong: bool | None = None,
    intra_wg_overlap: bool = True,
    overlap_stages: int = 2,
    persistent: bool | None = None,
    P_in_shared: bool | None = None,
    BLOCK_M: int | None = None,
    BLOCK_N: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * Q K^T) V on sm_90, and with `return_lse` the logarithm of the sum of exponentials of each row.

    q: (batch, seqlen_q, heads, head_dim), fp16 or bf16; k: (batch, seqlen_k, heads_kv, head_dim), v: (batch, seqlen_k,
    heads_kv, head_dim_v), of the same dtype. heads_kv divides heads: query head h reads KV head
    h // (heads // heads_kv). Head dims: multiples of 8 from 16 to 256, independent. Any strides but the last, which is
    1; rows lie at multiples of 16 bytes.

    causal: row i sees key c if c <= i + seqlen_k - seqlen_q (aligned at the bottom right).
    scale: by default head_dim ** -0.5.
    deterministic: of the gradients, see `fa2_backward`.

    The others are the switches of the schedule `fa3`. None: as the published kernel has it, tiles and stages from
    `gluon.toml`.
    build: 2024-07: O is rescaled before its product, and the first QK product of a work tile takes a turn; 2025-01: O
        is rescaled after the softmax, unless head_dim is above 128, and that first product takes none.
    num_stages: slots of the K ring and of the V ring.
    warp_specialized: loads by a producer warp, not by the first consumer.
    pingpong: consumers take turns on the tensor cores.
    intra_wg_overlap: softmax of one tile under the PV product of the tile before.
    overlap_stages: 3: under the QK product of the tile after, too (appendix B.3).
    persistent: a CTA on each multiprocessor, with many work tiles: in turn, or with `causal` the longest first, from a
        counter.
    P_in_shared: P goes to its product through shared memory.
    BLOCK_M: 64, 128 or 192: one to three consumers. BLOCK_N: a power of two from 16 to 256.

    Returns O (batch, seqlen_q, heads, head_dim_v) in the inputs' dtype, and LSE (batch, heads, seqlen_q), fp32, natural
    logarithm. A row without keys has O = 0 and LSE = -inf. Gradients flow through both.

    Raises ArgumentError, before any launch, for what does not fit.
    """
    check_tensors("fa3", q=q, k=k, v=v)
    o, lse = fa3_op(
        q, k, v, None, 0 if causal else None, scale, deterministic, build, num_stages, warp_specialized, pingpong,
        intra_wg_overlap, overlap_stages, persistent, P_in_shared, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    return (o, lse) if return_lse else o
