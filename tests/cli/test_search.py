"""`reparam search`: a size that `evaluate` confirms, by perplexity and by a task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import Run, assert_error, calibrated

from reparam_peft.cli import statistics_file
from reparam_peft.searching import search as searching


def test_search_finds_a_size_that_evaluate_confirms(run: Run, models: Path, tmp_path: Path) -> None:
    measured = ["--text", models / "calibration.txt", "--length", 64, "--windows", 2]
    text = ["--calibration", models / "calibration.txt", "--calibration-windows", 8, *measured]
    found = run(
        "search",
        models / "llama",
        tmp_path / "small",
        "--max-increase",
        "1%",
        *text,
        "--json",
        "--run-folder",
        tmp_path / "run",
    )
    assert found.code == 0, found.err
    result = json.loads(found.out)
    assert result["chosen"]["metric"] <= result["limit"] == pytest.approx(1.01 * result["dense_metric"])
    evaluated = run("evaluate", tmp_path / "small", *measured, "--json")
    assert json.loads(evaluated.out)["perplexity"] == pytest.approx(result["chosen"]["metric"], rel=1e-3)
    assert len((tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()) == len(result["trials"]) + 1
    again = run("search", models / "llama", tmp_path / "small", *text, "--overwrite", "--max-trials", 2)
    assert again.code == 0, again.err
    assert "perplexity at most" in again.out
    assert_error(run("search", models / "llama", tmp_path / "other", *text, "--max-increase", "much"), "`tolerance` must be")
    assert_error(
        run("search", models / "llama", tmp_path / "other", *text, "--methods", "autoencoder"), "cannot hold 'autoencoder'"
    )
    assert not (tmp_path / "other").exists()


def test_search_by_a_task_in_a_file(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"text": "Pack my box with five dozen"}\n')
    fields = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "task": "box"}
    fields |= {"test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    (tmp_path / "box.yaml").write_text(json.dumps({**fields, "metric_list": [{"metric": "bits_per_byte"}]}))
    options = ["--max-increase", "5%", "--max-trials", 3]
    command = ["search", models / "llama", tmp_path / "small", *calibrated(models)[:-1], *options]
    found = run(*command, "--metric", tmp_path / "box.yaml", "--json")
    assert found.code == 0, found.err
    result = json.loads(found.out)
    assert result["metric"] == "box:bits_per_byte"
    assert result["chosen"]["metric"] <= result["limit"] == pytest.approx(1.05 * result["dense_metric"])
    for module in (searching, statistics_file):
        monkeypatch.setattr(module, "calibrate", lambda *_, **__: pytest.fail("calibrated before the check"))
    wrong = run(*command, "--overwrite", "--metric", f"{tmp_path / 'box.yaml'}:acc")
    assert_error(wrong, "has no metric 'acc', only bits_per_byte")
    wrong = run(*command, "--overwrite", "--statistics", tmp_path / "new.safetensors", "--max-increase", "much")
    assert_error(wrong, "`tolerance` must be")
