"""JSON files, read as data of a stranger."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from reparam_peft.runtime.json_files import read_json


def test_what_was_written_is_read(tmp_path: Path) -> None:
    value = {"a": [1, -2.5, None, True, "é\n"], "b": {"c": [], "largest": 2**63 - 1}}
    (tmp_path / "x.json").write_text(json.dumps(value), encoding="utf-8")
    assert read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe{}", b"\x00", b'{"a": 1}x'),
        *(b"[" * 100_000, b"[" * 40 + b"]" * 40, b'{"a":' * 900 + b"1" + b"}" * 900),
        *(b"1" + b"0" * 400, b"1" + b"0" * 5000, b"-9223372036854775808", b"1e999", b"-1e999"),
        *(b'"\\ud800"', b'{"\\udfff": 1}'),
    ],
    ids=lambda content: content[:12].decode("latin-1").encode("unicode_escape").decode(),
)
def test_what_cannot_be_used_is_a_value_error_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.json"):
        read_json(tmp_path / "some.json")


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json is no file"):
        read_json(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="is no file"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        read_json(tmp_path / "missing.json")
