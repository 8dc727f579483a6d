"""What a statement of a schedule can mean: its operands' kinds, places, dtypes and shapes, checked when it is said."""

from __future__ import annotations

from typing import Any

from flashsim.errors import SimulationError, unknown
from flashsim.machine.buffers import View
from flashsim.machine.costs import MAP_COUNT, REDUCE_COUNT
from flashsim.machine.tiles import HbmTile, WorkTile
from flashsim.schedules.tensors import WIDTHS

OPERANDS = {"fill": 0, "mask": 1, "dropout": 1, "scale": 1, "copy": 1}
"""Tiles that a map takes; two if it is not named here."""


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
    if b.place != "shared" or into.place != "registers":
        raise SimulationError(
            f"gemm reads its second operand from shared memory and accumulates in registers, got {b} ({b.place}) and "
            f"{into} ({into.place})"
        )
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
    if len(views) != wanted:
        raise SimulationError(f"{what} takes {wanted} tiles, got {len(views)}")
    first = views[0].shape if views else into.shape
    result = (first[0], 1) if verb == "reduce" else first
    seconds = (first, (first[0], 1))
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
