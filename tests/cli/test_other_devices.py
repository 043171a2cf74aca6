"""The command line where models are on another device than the processor, on which texts arrive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import Run, calibrated, quick
from support.second_device import other_device

from reparam_peft.evaluation import speed

DEVICE = other_device()
pytestmark = pytest.mark.usefixtures("found_by_accelerate")


def test_compress_evaluate_report_heal_and_export(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "flush_caches", lambda _: None)  # which takes long, and no time is looked at
    there, small = ["--device", DEVICE], tmp_path / "small"
    ways = ["--self-written", 1, "--calibration-windows", 2, "--length", 32, "--sequential"]
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
