"""What `fa3` computes: the problem, its work tiles, and the order in which they are given out. In Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate as aggregate


@aggregate
class WorkTile:
    """A block of queries of one head, with the KV tiles that it visits: items first to first + count - 1."""

    index: gl.tensor  # how many work tiles this CTA had before
    batch: gl.tensor
    head: gl.tensor
    row: gl.tensor  # its first query
    first: gl.tensor
    count: gl.tensor
    masked: gl.tensor  # so many of them have scores that do not count, and come first
    turns: gl.tensor  # turns on the tensor cores that each consumer had before

    @gluon.constexpr_function
    def __init__(self, index, batch, head, row, first, count, masked, turns):
        self.index = index
        self.batch = batch
        self.head = head
        self.row = row
        self.first = first
        self.count = count
        self.masked = masked
        self.turns = turns

    @gluon.jit
    def key(self, j, BLOCK_N: gl.constexpr):
        """The first key of item j: KV tiles are walked from the last to the first."""
        return (self.first + self.count - 1 - j) * BLOCK_N


@aggregate
class Problem:
    """Tensors, sizes and switches: the same for all work tiles."""

    q: tma.tensor_descriptor  # (batch, heads, seqlen, head_dim), as k, v and o
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    o: tma.tensor_descriptor
    LSE: gl.tensor  # pointer to (batch, heads, seqlen_q)
    counter: gl.tensor  # pointer to the number of work tiles given out, beyond the first of each CTA
    qk_scale: gl.tensor  # scale * log2(e)
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    heads: gl.tensor
    group: gl.tensor  # query heads for each KV head
    batch_heads: gl.tensor  # batch * heads
    section: gl.tensor  # heads that longest-first order works on at a time
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    D_V: gl.constexpr
    CONSUMERS: gl.constexpr
    CAUSAL: gl.constexpr
    SCHEDULER: gl.constexpr  # "cta", "static", "dynamic"
    RESCALE_EARLY: gl.constexpr
    FIRST_IN_TURN: gl.constexpr
    PINGPONG: gl.constexpr
    P_IN_SHARED: gl.constexpr
    WARP_SPECIALIZED: gl.constexpr
    S_LAYOUT: gl.constexpr
    O_LAYOUT: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q, k, v, o, LSE, counter, qk_scale, seqlen_q, seqlen_k, heads, group, batch_heads, section,
        BLOCK_M, CAUSAL, SCHEDULER, RESCALE_EARLY, FIRST_IN_TURN, PINGPONG, P_IN_SHARED, WARP_SPECIALIZED,
    ):  # fmt: skip
        self.q = q
        self.k = k
        self.v = v
        self.o = o
        self.LSE = LSE
        self.counter = counter
        self.qk_scale = qk_scale
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.heads = heads
        self.group = group
        self.batch_heads = batch_heads
        self.section = section
        BLOCK_N, D_V = k.block_type.shape[2], v.block_type.shape[3]
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.D_V = gl.constexpr(D_V)
        self.CONSUMERS = gl.constexpr(BLOCK_M // 64)
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.SCHEDULER = gl.constexpr(SCHEDULER)
        self.RESCALE_EARLY = gl.constexpr(RESCALE_EARLY)
        self.FIRST_IN_TURN = gl.constexpr(FIRST_IN_TURN)
        self.PINGPONG = gl.constexpr(PINGPONG)
        self.P_IN_SHARED = gl.constexpr(P_IN_SHARED)
        self.WARP_SPECIALIZED = gl.constexpr(WARP_SPECIALIZED)
        self.S_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
        self.O_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16]))

    @gluon.jit
    def blocks(self):
        return gl.cdiv(self.seqlen_q, self.BLOCK_M)

    @gluon.jit
    def work_tile(self, position, index, first, turns):
        """The work tile at `position` of the order in which they are given out."""
        blocks = self.blocks()
        if self.SCHEDULER == "dynamic":
            # Longest first, as hopper/tile_scheduler.hpp: within a section of as many heads as have their K and V in
            # L2 together, the last block of queries of all heads, which a causal mask leaves longest, then the others.
            before = position // (self.section * blocks) * self.section
            width = gl.minimum(self.section, self.batch_heads - before)
            block = blocks - 1 - (position - before * blocks) // width
            head = before + (position - before * blocks) % width
        else:
            block = position % blocks
            head = position // blocks
        row = block * self.BLOCK_M
        last, shown = self.seqlen_k, self.seqlen_k  # keys that some query sees; keys that all queries see
        if self.CAUSAL:
            shift = self.seqlen_k - self.seqlen_q
            last = gl.minimum(self.seqlen_k, row + self.BLOCK_M + shift)
            shown = gl.maximum(gl.minimum(self.seqlen_k, row + 1 + shift), 0)
        # A work tile without keys visits one KV tile, which is masked: O = 0 and LSE = -inf come out of it.
        count = gl.maximum(gl.cdiv(gl.maximum(last, 0), self.BLOCK_N), 1)
        masked = count - gl.minimum(shown // self.BLOCK_N, count)
        return WorkTile(index, head // self.heads, head % self.heads, row, first, count, masked, turns)

    @gluon.jit
    def seen(self, tile, j, INDEX: gl.constexpr):
        """Which scores of item j count, of the rows of this consumer."""
        rows = tile.row + 64 * INDEX + gl.arange(0, 64, gl.SliceLayout(1, self.S_LAYOUT))
        keys = tile.key(j, self.BLOCK_N) + gl.arange(0, self.BLOCK_N, gl.SliceLayout(0, self.S_LAYOUT))
        last = gl.full([64], self.seqlen_k - 1, gl.int32, gl.SliceLayout(1, self.S_LAYOUT))
        if self.CAUSAL:
            last = gl.minimum(last, rows + (self.seqlen_k - self.seqlen_q))
        return gl.expand_dims(keys, 0) <= gl.expand_dims(last, 1)
