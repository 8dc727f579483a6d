"""What a rejected result looks like: the broken clauses of the rule, and the element that shows each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from flashsim.numerics.compare import Clause
from flashsim.numerics.layout import Float


class Computed(NamedTuple):
    """A tensor as it came and as it should be, and what its dimensions are called."""

    given: Float
    reference: Float
    axes: tuple[str, ...]

    def place(self, index: int) -> str:
        """One element in words; `index` counts as the array lies in memory."""
        at = np.unravel_index(index, self.given.shape)
        where = ", ".join(f"{axis} {n}" for axis, n in zip(self.axes, at, strict=True))
        return f"{where}: got {self.given[at]:.7g}, expected {self.reference[at]:.7g}"


def explain(broken: Iterable[Clause], tensors: dict[str, Computed]) -> str:
    """A line for each clause, and one below it for the element; `tensors` by the name that clauses begin with."""
    lines = []
    for clause in broken:
        name, _, rule = clause.what.partition(": ")
        line = f"- {name}: {rule} {clause.value:.3g}, allowed {clause.limit:.3g}"
        tensor = tensors[name]
        if np.any(nan := np.isnan(tensor.given)):
            lines += [line, f"    {int(nan.sum())} NaN, the first at {tensor.place(int(np.argmax(nan)))}"]
            continue
        with np.errstate(invalid="ignore"):
            error = np.where(tensor.given == tensor.reference, 0.0, np.abs(tensor.given - tensor.reference))
        if rule.startswith("zeros"):
            error = np.where(tensor.given == 0, error, 0.0)
        elif rule.startswith("largest"):
            line += f", in {int(np.sum(error > clause.limit))} of {error.size} elements"
        lines.append(line)
        if not rule.startswith("mean"):
            lines.append(f"    worst at {tensor.place(int(np.argmax(error)))}")
    return "\n".join(lines)
