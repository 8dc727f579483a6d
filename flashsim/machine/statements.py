"""What a statement of a schedule can mean: its operands' kinds, places, dtypes and shapes, checked when it is said."""

from __future__ import annotations

from typing import Any

from flashsim.errors import SimulationError, unknown
from flashsim.machine.buffers import View
from flashsim.machine.costs import MAP_COUNT, REDUCE_COUNT
from flashsim.machine.tiles import HbmTile, WorkTile
from flashsim.schedules.tensors import WIDTHS

OPERANDS = {"permute": 1, "hadamard": 1, "fill": 0, "mask": 1, "dropout": 1, "scale": 1, "copy": 1}
"""Tiles that a map takes; two if it is not named here."""


SCALED = ("exp", "mul", "div")
"""Maps that take numbers, and tiles of one element in HBM, beside tiles."""


def is_scalar(operand: Any) -> bool:
    """A number, or a tile of one element in HBM, which is read as an operand and needs no load."""
    if isinstance(operand, HbmTile):
        return operand.shape == (1, 1)
    return isinstance(operand, int | float) and not isinstance(operand, bool)


def check_copy(verb: str, source: Any, into: Any) -> None:
    """Raises SimulationError for a load or store whose ends do not fit."""
    ends = (HbmTile, View) if verb == "load" else (View, HbmTile)
    if not isinstance(source, ends[0]) or not isinstance(into, ends[1]):
        places = "HBM to the SM" if verb == "load" else "the SM to HBM"
        raise SimulationError(f"{verb} goes from {places}, got {source} into {into}")
    if source.shape != into.shape:
        raise SimulationError(f"{verb} of {source.shape} into {into.shape}: shapes do not fit")


def check_gemm(a: Any, b: Any, into: Any) -> None:
    """Raises SimulationError for operands that no MMA instruction takes."""
    for operand in (a, b, into):
        if not isinstance(operand, View):
            raise SimulationError(f"gemm takes tiles in shared memory and registers, got {operand}")
    if a.shape[1] != b.shape[0] or into.shape != (a.shape[0], b.shape[1]):
        raise SimulationError(f"gemm of {a.shape} and {b.shape} into {into.shape}: shapes do not fit")
    if into.place != "registers":
        raise SimulationError(f"gemm accumulates in registers, got {into} ({into.place})")
    if WIDTHS[b.dtype] == 1 and not b.flipped:
        raise SimulationError(f"gemm of 8 bits reads {b} along k: its tile must hold the transpose")
    if a.dtype != b.dtype or WIDTHS[a.dtype] > 2:
        raise SimulationError(f"gemm of {a.dtype} and {b.dtype}: both must be of one dtype, of 16 bits or less")


def check_compute(verb: str, op: str, views: tuple[Any, ...], into: Any, operands: tuple[Any, ...]) -> None:
    """Raises SimulationError for a map, reduce or convert that cannot be computed."""
    what = f"{verb}({op})" if op else verb
    for tile in (*views, into):
        if not isinstance(tile, View):
            raise SimulationError(f"{what} takes tiles in registers and shared memory, got {tile}")
    known = MAP_COUNT if verb == "map" else REDUCE_COUNT if verb == "reduce" else ()
    if known and op not in known:
        raise SimulationError(unknown(f"operation of {verb}", op, known))
    wanted = OPERANDS.get(op, 2) if verb == "map" else 1
    scaled = any(is_scalar(operand) for operand in operands) and op in ("mul", "div")
    if len(views) != wanted and not (scaled and len(views) == 1):
        raise SimulationError(f"{what} takes {wanted} tiles, got {len(views)}")
    first = views[0].shape if views else into.shape
    result = (first[0], 1) if verb == "reduce" else first
    seconds = (first, (first[0], 1), (1, 1))
    if into.shape != result or any(view.shape not in seconds for view in views[1:]):
        shapes = " and ".join(str(view.shape) for view in views)
        raise SimulationError(f"{what} of {shapes} into {into.shape}: shapes do not fit")
    if op == "fill" and not (len(operands) == 1 and isinstance(operands[0], int | float)):
        raise SimulationError(f"map(fill) takes one number, got {operands}")
    if op in ("mask", "dropout"):
        _check_place(op, operands[1:])


def _check_place(op: str, operands: tuple[Any, ...]) -> None:
    """`tile, j` and perhaps the first of the tile's rows, and the first of its columns, that the scores are of."""
    if len(operands) not in (2, 3, 4) or not isinstance(operands[0], WorkTile):
        raise SimulationError(f"map({op}) takes scores, a work tile and the number of a KV tile, got {operands}")
    operands[0].block(operands[1])
