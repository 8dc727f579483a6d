"""Mutants of a schedule's text: for each wait and each signal, files in which it is gone, early, or of another slot.

A statement is found in the syntax tree and replaced in the text, so that every line keeps its number.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

VERBS = ("load", "store", "atomic_add", "gemm", "map", "reduce", "convert")
"""Calls that issue an operation: without `yield` they still do, and nobody waits for its end."""
SIGNALS = ("release", "commit", "pass_on")
OF_A_SLOT = ("full", "empty", "release", "commit")
"""Calls whose one argument says which item of a ring is meant."""
STILL_A_GENERATOR = "yield from ()"
"""What stands for a wait that is gone: a function without any `yield` would be another kind of function."""
EXECUTED = "EXECUTED"
"""Name of the set in a probed file that collects the lines of the statements that ran."""


@dataclass(frozen=True)
class Mutant:
    """One changed statement of a schedule file."""

    function: str
    line: int
    statement: str
    change: str
    """`removed`; `not awaited`: issued without waiting; `arrives only`: a sync without waiting for the others;
    `earlier`: before the statement before it; `next item`, `item before`: of a ring."""
    source: str
    """The whole file with the change."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Names the mutant whatever the line numbers are."""
        return self.function, self.statement, self.change

    @property
    def of_a_turn(self) -> bool:
        """The statement waits for a turn or passes it on."""
        return self.statement.removeprefix("yield ").endswith((".pass_on()", "turn.wait()"))

    @property
    def only_waits(self) -> bool:
        """The statement issues nothing and tells nobody anything: it waits for what was issued or said elsewhere."""
        value = ast.parse(self.statement).body[0]
        if not isinstance(value, ast.Expr) or not isinstance(value.value, ast.Yield):
            return False
        awaited = value.value.value
        return not (isinstance(awaited, ast.Call) and _method(awaited) in (*VERBS, "wait"))

    def __str__(self) -> str:
        return f"{self.function}:{self.line}: {self.statement} {self.change}"


@dataclass(frozen=True)
class _Found:
    """A statement that waits or signals."""

    function: str
    node: ast.Expr
    before: ast.stmt | None
    """The statement before it in the same block."""


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a schedule file, in the order of the file."""
    mutants = []
    for found in _statements(source):
        text = _text(source, found.node)
        changed = [(change, _replaced(source, found.node, instead)) for change, instead in _changes(found.node.value)]
        if found.before is not None:
            changed.append(("earlier", _moved(source, found.node, found.before)))
        mutants += [Mutant(found.function, found.node.lineno, text, change, file) for change, file in changed]
    return mutants


def probed(source: str) -> str:
    """`source` with every statement that is mutated somewhere adding its line to the set `EXECUTED`."""
    for found in reversed(list(_statements(source))):
        text = _text(source, found.node)
        source = _replaced(source, found.node, f"{EXECUTED}.add({found.node.lineno}); {text}")
    return source + f"\n\n{EXECUTED}: set[int] = set()\n"


def _statements(source: str) -> Iterator[_Found]:
    """Expression statements that wait or signal, in the order of the file."""
    found = {
        id(statement): _Found(function.name, statement, before)  # of functions in functions, the inner one
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        for block in _blocks(function)
        for before, statement in pairwise([None, *block])
        if isinstance(statement, ast.Expr) and list(_changes(statement.value))
    }
    yield from sorted(found.values(), key=lambda one: one.node.lineno)


def _blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    """The lists of statements in a function."""
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield block


def _changes(value: ast.expr) -> Iterator[tuple[str, str]]:
    """(what is changed, text in the statement's place) for a statement that consists of the expression `value`."""
    if isinstance(value, ast.Call) and _method(value) in SIGNALS:
        yield "removed", "pass"
        yield from _other_items(value, "")
    if isinstance(value, ast.Yield) and value.value is not None:
        awaited = value.value
        if isinstance(awaited, ast.Call) and _method(awaited) in VERBS:
            yield "not awaited", f"{ast.unparse(awaited)}; {STILL_A_GENERATOR}"
        else:
            yield "removed", STILL_A_GENERATOR
        # A turn's `wait` is a pure question; a sync's also says that this warpgroup has come.
        if isinstance(awaited, ast.Call) and _method(awaited) == "wait" and "turn" not in ast.unparse(awaited):
            yield "arrives only", ast.unparse(awaited)
        if isinstance(awaited, ast.Call):
            yield from _other_items(awaited, "yield ")


def _other_items(call: ast.Call, before: str) -> Iterator[tuple[str, str]]:
    """The same for the items beside the one that is meant."""
    if _method(call) in OF_A_SLOT and len(call.args) == 1:
        for change, offset in (("next item", "+ 1"), ("item before", "- 1")):
            yield change, f"{before}{ast.unparse(call.func)}({ast.unparse(call.args[0])} {offset})"


def _method(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _text(source: str, node: ast.stmt) -> str:
    text = ast.get_source_segment(source, node)
    assert text is not None
    return text


def _replaced(source: str, statement: ast.stmt, text: str) -> str:
    lines = source.splitlines(keepends=True)
    first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
    before, after = lines[first].encode()[: statement.col_offset], lines[last].encode()[statement.end_col_offset :]
    # Lines that the statement took and its replacement does not are left empty, behind it.
    missing = last - first - text.count("\n")
    lines[first : last + 1] = [before.decode() + text + after.decode() + "\n" * missing]
    return "".join(lines)


def _moved(source: str, statement: ast.stmt, before: ast.stmt) -> str:
    """`source` with `statement` in front of `before`, which stands before it in the same block."""
    text, gone = _text(source, statement), _replaced(source, statement, "pass")
    if not isinstance(before, ast.If | ast.For | ast.While | ast.With | ast.Try):
        return _replaced(gone, before, f"{text}; {_text(source, before)}")
    lines = gone.splitlines(keepends=True)
    del lines[statement.lineno - 1 : statement.end_lineno]  # so that what follows keeps its number
    lines.insert(before.lineno - 1, " " * before.col_offset + text + "\n")
    return "".join(lines)
