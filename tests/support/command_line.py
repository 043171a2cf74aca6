"""What tests of `reparam` ask of it: arguments that keep it quick, and one line of error."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

Run = Callable[..., SimpleNamespace]
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "reparam_run.json"}
FILES = {*ADAPTER, "tokenizer.json", "tokenizer_config.json"}


def assert_error(result: SimpleNamespace, message: str) -> None:
    """Exit code 1, and the last words on stderr are one line, without a traceback, beginning with "error:"."""
    assert result.code == 1
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.err.endswith(lines[0] + "\n")
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in result.err


def quick(models: Path) -> list[object]:
    return ["--text", models / "text.txt", "--length", 64, "--windows", 4]


def calibrated(models: Path) -> list[object]:
    """Few and short windows to calibrate on, and no evaluation."""
    return ["--calibration", models / "calibration.txt", "--calibration-windows", 4, "--length", 64, "--no-evaluate"]


DATA_FREE = ["--method", "svd", "--no-evaluate"]
