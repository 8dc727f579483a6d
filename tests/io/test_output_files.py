"""Output files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsim.errors import InputError
from flashsim.io.output import json_text, whole_file


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with whole_file(path) as stream:
        stream.write("done\n")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "done\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt()])
def test_a_block_that_raises_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "out.json"
    path.write_text("old", encoding="utf-8")

    def work() -> None:
        with whole_file(path) as stream:
            stream.write("half")
            raise error

    with pytest.raises(type(error)):
        work()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def opened(path: Path) -> None:
    with whole_file(path):
        raise AssertionError("the work must not start")


def test_an_unwritable_file_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        opened(tmp_path / "none" / "out.json")
    with pytest.raises(InputError, match="not a regular file"):
        opened(tmp_path)
    with pytest.raises(InputError, match="--output: "):
        opened(tmp_path / ("x" * 300))


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="needs a device file")
def test_a_device_file_is_not_replaced() -> None:
    with pytest.raises(InputError, match="not a regular file"):
        opened(Path("/dev/null"))


def test_a_link_keeps_pointing_where_it_did(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old", encoding="utf-8")
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("this system makes no links")
    with whole_file(link) as stream:
        stream.write("new")
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "new"


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"error": float("nan")})
