"""`reparam plan`: a table that `compress` carries out, and plans that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import DATA_FREE, Run, assert_error, calibrated

from reparam_peft import Plan


def test_plan_prints_a_table_that_compress_carries_out(run: Run, models: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "plan.json", tmp_path / "out"
    arguments = [models / "llama", *calibrated(models)[:-1]]
    table = run("plan", *arguments, "--keep", 0.6, "--form", "factors", "--output", file)
    assert table.code == 0, table.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"], "nothing else is written"
    plan = Plan.load(file)
    assert table.out == f"{plan}\n"
    assert len(plan.modules) == 14
    assert (plan.keep, plan.method, plan.allocation, plan.form) == (0.6, "whitened", "loss", "factors")

    printed = json.loads(run("plan", *arguments, "--keep", 0.6, "--form", "factors", "--json").out)
    assert printed == json.loads(json.dumps(plan.to_dict()))

    result = run("compress", *arguments, output, "--no-evaluate", "--plan", file, "--json")
    assert result.code == 0, result.err
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["rank_pattern"] == plan.ranks
    assert set(config["dense_modules"]) == set(plan.dense_modules)
    assert (config["keep"], config["form"]) == (0.6, "factors")
    assert json.loads(result.out)["size"]["targets"]["stored_parameters"] == plan.stored_parameters


@pytest.mark.parametrize(
    "options", [["--keep", 0.2, "--budget", "bytes", "--bits", "8,4"], ["--form", "corrected", "--rank", 8]], ids=str
)
def test_a_plan_in_few_bits_is_carried_out(run: Run, models: Path, tmp_path: Path, options: list[object]) -> None:
    file, output = tmp_path / "plan.json", tmp_path / "out"
    arguments = [models / "llama", *calibrated(models)[:-1], "--target-modules", "q_proj,up_proj"]
    printed = json.loads(run("plan", *arguments, *options, "--output", file, "--json").out)
    assert all(module["bits"] in (8, 4) and module["stored_bytes"] < module["dense_bytes"] for module in printed["modules"])
    result = run("compress", *arguments, output, "--no-evaluate", "--plan", file, "--json")
    assert result.code == 0, result.err
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["bit_pattern"] == Plan.load(file).bits
    assert json.loads(result.out)["size"]["targets"]["stored_bytes"] == Plan.load(file).stored_bytes


def test_a_plan_carries_its_method_too(run: Run, models: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "plan.json", tmp_path / "out"
    arguments = [models / "llama", *calibrated(models)[:-1], "--target-modules", "up_proj"]
    assert run("plan", *arguments, "--method", "svd", "--allocation", "loss", "--output", file).code == 0
    assert run("compress", *arguments, output, "--no-evaluate", "--plan", file).code == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["method"], config["allocation"], config["rank_pattern"]) == ("svd", "loss", Plan.load(file).ranks)


def test_plans_that_are_refused(run: Run, models: Path, tmp_path: Path) -> None:
    file, arguments = tmp_path / "plan.json", [models / "llama", *calibrated(models)[:-1]]
    assert_error(run("plan", *arguments[:1], "--method", "svd"), "a plan needs calibration; leave out --method svd or add")
    result = run("plan", *arguments, "--output", tmp_path / "gone" / "plan.json")
    assert_error(result, "--output .*plan.json: there is no folder")
    assert "calibrating" not in result.err
    assert run("plan", *arguments, "--allocation", "uniform", "--target-modules", "q_proj", "--output", file).code == 0
    compress = ["compress", *arguments, tmp_path / "out", "--no-evaluate", "--plan", file]
    assert_error(run(*compress), "it is in the plan or among the targets, but not in both; the plan is of other targets")
    result = run(*compress, "--target-modules", "q_proj", "--form", "factors")
    assert_error(result, "`plan` is for `form='pivot'`, and the config says 'factors'")
    result = run("compress", *arguments[:1], tmp_path / "out", *DATA_FREE, "--plan", file)
    assert_error(result, "--plan is for calibrated methods; leave out --method svd")
    for text in ("{", "[]", "{}", '{"format": "reparam_peft plan 1"}'):
        file.write_text(text)
        assert_error(run(*compress), "plan.json (does not hold a plan|holds no JSON)")
        assert_error(run("plan", *arguments, "--output", file), "--output .*plan.json exists and holds no plan")
        assert file.read_text() == text
    assert not (tmp_path / "out").exists()
