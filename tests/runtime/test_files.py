"""Files are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from reparam_peft.runtime.files import set_aside, write_whole, writing


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for content in ("one\n", "two: ÄÖ\n"):
        write_whole(path, content)
        assert path.read_text(encoding="utf-8") == content
    write_whole(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert list(tmp_path.iterdir()) == [path], "nothing else is left"


def test_a_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, "first")
    set_aside(path).mkdir()  # so that the new one cannot be written beside it
    with pytest.raises(OSError, match="plan"):
        write_whole(path, "second")
    assert path.read_text() == "first"


def test_errors_of_the_disk_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="results"), writing(tmp_path / "results"):
        raise OSError(28, "No space left on device")
    with pytest.raises(ValueError, match="another"), writing(tmp_path / "results"):
        raise ValueError("another")
