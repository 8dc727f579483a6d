"""Known bugs of attention kernels, each a small change of `twin.py`'s text. A rule is worth what it rejects of them.

`bugs/*.txt` hold them: `# title`, what is wrong, perhaps `source:`, and pairs of `- line` and `+ line`. The first is a
whole line of twin.py that occurs once, without its indentation; the second stands there instead.

Not here, because no rule that knows nothing of the kernel can or should reject them: any number in place of the
maximum, as long as P, sum and accumulator use the same and nothing overflows; and single roundings more (of one tile's
P V, or of 1 / l), which cost as much as the rounding of P that is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).parent
SOURCE = (HERE / "twin.py").read_text(encoding="utf-8")


class Bug(NamedTuple):
    """`part` is the function of twin.py that has it: forward, backward, or fp8, which is forward with scales."""

    part: str
    title: str
    about: str
    source: str
    changes: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        return f"{self.part}: {self.title}"

    def described(self) -> str:
        return f"{self.about} ({self.source})" if self.source else self.about

    def text(self) -> str:
        """twin.py with the bug; every line keeps its number. Raises ValueError if a change does not fit."""
        lines = SOURCE.splitlines()
        stripped = [line.strip() for line in lines]
        for old, new in self.changes:
            if stripped.count(old) != 1:
                raise ValueError(f"{self.key}: {stripped.count(old)} lines are {old!r}")
            at = stripped.index(old)
            lines[at] = lines[at].replace(old, new)
        return "\n".join(lines) + "\n"

    def module(self) -> ModuleType:
        """The patched twin."""
        module = ModuleType("twin_with_a_bug")
        exec(compile(self.text(), f"<twin.py with {self.title}>", "exec"), module.__dict__)
        return module


def _read(part: str) -> Iterator[Bug]:
    for block in (HERE / "bugs" / f"{part}.txt").read_text(encoding="utf-8").split("\n\n"):
        title, about, *lines = block.strip().splitlines()
        source = lines.pop(0).removeprefix("source: ") if lines[0].startswith("source: ") else ""
        marks, texts = [line[:2] for line in lines], [line[2:] for line in lines]
        if title[:2] != "# " or not lines or marks != ["- ", "+ "] * (len(lines) // 2):
            raise ValueError(f"bugs/{part}.txt: cannot read {block!r}")
        yield Bug(part, title[2:], about, source, tuple(zip(texts[::2], texts[1::2], strict=True)))


CATALOGUE = tuple(bug for part in ("forward", "backward", "fp8") for bug in _read(part))
