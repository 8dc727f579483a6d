"""JSON, and output files that appear whole or not at all."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from flashsim.errors import InputError


def json_text(value: object) -> str:
    """JSON as every `--json` prints it: indented, UTF-8, no NaN."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def whole_file(path: str | Path, option: str = "--output") -> Iterator[TextIO]:
    """A text stream that becomes the file *path* when the block ends, and leaves nothing if the block raises.

    The file is written beside *path* under another name and renamed, so that *path* never holds half a result. Raises
    InputError on entry, before any work is done, if *path* cannot be written.
    """
    # A link is followed, so that the file it points to is replaced and not the link.
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.exists() and not target.is_file():
            raise InputError(f"{option}: {path} is not a regular file")
        if target.exists() and not os.access(target, os.W_OK):
            raise InputError(f"{option}: {path} is write-protected")
        stream = draft.open("x", encoding="utf-8", newline="\n")
    except FileNotFoundError:
        raise InputError(f"{option}: cannot write {path}: there is no folder {target.parent}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{option}: cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    content = io.StringIO()
    try:
        with stream:
            yield content
            stream.write(content.getvalue())
        if target.exists():
            shutil.copymode(target, draft)
        draft.replace(target)
    except OSError as error:
        raise InputError(f"{option}: cannot write {path}: {error.strerror or error}") from None
    finally:
        draft.unlink(missing_ok=True)
