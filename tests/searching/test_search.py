"""The search for the smallest model that is good enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.models import bert, byte_tokenizer, gpt2, llama
from torch import nn

import reparam_peft.searching.search
from reparam_peft import ReparamConfig, Statistics, calibrate, compress, perplexity, search
from reparam_peft.calibration import self_written as text_of_model
from reparam_peft.evaluation.perplexity import accuracy
from reparam_peft.searching.result import SearchResult

BATCHES = [{"input_ids": torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(i))} for i in range(3)]
UNSEEN = [{"input_ids": torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(9))}]
KEEPS = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def config(**options: Any) -> ReparamConfig:
    return ReparamConfig(**{"target_modules": "all-linear", **options})


def trained(make: Any = llama) -> nn.Module:
    """A model that has learned the batches, so that every direction that it loses counts."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(30):
        for batch in [*BATCHES, *UNSEEN]:
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def learned() -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trained().state_dict().items()}


@pytest.fixture
def model(learned: dict[str, torch.Tensor]) -> nn.Module:
    model = llama()
    model.load_state_dict(learned)
    return model.eval()


def run(model: nn.Module, **options: Any) -> SearchResult:
    given = {"evaluation": UNSEEN, "keeps": KEEPS, "progress": False, **options}
    return search(model, given.pop("config", config()), given.pop("batches", BATCHES), **given)


def test_the_smallest_size_within_the_tolerance_is_found(model: nn.Module, learned: dict[str, torch.Tensor]) -> None:
    dense = perplexity(model, UNSEEN)
    result = run(model, tolerance="30%")
    assert result.dense_metric == dense
    assert result.limit == pytest.approx(1.3 * dense)
    assert result.chosen is not None
    assert result.chosen.metric <= result.limit
    measured = {}
    for keep in KEEPS:
        other = llama()
        other.load_state_dict(learned)
        small = compress(other.eval(), config(keep=keep), BATCHES, progress=False)
        measured[keep] = perplexity(small, UNSEEN)
    assert result.chosen.keep == min(keep for keep in KEEPS if measured[keep] <= result.limit)
    for trial in result.trials:  # what a trial measures is what `compress` would have made
        assert trial.metric == pytest.approx(measured[trial.keep], rel=1e-3)
        assert trial.within == (measured[trial.keep] <= result.limit)
    assert isinstance(result.model, PeftModel)
    assert perplexity(result.model, UNSEEN) == pytest.approx(measured[result.chosen.keep], rel=1e-6)
    assert result.model.peft_config["default"].keep == result.chosen.keep
    assert result.plan.stored_parameters == result.chosen.stored_parameters


def test_trials_and_a_search_without_building_change_nothing(model: nn.Module) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    owners = {name: id(parameter) for name, parameter in model.named_parameters()}
    result = run(model, tolerance="20%", build=False)
    assert result.model is None
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == owners
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_an_error_in_a_trial_leaves_the_model_as_it_was(model: nn.Module) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    def metric(_: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no")
        return 1.0

    with pytest.raises(RuntimeError, match="no"):
        run(model, metric=metric)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_each_matrix_is_decomposed_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    decompositions = []
    compute = reparam_peft.numerics.decompositions.factorize
    monkeypatch.setattr(
        reparam_peft.numerics.decompositions, "factorize", lambda *args: decompositions.append(1) or compute(*args)
    )
    result = run(model, config=config(neurons=False), tolerance=0.0, build=False)
    assert len(result.trials) >= 3
    assert 0 < len(decompositions) <= 14


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_bisection_asks_for_few_trials(model: nn.Module, form: str) -> None:
    result = run(model, config=config(form=form), tolerance="30%", keeps=None, build=False)
    assert len(result.trials) <= 7  # of 95 sizes
    keeps = [trial.keep for trial in result.trials]
    assert len(set(keeps)) == len(keeps)


def test_biases_are_moved_in_trials_too() -> None:
    model = gpt2()
    statistics = calibrate(model, config(), BATCHES, progress=False)
    result = search(model, config(), statistics, evaluation=UNSEEN, keeps=[0.6], tolerance="500%", progress=False)
    assert result.trials[0].metric == pytest.approx(perplexity(result.model, UNSEEN), rel=1e-3)


def test_several_methods(model: nn.Module) -> None:
    result = run(model, tolerance="30%", methods=["whitened", "svd"])
    assert {trial.method for trial in result.trials} == {"whitened", "svd"}
    best = {m: min(t.stored_parameters for t in result.trials if t.method == m and t.within) for m in ("whitened", "svd")}
    assert result.chosen.stored_parameters == min(best.values())
    assert result.model.peft_config["default"].method == result.chosen.method


def test_accuracy_of_a_classifier() -> None:
    model = bert()
    batches = [{**batch, "labels": torch.tensor([0, 1])} for batch in BATCHES]
    labels = model(**BATCHES[0]).logits.argmax(-1)
    assert accuracy(model, [{**BATCHES[0], "labels": labels}]) == 1.0
    assert accuracy(model, [{**BATCHES[0], "labels": (labels + 1) % 3}]) == 0.0
    evaluation = [{**BATCHES[0], "labels": labels}]
    result = search(
        model, config(), batches, metric="accuracy", evaluation=evaluation, tolerance=0.5, keeps=[0.3, 0.6, 0.9], progress=False
    )
    assert result.higher_is_better
    assert result.limit == 0.5
    assert result.chosen.metric >= 0.5


def test_next_tokens_have_an_accuracy_too(model: nn.Module) -> None:
    predicted = model(**UNSEEN[0]).logits.argmax(-1)
    expected = (predicted[:, :-1] == UNSEEN[0]["input_ids"][:, 1:]).float().mean()
    assert accuracy(model, UNSEEN) == pytest.approx(float(expected))


def test_nothing_within_the_tolerance(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="No trial is within the tolerance"):
        result = run(model, tolerance=0.0, keeps=[0.2, 0.3])
    assert result.chosen is None
    assert result.model is None
    assert [trial.keep for trial in result.trials] == [0.3]


def test_sizes_that_cannot_be_met_are_passed_over(model: nn.Module) -> None:
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers.0." in name]
    result = run(model, config=config(dense_modules=dense), tolerance="1000%", build=False)
    assert result.chosen.keep >= 0.5
    assert all(trial.keep >= 0.5 for trial in result.trials)


def test_no_size_can_be_met(model: nn.Module) -> None:
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers.0." in name]
    with pytest.warns(UserWarning, match="No trial is within the tolerance"):
        result = run(model, config=config(dense_modules=dense), keeps=[0.1, 0.2])
    assert result.trials == ()
    assert result.dense_parameters == 86016
    assert result.front == []


class Killed(BaseException):
    pass


def test_a_search_that_was_killed_goes_on(model: nn.Module, tmp_path: Path) -> None:
    count = []

    def loss(m: nn.Module) -> float:
        count.append(1)
        if len(count) == 3:
            raise Killed
        return perplexity(m, UNSEEN)

    with pytest.raises(Killed):
        run(model, metric=loss, tolerance="30%", run_folder=tmp_path / "run", build=False)
    assert len(count) == 3
    again = run(model, metric=loss, tolerance="30%", run_folder=tmp_path / "run", build=False)
    whole = run(model, metric=loss, tolerance="30%", build=False)
    assert [t.keep for t in again.trials] == [t.keep for t in whole.trials]
    assert [t.metric for t in again.trials] == [t.metric for t in whole.trials]
    assert len(count) == 3 + (len(whole.trials) + 1 - 2) + (len(whole.trials) + 1)
    (tmp_path / "run" / "statistics.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"statistics\.safetensors is damaged .* They are gathered anew"):
        run(model, metric=loss, tolerance="30%", run_folder=tmp_path / "run", build=False)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log[0] == {"dense": whole.dense_metric}
    assert [entry["keep"] for entry in log[1:]] == [t.keep for t in whole.trials]
    with pytest.raises(ValueError, match="another `metric`"):
        run(model, metric=loss, tolerance="20%", run_folder=tmp_path / "run", build=False)
    for other in (BATCHES[:2], calibrate(model, config(), BATCHES[:2], progress=False)):
        with pytest.raises(ValueError, match="another `calibration`"):
            run(model, metric=loss, tolerance="30%", run_folder=tmp_path / "run", build=False, batches=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": ReparamConfig(target_modules="all-linear", r=4)}, "fixes the size"),
        ({"config": ReparamConfig(target_modules="all-linear", init_weights=False)}, "random factors"),
        ({"config": config(shrinkage=0.05), "methods": ["whitened", "svd"], "batches": []}, "`shrinkage` has an effect"),
        ({"methods": ["autoencoder"]}, "cannot hold 'autoencoder'"),
        ({"keeps": []}, "`keeps` must be fractions"),
        ({"keeps": [0.0, 0.5]}, "`keeps` must be fractions"),
        ({"max_trials": 0}, "`max_trials` must be"),
        ({"tolerance": "-5%"}, "`tolerance` must be"),
        ({"tolerance": "much"}, "`tolerance` must be"),
        ({"tolerance": None}, "`tolerance` must be"),
        ({"tolerance": "much", "batches": []}, "`tolerance` must be"),
        ({"evaluation": None}, "needs batches to evaluate on"),
        ({"metric": "hellaswag"}, "needs a `tokenizer`"),
        ({"methods": ["whitened", "nothing"]}, "`methods` must hold some of 'svd', 'whitened'"),
    ],
)
def test_wrong_arguments(model: nn.Module, options: dict[str, Any], message: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        run(model, **options)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_metric_must_be_a_name_or_a_function(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="must be a name or a function"):
        run(model, metric=3)
    with pytest.raises(TypeError, match="must return a number"):
        run(model, metric=lambda model: "good")


def test_statistics_serve_a_search(model: nn.Module) -> None:
    statistics = calibrate(model, config(), BATCHES, progress=False)
    assert isinstance(statistics, Statistics)
    one, other = (run(model, batches=given, tolerance="30%", build=False) for given in (statistics, BATCHES))
    assert [t.metric for t in one.trials] == [t.metric for t in other.trials]


def test_a_search_goes_on_with_the_text_that_the_model_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_of_model, "WINDOWS", 4)
    monkeypatch.setattr(text_of_model, "LENGTH", 16)

    def searched() -> SearchResult:
        options = {"tokenizer": byte_tokenizer(), "keeps": [0.5, 0.8], "tolerance": "90%", "run_folder": tmp_path}
        return run(llama(), config=config(target_modules=["q_proj"]), batches="self", **options)

    first = searched()
    monkeypatch.setattr(text_of_model, "self_written", lambda *args, **options: pytest.fail("text is written again"))
    assert searched().trials == first.trials
    (tmp_path / "statistics.safetensors").unlink()
    assert searched().plan.to_dict() == first.plan.to_dict()
