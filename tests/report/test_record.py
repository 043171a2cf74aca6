"""The record of a run: what it holds, and that it comes back from its file as it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.models import llama

from reparam_peft import Plan, Record, ReparamConfig, compress, plan, retruncate, search
from reparam_peft.report.record import RECORD, read_record, record_of_adapter, saving_with

BATCHES = [{"input_ids": torch.arange(3, 51).reshape(2, 24)}, {"input_ids": torch.arange(51, 99).reshape(2, 24)}]
SAMPLE = {"prompt": "a", "dense": "a <b>", "compressed": "a c"}


def config(**options: object) -> ReparamConfig:
    return ReparamConfig(target_modules="all-linear", **{"keep": 0.6, **options})


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan(llama(), config(), BATCHES, progress=False)


@pytest.fixture(scope="module")
def small(made: Plan) -> PeftModel:
    return compress(llama(), config(), BATCHES, plan=made, progress=False)


def test_a_record_holds_the_run(small: PeftModel, made: Plan) -> None:
    figures = {"dense perplexity": 10.0, "perplexity": 10.0 * math.e}
    record = Record.of(small, plan=made, evaluation=figures, samples=[SAMPLE])
    assert record.plan is made
    assert record.sizes == small.size_report().to_dict()
    assert record.settings["keep"] == 0.6
    assert record.settings["target_modules"]
    assert record.excess_loss == pytest.approx(1)
    assert record.predictions == [("this model", made.predicted_loss, pytest.approx(1))]
    assert set(record.angles) == {name.rpartition("layers.0.")[2] for name in made.ranks if "layers.0." in name}


def test_it_comes_back_from_its_file(small: PeftModel, made: Plan, tmp_path: Path) -> None:
    result = search(llama(), config(keep=0.8), BATCHES, evaluation=BATCHES[:1], tolerance="50%", max_trials=2, progress=False)
    record = Record.of(result.model, plan=result.plan, search=result, evaluation={"perplexity": math.nan}, samples=[SAMPLE])
    record = record.with_(
        losses=[2.0, 1.0], angles={"q": {0: math.inf}}, blocks=[{"block": "b", "original": 0.0, "before": 0.1, "after": None}]
    )
    record.save(tmp_path / "record.json")
    json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)  # no NaN, which is no JSON
    again = Record.load(tmp_path / "record.json")
    assert math.isnan(again.evaluation["perplexity"])
    assert again.excess_loss is None
    for first, second in zip(again.plan.modules, record.plan.modules, strict=True):
        assert first.spectrum == pytest.approx(second.spectrum, rel=1e-3)
    assert math.isnan(again.angles["q"][0])
    assert replace(again, plan=record.plan, evaluation={}, angles={}) == replace(record, evaluation={}, angles={})
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "record.json").read_bytes()


def test_without_a_plan_ranks_and_sizes_are_those_of_the_model() -> None:
    model = get_peft_model(llama(), config())
    record = Record.of(model)
    assert record.plan.ranks == model.peft_config["default"].rank_pattern
    assert record.plan.stored_parameters == record.sizes["targets"]["stored_parameters"]
    assert record.predictions == []


def test_a_model_with_nothing_factorised_has_no_angles() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    record = Record.of(get_peft_model(llama(), ReparamConfig(target_modules=names, dense_modules=names, keep=1.0)))
    assert record.angles == {}
    assert record.plan.dense_modules == names


def test_what_does_not_belong_together_is_refused(small: PeftModel, made: Plan, tmp_path: Path) -> None:
    other = plan(llama(), config(keep=0.4), BATCHES, progress=False)
    with pytest.raises(ValueError, match="other ranks than the model"):
        Record.of(small, plan=other)
    with pytest.raises(ValueError, match="a sample has the keys"):
        Record.of(small, samples=[{"prompt": "a"}])
    with pytest.raises(ValueError, match=r"no log\.jsonl"):
        Record.of(small, run_folder=tmp_path)
    with pytest.raises(TypeError, match="PeftModel of a ReparamConfig"):
        Record.of(llama())
    with pytest.raises(TypeError, match="PeftModel of a ReparamConfig"):
        Record.of(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.pop("plan"),
        lambda kept: kept.update(format="other"),
        lambda kept: kept.update(surprise=1),
        lambda kept: kept["plan"].update(keep=7),
        lambda kept: kept.update(samples=[{"prompt": "a"}]),
        lambda kept: kept.update(search={"trials": [{}]}),
        lambda kept: kept.update(angles=[1]),
        lambda kept: kept.update(evaluation={"perplexity": "<script>"}),
        lambda kept: kept.update(losses="abc"),
        lambda kept: kept.update(losses=["a"]),
        lambda kept: kept.update(sizes=5),
        lambda kept: kept.update(sizes={"targets": {}}),
        lambda kept: kept.update(settings=[]),
        lambda kept: kept.update(blocks=["x"]),
        lambda kept: kept.update(speed=[1]),
        lambda kept: kept.update(model=5),
        lambda kept: kept.update(blocks=[{"block": "a", "before": "x"}]),
        lambda kept: kept.update(speed={"prefill_ms": "x"}),
        lambda kept: kept.update(speed={"baseline": 5}),
        lambda kept: kept.update(evaluation={"perplexity": "5"}),
        lambda kept: kept.update(search=[]),
        lambda kept: kept.update(samples=[{"prompt": 1, "dense": "", "compressed": ""}]),
    ],
)
def test_damaged_files_are_refused(made: Plan, tmp_path: Path, change: object) -> None:
    Record(made).save(tmp_path / RECORD)
    kept = json.loads((tmp_path / RECORD).read_text())
    change(kept)
    (tmp_path / RECORD).write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="does not hold the record of a run"):
        read_record(tmp_path)


def test_a_truncated_file_is_refused(made: Plan, tmp_path: Path) -> None:
    Record(made).save(tmp_path / RECORD)
    (tmp_path / RECORD).write_bytes((tmp_path / RECORD).read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{RECORD} holds no JSON"):
        read_record(tmp_path)


def test_a_damaged_run_folder_is_refused(made: Plan, tmp_path: Path) -> None:
    made.save(tmp_path / "plan.json")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold the settings of a run"):
        read_record(tmp_path)


def test_a_record_of_other_ranks_is_not_believed(small: PeftModel, made: Plan, tmp_path: Path) -> None:
    assert record_of_adapter(tmp_path, small).plan.predicted_loss is None
    Record.of(small, plan=made, evaluation={"perplexity": 2.0}).save(tmp_path / RECORD)
    assert record_of_adapter(tmp_path, small).evaluation == {"perplexity": 2.0}
    smaller = retruncate(compress(llama(), config(), BATCHES, plan=made, progress=False), 0.4, progress=False)
    assert record_of_adapter(tmp_path, smaller).evaluation == {}
    assert record_of_adapter(tmp_path, smaller).plan.ranks == smaller.peft_config["default"].rank_pattern


def test_nothing_predicts_what_training_changed(small: PeftModel, made: Plan) -> None:
    record = Record.of(small, plan=made, evaluation={"dense perplexity": 10.0, "perplexity": 20.0}, angles=False)
    assert record.predictions
    assert record.with_(losses=[1.0]).predictions == []
    assert record.with_(blocks=[{"block": "0", "after": 0.1}]).predictions == []


def test_a_record_is_saved_with_its_model_and_read_from_folders(small: PeftModel, made: Plan, tmp_path: Path) -> None:
    saving_with(Record.of(small, plan=made))(small, tmp_path / "adapter")
    assert read_record(tmp_path / "adapter").plan.ranks == made.ranks
    PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert read_record(tmp_path) is None
    compress(llama(), config(), BATCHES, sequential=True, run_folder=tmp_path / "run", progress=False)
    record = read_record(tmp_path / "run")
    assert [entry["block"] for entry in record.blocks] == ["model.layers.0", "model.layers.1"]
    assert record.settings["keep"] == 0.6
