"""What the warpgroups of `fa3` share: rings of shared memory, turns, parts of their loops. Device code, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
)
from triton.language.core import _aggregate as aggregate

# Names that changed: tma.async_copy_* until Triton 3.7, shared_memory_descriptor._reinterpret until 3.8.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
REINTERPRET_IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


LN2 = gl.constexpr(0.6931471805599453)


@aggregate
class Ring:
    """Slots in shared memory with a full and an empty mbarrier each.

    Item j lives in slot j mod num_stages, and is phase j // num_stages of the slot's barriers.
    """

    slots: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    num_stages: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, slots, full, empty, num_stages):
        self.slots = slots
        self.full = full
        self.empty = empty
        self.num_stages = gl.constexpr(num_stages)

    @gluon.jit
    def slot(self, j):
        return self.slots.index(j % self.num_stages)

    @gluon.jit
    def wait_full(self, j, pred=True):
        mbarrier.wait(self.full.index(j % self.num_stages), (j // self.num_stages) & 1, pred=pred)

    @gluon.jit
    def wait_empty(self, j):
        # The first time round, the phase before the first is awaited: an mbarrier starts with that one complete.
        mbarrier.wait(self.empty.index(j % self.num_stages), ((j // self.num_stages) & 1) ^ 1)

    @gluon.jit
    def commit(self, j):
        mbarrier.arrive(self.full.index(j % self.num_stages), count=1)

    @gluon.jit
    def release(self, j):
        mbarrier.arrive(self.empty.index(j % self.num_stages), count=1)

    @gluon.jit
    def load(self, j, desc, batch, head, row):
        """Rows from `row` on of one head, by TMA; those that do not exist are 0. Its end makes the slot full."""
        full = self.full.index(j % self.num_stages)
        mbarrier.expect(full, desc.block_type.nbytes)
        tma_load(desc, [batch, head, row, 0], full, self.slot(j))


@gluon.jit
def make_ring(slots, num_stages: gl.constexpr, consumers: gl.constexpr):
    """`consumers` have to release an item before its slot is empty."""
    full = gl.allocate_shared_memory(gl.int64, [num_stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [num_stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(num_stages):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=consumers)
    return Ring(slots, full, empty, num_stages)


@aggregate
class Shared:
    """Shared memory and barriers of one CTA. Q and O have one item a work tile, K and V one a KV tile."""

    Q: Ring
    K: Ring
    V: Ring
    O: Ring  # lies over V
    P: gl.shared_memory_descriptor  # (consumers, 64, BLOCK_N)
    turn: gl.shared_memory_descriptor  # an mbarrier for each consumer
    consumers: gl.shared_memory_descriptor  # an mbarrier at which all consumers arrive
    next_position: Ring  # of the work tile after this one, where they are given out dynamically

    @gluon.constexpr_function
    def __init__(self, Q, K, V, O, P, turn, consumers, next_position):
        self.Q = Q
        self.K = K
        self.V = V
        self.O = O
        self.P = P
        self.turn = turn
        self.consumers = consumers
        self.next_position = next_position


@gluon.jit
def start(p):
    """O = 0, m = -inf, l = 0: the neutral element of the merge."""
    rows: gl.constexpr = gl.SliceLayout(1, p.S_LAYOUT)
    O = gl.zeros([64, p.D_V], gl.float32, p.O_LAYOUT)
    return O, gl.full([64], float("-inf"), gl.float32, rows), gl.zeros([64], gl.float32, rows)


@gluon.jit
def issue_qk(p, s, j, INDEX: gl.constexpr):
    S = gl.zeros([64, p.BLOCK_N], gl.float32, p.S_LAYOUT)
    K = s.K.slot(j)
    return warpgroup_mma(s.Q.slots.index(INDEX), K.permute((1, 0)), S, use_acc=False, is_async=True)


@gluon.jit
def convert(p, s, S, INDEX: gl.constexpr):
    """P as the left operand of the PV product: in the layout that this has in registers, or in shared memory."""
    P = S.to(p.v.dtype)
    if p.P_IN_SHARED:
        s.P.index(INDEX).store(P)
        fence_async_shared()
    return gl.convert_layout(P, gl.DotOperandLayout(0, p.O_LAYOUT, k_width=2))


@gluon.jit
def issue_pv(p, s, P, O, j, INDEX: gl.constexpr):
    return warpgroup_mma(s.P.index(INDEX) if p.P_IN_SHARED else P, s.V.slot(j), O, is_async=True)


@gluon.jit
def online_softmax(p, tile, S, m, l, j, INDEX: gl.constexpr, MASKED: gl.constexpr):
    """P~ = exp(S - m) with the new maximum m; alpha is what O must be rescaled by. m is scaled, to base 2."""
    m_old = m
    if MASKED:
        S = gl.where(p.seen(tile, j, INDEX), S * p.qk_scale, float("-inf"))
        m = gl.maximum(m_old, gl.max(S, 1))
        shift = gl.where(m == float("-inf"), 0.0, m)  # of a row that has seen no key yet
        P = gl.exp2(S - gl.expand_dims(shift, 1))
    else:  # one FFMA for each score
        m = gl.maximum(m_old, gl.max(S, 1) * p.qk_scale)
        shift = m
        P = gl.exp2(S * p.qk_scale - gl.expand_dims(shift, 1))
    alpha = gl.exp2(m_old - shift)
    return P, m, l * alpha + gl.sum(P, 1), alpha


@gluon.jit
def rescale(p, O, alpha):
    """O = diag(alpha) O."""
    return O * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, p.O_LAYOUT)), 1)


@gluon.jit
def wait_turn(p, s, number, INDEX: gl.constexpr):
    """Until it is this consumer's turn, which comes for the time `number`."""
    if p.PINGPONG:
        mbarrier.wait(s.turn.index(INDEX), number & 1)


@gluon.jit
def pass_turn(p, s, INDEX: gl.constexpr):
    if p.PINGPONG:
        mbarrier.arrive(s.turn.index((INDEX + 1) % p.CONSUMERS), count=1)


@gluon.jit
def load_queries(p, s, tile):
    """One box for each consumer's rows, all of them one item."""
    full = s.Q.full.index(0)
    mbarrier.expect(full, p.q.block_type.nbytes * p.CONSUMERS)
    for i in gl.static_range(p.CONSUMERS):
        tma_load(p.q, [tile.batch, tile.head, tile.row + 64 * i, 0], full, s.Q.slots.index(i))


@gluon.jit
def wait_for_consumers(s, phase: gl.constexpr):
    """There are two of these a work tile, so that the parity of each is always the same."""
    mbarrier.arrive(s.consumers.index(0), count=1)
    mbarrier.wait(s.consumers.index(0), phase)


@gluon.jit
def first_loads(p, s, tile, INDEX: gl.constexpr):
    """Without a producer: the first consumer fills the rings before anyone starts."""
    if not p.WARP_SPECIALIZED and INDEX == 0:
        head_kv = tile.head // p.group
        load_queries(p, s, tile)
        for j in range(gl.minimum(s.K.num_stages, tile.count)):
            s.K.load(j, p.k, tile.batch, head_kv, tile.key(j, p.BLOCK_N))
            s.V.load(j, p.v, tile.batch, head_kv, tile.key(j, p.BLOCK_N))


@gluon.jit
def refill(p, s, ring, desc, tile, j, INDEX: gl.constexpr):
    """Without a producer: once all consumers have released item j, the first one loads the item that follows there.

    All of them wait for that. No public kernel has warp specialization off; this is the smallest change that makes one.
    """
    if not p.WARP_SPECIALIZED:
        following = j + ring.num_stages
        ring.wait_empty(following)
        if INDEX == 0:  # noqa: SIM102 - known when this is compiled
            if following < tile.count:
                ring.load(following, desc, tile.batch, tile.head // p.group, tile.key(following, p.BLOCK_N))
