"""The examples of docs/testing.md, and the kernel among them: the correct one that tests here start from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOC = Path(__file__).parents[2] / "docs" / "testing.md"
TEXT = DOC.read_text(encoding="utf-8")
FILES = {name: code for code, name in re.findall(r"```python\n((?:# (\w+\.py)\n).*?)```", TEXT, flags=re.DOTALL)}
"""Code by file name, word for word: examples begin with their file's name."""


def kernel(code: str) -> Any:
    """The function that `code`, a my_attention.py, defines."""
    names: dict[str, Any] = {}
    exec(compile(code, "my_attention.py", "exec"), names)
    return names["my_attention"]


my_attention = kernel(FILES["my_attention.py"])
