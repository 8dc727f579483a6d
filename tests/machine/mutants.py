"""Mutants of a schedule file: one wait or one signal less in each.

A statement is found in the syntax tree and replaced in the text, so that every line keeps its number.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

VERBS = ("load", "store", "gemm", "map", "reduce", "convert")
"""Calls that issue an operation: without `yield` they still do, and nobody waits for its end."""
SIGNALS = ("release", "pass_on")
STILL_A_GENERATOR = "yield from ()"
"""What stands for a wait that is gone: a function without any `yield` would be another kind of function."""
PROBE = "EXECUTED"
"""Name of the set in a probed file that collects the lines of the statements that ran."""


@dataclass(frozen=True)
class Mutant:
    """One changed statement of a schedule file."""

    function: str
    line: int
    statement: str
    change: str
    """`removed`, `not awaited` (issued without waiting) or `arrives only` (a sync without waiting for the others)."""
    source: str
    """The whole file with the change."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Names the mutant whatever the line numbers are."""
        return self.function, self.statement, self.change

    def __str__(self) -> str:
        return f"{self.function}:{self.line}: {self.statement} {self.change}"


def mutants_of(source: str) -> list[Mutant]:
    """A mutant for every statement that waits or signals, in the order of the file; two for a sync."""
    found = []
    for function, statement in _statements(source):
        text = ast.get_source_segment(source, statement)
        assert text is not None
        for change, instead in _changes(statement.value):
            found.append(Mutant(function, statement.lineno, text, change, _replaced(source, statement, instead)))
    return found


def probed(source: str) -> str:
    """`source` with every statement that is mutated somewhere adding its line to the set `EXECUTED`."""
    for _, statement in reversed(list(_statements(source))):
        text = ast.get_source_segment(source, statement)
        source = _replaced(source, statement, f"{PROBE}.add({statement.lineno}); {text}")
    return source + f"\n\n{PROBE}: set[int] = set()\n"


def _statements(source: str) -> Iterator[tuple[str, ast.Expr]]:
    """Expression statements that wait or signal, with the name of the function around them."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Expr) and list(_changes(node.value)):
                    yield function.name, node


def _changes(value: ast.expr) -> Iterator[tuple[str, str]]:
    """(what is changed, text in the statement's place) for a statement that consists of the expression `value`."""
    if isinstance(value, ast.Call) and _method(value) in SIGNALS:
        yield "removed", "pass"
    if isinstance(value, ast.Yield) and value.value is not None:
        awaited = value.value
        if isinstance(awaited, ast.Call) and _method(awaited) in VERBS:
            yield "not awaited", ast.unparse(awaited)
        else:
            yield "removed", STILL_A_GENERATOR
        # A turn's `wait` is a pure question; a sync's also says that this warpgroup has come.
        if isinstance(awaited, ast.Call) and _method(awaited) == "wait" and "turn" not in ast.unparse(awaited):
            yield "arrives only", ast.unparse(awaited)


def _method(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _replaced(source: str, statement: ast.Expr, text: str) -> str:
    lines = source.splitlines(keepends=True)
    first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
    before, after = lines[first].encode()[: statement.col_offset], lines[last].encode()[statement.end_col_offset :]
    # Lines that the statement took and its replacement does not are left empty, behind it.
    lines[first : last + 1] = [before.decode() + text + after.decode() + "\n" * (last - first)]
    return "".join(lines)
