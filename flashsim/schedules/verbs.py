"""What a schedule can say: the verbs of a warpgroup, and the memory and barriers that it shares with others.

A statement is one of three kinds. *Issue*: a call such as `wg.gemm(Q, K[j].T, into=S)`; it returns something that can
be waited for. *Wait*: `yield`. *Signal*: `ring.release(j)`, `turn.pass_on()`. A warpgroup issues in program order,
and an issue or a signal takes effect when everything before it in the text has been accepted; Python runs ahead of
that, and simulated time does not.

`map`, `reduce`, `convert` and an `mma.sync` product are ordered by the hardware's scoreboard: what follows in the
text may use their results at once. `load`, `store` and a `wgmma` product are asynchronous: until somebody has waited
for them, their operands may still be read and their result may still be written.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Literal, Protocol

from flashsim.problem import AttentionProblem

Program = Generator[Any, None, None]
"""What a role runs: a generator that yields what it waits for."""

MapOp = Literal[
    "mask", "dropout", "scale", "exp", "exp_lse", "rescale_factor", "copy", "fill", "add", "sub", "mul", "div", "lse",
    "permute", "hadamard",
]  # fmt: skip
ReduceOp = Literal["max", "abs_max", "sum"]


class Operand(Protocol):
    """A handle on a tile: a shape and dtype at a place (`hbm`, `shared` or `registers`). It holds no numbers itself."""

    shape: tuple[int, int]
    dtype: str
    place: str

    @property
    def T(self) -> Operand:  # noqa: N802 - numpy's name for a transpose
        """The same tile, transposed."""

    def rows(self, start: int, count: int) -> Operand:
        """Rows [start, start + count) of this tile."""

    def columns(self, start: int, count: int) -> Operand:
        """Columns [start, start + count) of this tile."""


class Awaitable(Protocol):
    """What `yield` takes."""

    def describe(self) -> str: ...


class Ring(Protocol):
    """Slots in shared memory, filled by loads and emptied by consumers in turn; item j lives in slot j mod
    num_stages."""

    def __getitem__(self, j: int) -> Operand:
        """The slot of item j."""

    def full(self, j: int) -> Awaitable:
        """Until the load of item j has landed."""

    def empty(self, j: int) -> Awaitable:
        """Until every consumer has released the item that was in item j's slot before it."""

    def release(self, j: int) -> None:
        """This warpgroup does not need item j any more."""

    def commit(self, j: int) -> None:
        """This warpgroup has written item j, which no load does."""


class Sync(Protocol):
    """A barrier over several warpgroups."""

    def wait(self) -> Awaitable:
        """Arrive, and wait until all have arrived."""


class Turn(Protocol):
    """The right to use the tensor cores, handed round among the warpgroups."""

    def wait(self) -> Awaitable: ...
    def pass_on(self) -> None: ...


class Order(Protocol):
    """The order in which the CTAs of a head add to a tile that they share: that of their own blocks."""

    def turn(self, tile: WorkTile, j: int) -> Awaitable:
        """Until the work tiles before this one have added to what tile j of its inner loop stands for."""

    def pass_on(self, tile: WorkTile, j: int) -> None:
        """The next one may."""


class WorkTile(Protocol):
    """One piece of the grid: a block of queries of one head with the KV tiles that it visits, or a block of keys with
    its Q tiles, as the kernel's `Grid.over` says.

    The tiles of the inner loop are numbered by a count `j` that runs on over all work tiles of a CTA, as ring positions
    do: this work tile's are `first` to `last`, walked from the last block to the first.
    """

    index: int
    """How many work tiles this CTA had before."""
    first: int
    last: int
    count: int
    """Number of KV tiles; 0 where the mask hides all keys from all its queries."""

    def __getattr__(self, name: str) -> Any:
        """A tensor of `schedules.tensors`, or of the kernel's workspace: the part that belongs to this work tile, as an
        operand. What the work tile does not fix is an argument: `tile.Q`, `tile.K(j)` of a block of queries, `tile.K`,
        `tile.Q(i)` of a block of keys."""

    def partial(self, j: int) -> bool:
        """True if the mask, or the end of the keys, hides some of the scores of tile j."""


class Warpgroup(Protocol):
    """The unit that issues: four warps, one on each sub-partition of the SM (or a single producer warp)."""

    index: int
    """Position among the warpgroups of the same role."""
    problem: AttentionProblem

    def tiles(self) -> Iterator[WorkTile]:
        """The work tiles of this CTA, one after the other; the same for every warpgroup."""

    def kv_tiles(self, tile: WorkTile, start: int = 0) -> Iterator[int]:
        """The running numbers of the tile's KV tiles, without the first `start`. The machine owns this iterator."""

    def q_tiles(self, tile: WorkTile, start: int = 0) -> Iterator[int]:
        """The same of a block of keys, which visits Q tiles."""

    def load(self, source: Operand, into: Operand) -> Awaitable:
        """Copy from HBM to shared memory, by TMA or cp.async, or to registers. A ring's slot is full when it
        has landed."""

    def store(self, source: Operand, into: Operand) -> Awaitable:
        """Copy from shared memory (by TMA) or registers to HBM."""

    def atomic_add(self, source: Operand, into: Operand) -> Awaitable:
        """Add a tile to one in HBM, from registers (RED) or from shared memory (by TMA). Additions may come in any
        order."""

    def gemm(self, a: Operand, b: Operand, into: Operand, accumulate: bool = False) -> Awaitable:
        """into = a b, or into += a b."""

    def map(self, op: MapOp, *operands: Any, into: Operand) -> Awaitable:
        """Elementwise: `exp` is exp(scale (x - y)), `exp_lse` exp(scale x - y), with the softmax scale.

        `mask` and `dropout` take scores, a work tile, the number of a tile of its inner loop, and the row and the
        column of that tile at which the scores begin: without them, below those of the warpgroups before this one.
        `dropout` multiplies by 1 / (1 - p) or by 0, which of them depends on the problem and the place alone. `exp`,
        `mul` and `div` take numbers, too, and tiles of one element in HBM: `exp` is multiplied by them. `permute`
        changes which thread holds what. `hadamard` multiplies rows by a random-sign Hadamard matrix.
        """

    def reduce(self, op: ReduceOp, tile: Operand, into: Operand) -> Awaitable:
        """Along rows, accumulating: into = op(into, op over each row of tile)."""

    def convert(self, tile: Operand, into: Operand) -> Awaitable:
        """Copy to another dtype, and to shared memory if `into` is there."""


class CTA(Protocol):
    """Where a schedule declares what the warpgroups of one CTA share."""

    problem: AttentionProblem
    head_dim: int
    """Columns of the tiles of Q and K: the problem's head dim, padded as the kernel says."""
    head_dim_v: int
    """The same of V and O."""

    def ring(self, name: str, shape: tuple[int, int], stages: int, consumers: int, dtype: str | None = None) -> Ring:
        """`stages` slots of `shape`; each item is released by `consumers` warpgroups. dtype defaults to the
        problem's."""

    def slot(self, name: str, shape: tuple[int, int], dtype: str | None = None) -> Operand:
        """One tile of shared memory, ordered by other barriers."""

    def overlay(self, name: str, shape: tuple[int, int], consumers: int, over: Ring, dtype: str | None = None) -> Ring:
        """A one-slot ring at the addresses of another ring, which costs no memory of its own if it is not larger."""

    def sync(self, name: str, warpgroups: int) -> Sync: ...
    def turn(self, name: str, warpgroups: int) -> Turn: ...
    def order(self, name: str, warpgroups: int) -> Order: ...


class Registers(Protocol):
    """Where a role declares the register tiles of one of its warpgroups."""

    problem: AttentionProblem
    kernel: Any
    """The `schedules.base.Kernel` that is declared."""
    head_dim: int
    head_dim_v: int
    index: int

    def tile(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: str = "fp32",
        over: Operand | None = None,
        warps: tuple[int, int] | None = None,
    ) -> Operand:
        """A tile spread over the warpgroup's registers; `over` names a tile that is dead when this one is alive.

        `warps` along rows and along columns share it: an mma.sync product reads the rows of its left operand, and the
        columns of its right one, once for each. By default each warp has its own rows.
        """

    def rows(self, name: str, count: int) -> Operand:
        """One fp32 value per row."""
