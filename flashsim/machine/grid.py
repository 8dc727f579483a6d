"""The order in which work tiles are given out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from flashsim.machine.tiles import Coordinates, outer_blocks
from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Kernel


def grid_heads(kernel: Kernel, problem: AttentionProblem) -> int:
    """Heads that have work tiles of their own."""
    return problem.heads_q if kernel.grid.heads == "q" else problem.heads_kv


def tile_at(kernel: Kernel, problem: AttentionProblem) -> Callable[[int], Coordinates]:
    """A function from a position in the kernel's order, from 0, to the work tile there.

    `rows`: the blocks of a head from the first to the last, each with all its splits, then the next head, then the next
    batch entry. `longest_first`: sections of heads whose K and V fit `section_byte`, a power of two of them; in a
    section the last query block of all heads, which a causal mask leaves longest, then the one before
    (hopper/tile_scheduler.hpp, DynamicPersistentTileScheduler).
    """
    blocks, heads, splits = outer_blocks(kernel, problem), grid_heads(kernel, problem), kernel.grid.splits or 1
    if kernel.grid.order == "rows":

        def in_rows(position: int) -> Coordinates:
            position, split = divmod(position, splits)
            position, block = divmod(position, blocks)
            batch, head = divmod(position, heads)
            return Coordinates(block, head, batch, split)

        return in_rows

    head_byte = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * problem.element_bytes
    fit = max(1, kernel.grid.section_byte // head_byte)
    section = (1 << (fit.bit_length() - 1)) * problem.heads_per_kv
    total = heads * problem.batch

    def longest_first(position: int) -> Coordinates:
        first = position // (section * blocks) * section
        width = min(section, total - first)
        block, head = divmod(position - first * blocks, width)
        head += first
        return Coordinates(blocks - 1 - block, head % heads, head // heads)

    return longest_first


def tile_count(kernel: Kernel, problem: AttentionProblem) -> int:
    """Work tiles of the whole grid."""
    blocks, heads = outer_blocks(kernel, problem), grid_heads(kernel, problem)
    return blocks * heads * problem.batch * (kernel.grid.splits or 1)


class WorkTiles:
    """The work tiles of a launch, handed out to its CTAs; `slots` is how many CTAs are resident at a time.

    If `together` is more than 1, each stands for so many that follow each other.
    """

    def __init__(self, kernel: Kernel, problem: AttentionProblem, slots: int, together: int = 1) -> None:
        self.slots = slots
        self.count = -(-tile_count(kernel, problem) // together)
        at = tile_at(kernel, problem)
        self._at = at if together == 1 else lambda position: at(position * together)
        self._static = kernel.grid.launch == "static"
        self._of_a_cta = {"cta": 1, "head": outer_blocks(kernel, problem)}.get(kernel.grid.launch)
        self._next = 0

    @property
    def many_ctas(self) -> bool:
        """True if CTAs end and others take their place, each with as many work tiles as the launch says."""
        return self._of_a_cta is not None

    @property
    def left(self) -> int:
        """Work tiles that nobody has asked for yet."""
        return self.count - self._next

    def of_slot(self, slot: int) -> Iterator[Coordinates]:
        """The work tiles of the CTAs in `slot`: dealt out in turn if the launch is static, else whatever comes next."""
        if self._static:
            return (self._at(position) for position in range(slot, self.count, self.slots))
        return self.next_ones()

    def of_next_cta(self) -> list[Coordinates]:
        """The work tiles of the CTA that starts next; none if all have been given out. For launches of many CTAs."""
        return list(islice(self.next_ones(), self._of_a_cta))

    def next_ones(self) -> Iterator[Coordinates]:
        """Work tiles in order, each when it is asked for."""
        while self._next < self.count:
            self._next += 1
            yield self._at(self._next - 1)
