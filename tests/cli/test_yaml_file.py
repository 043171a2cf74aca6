"""YAML as settings files hold it."""

from __future__ import annotations

from pathlib import Path

import pytest

from reparam_peft.cli import yaml_file
from reparam_peft.cli.errors import CliError
from reparam_peft.cli.yaml_file import read_settings


def test_all_but_true_false_and_null_is_text(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("keep: 0.8\ntext: 2024-01-01\nrefine: true\nplan: null\nmethods: [svd, 1]\n", encoding="utf-8")
    assert read_settings(path) == {"keep": "0.8", "text": "2024-01-01", "refine": True, "plan": None, "methods": ["svd", "1"]}


def test_no_more_is_read_than_a_settings_file_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_file, "LARGEST", 10)
    path = tmp_path / "settings.yaml"
    path.write_text("keep: '0.80000'", encoding="utf-8")
    with pytest.raises(CliError, match=r"settings\.yaml cannot be read"):
        read_settings(path)
