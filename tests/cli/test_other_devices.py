"""The command line where models are on another device than the processor, on which texts arrive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from support.command_line import Run, calibrated, quick
from support.second_device import NAME, other_device

DEVICE = other_device()


@pytest.fixture(autouse=True)
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has accelerate, and with it `Trainer`, find the second device as it finds a GPU."""
    if DEVICE == NAME:
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", f"{NAME}:0")
        AcceleratorState._reset_state(reset_partial_state=True)


def test_compress_evaluate_report_heal_and_export(run: Run, models: Path, tmp_path: Path) -> None:
    there, small = ["--device", DEVICE], tmp_path / "small"
    ways = ["--self-written", 1, "--calibration-windows", 2, "--length", 32, "--refine"]
    result = run("compress", models / "llama", small, "--keep", 0.5, *ways, "--text", models / "text.txt", *there, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)["evaluation"]["perplexity"]
    evaluated = run("evaluate", small, "--text", models / "text.txt", "--length", 32, "--device", "cpu", "--json")
    assert json.loads(evaluated.out)["perplexity"] == pytest.approx(found, rel=1e-3)
    report = run("report", small, "--output", tmp_path / "report.html", "--text", models / "text.txt", "--length", 32, *there)
    assert report.code == 0, report.err
    texts = ["--calibration", models / "calibration.txt", "--text", models / "calibration.txt", "--length", 32]
    healed = run("heal", small, tmp_path / "healed", *texts, "--train-windows", 4, "--steps", 2, *there)
    assert healed.code == 0, healed.err
    exported = run("export", tmp_path / "healed", tmp_path / "standalone", "--to", "standalone", *there)
    assert exported.code == 0, exported.err


def test_search(run: Run, models: Path, tmp_path: Path) -> None:
    arguments = ["--max-increase", 0.5, "--max-trials", 2, *calibrated(models)[:-1], *quick(models)[:2], "--device", DEVICE]
    result = run("search", models / "llama", tmp_path / "found", *arguments)
    assert result.code == 0, result.err
