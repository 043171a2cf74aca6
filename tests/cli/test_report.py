"""`reparam report`: the page of what other commands did."""

from __future__ import annotations

import json
from pathlib import Path

from support.command_line import Run, assert_error

from reparam_peft import Record
from reparam_peft.cli.outputs import PROMPTS


def test_report_shows_what_compress_and_search_did(run: Run, models: Path, tmp_path: Path) -> None:
    calibration = ["--calibration", models / "calibration.txt", "--calibration-windows", "8"]
    text = [*calibration, "--text", models / "text.txt", "--length", "32"]
    searched = ["search", models / "llama", tmp_path / "found", *text, "--max-increase", "20%", "--max-trials", "3"]
    assert run(*searched).code == 0
    result = run("report", tmp_path / "found", "--length", "32", "--json")
    assert result.code == 0, result.err
    printed = json.loads(result.out)
    page = Path(printed["report"]).read_text(encoding="utf-8")
    assert Path(printed["report"]) == tmp_path / "found" / "report" / "index.html"
    assert printed["speed"]["baseline"]["prefill_ms"] > 0
    record = Record.load(tmp_path / "found" / "report" / "record.json")
    assert record.model == str(models / "llama")
    assert len(record.search.trials) == 3
    assert {sample["prompt"] for sample in record.samples} == set(PROMPTS)
    assert all(sample["compressed"].startswith(sample["prompt"]) for sample in record.samples)
    assert "self_attn.q_proj" in record.angles
    assert f"{record.evaluation['perplexity']:.5g}" in page
    names = {path.stem for path in (tmp_path / "found" / "report").glob("*.png")}
    assert names == {"ranks", "spectra", "effective_ranks", "predictions", "search", "angles"}
    again = run("report", tmp_path / "found", "--no-measure", "--output", tmp_path / "elsewhere")
    assert again.code == 0, again.err
    assert "report written to" in again.out
    assert not (tmp_path / "elsewhere" / "angles.png").exists()


def test_report_of_blocks_and_of_what_has_no_record(run: Run, models: Path, tmp_path: Path) -> None:
    calibration = ["--calibration", models / "calibration.txt", "--calibration-windows", "8"]
    text = [*calibration, "--length", "32", "--no-evaluate"]
    folder = ["--sequential", "--run-folder", tmp_path / "run"]
    assert run("compress", models / "llama", tmp_path / "small", *text, *folder).code == 0
    for source in ("run", "small"):
        assert run("report", tmp_path / source, "--no-measure", "--output", tmp_path / f"{source}-report").code == 0
        assert (tmp_path / f"{source}-report" / "blocks.png").exists()
    assert [entry["block"] for entry in Record.load(tmp_path / "small" / "reparam_run.json").blocks] == [
        "model.layers.0",
        "model.layers.1",
    ]
    again = run("compress", models / "llama", tmp_path / "again", *text, *folder)
    assert again.code == 0, again.err
    assert (
        Record.load(tmp_path / "again" / "reparam_run.json").plan == Record.load(tmp_path / "small" / "reparam_run.json").plan
    )
    (tmp_path / "small" / "reparam_run.json").unlink()
    assert_error(run("report", tmp_path / "small", "--no-measure"), "leave out --no-measure")
    assert run("report", tmp_path / "small", "--length", "32", "--text", models / "text.txt").code == 0
    assert "perplexity" in Record.load(tmp_path / "small" / "report" / "record.json").evaluation
    assert_error(run("report", models), "neither an adapter")
    assert_error(run("report", tmp_path / "missing"), "missing: there is no such folder")
    assert_error(run("report", tmp_path / "run", "--dense", "demo"), "leave them out")
    assert_error(run("report", tmp_path / "run", "--no-measure", "--output", models), "no report")
