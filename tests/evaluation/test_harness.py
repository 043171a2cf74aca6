"""Tasks of lm-evaluation-harness as metrics of a search."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from support.models import byte_tokenizer, llama
from torch import nn

import reparam_peft.evaluation.harness
from reparam_peft import ReparamConfig, search
from reparam_peft.evaluation.measures import measure_named

WORDS = ["compress", "weights", "matrix", "product", "rank", "kept"]
BATCHES = [{"input_ids": torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(i))} for i in range(3)]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{first}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{right}}",
    "metric_list": [{"metric": "acc_norm"}, {"metric": "acc"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{first}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
}
ANSWER = {
    "output_type": "generate_until",
    "doc_to_text": "{{first}}",
    "doc_to_target": "{{first}}",
    "generation_kwargs": {"max_gen_toks": 4, "until": ["."]},
    "metric_list": [{"metric": "exact_match"}],
    "filter_list": [
        {"name": "all", "filter": [{"function": "regex", "regex_pattern": "(.*)"}, {"function": "take_first"}]},
        {"name": "none", "filter": [{"function": "regex", "regex_pattern": "(never)"}, {"function": "take_first"}]},
    ],
}


def describe(folder: Path, name: str, fields: dict[str, object], **more: object) -> str:
    """Write a task of the rows that are in the folder; gives the file."""
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **fields, **more}))
    return str(folder / f"{name}.yaml")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tasks and their data, which are known in place of those that the harness brings along."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    known = partial(lm_eval.tasks.TaskManager, include_path=tmp_path)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: known(include_defaults=False))
    rows = [{"first": word, "choices": [word[::-1], word, "xyz"], "right": i % 3} for i, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    describe(tmp_path, "choice", CHOICE, tag="pair")
    describe(tmp_path, "other", CHOICE, tag="pair")
    describe(tmp_path, "whole", ROLLING)
    describe(tmp_path, "answer", ANSWER)
    group = {"group": "both", "task": ["choice", "other"]}
    (tmp_path / "both.yaml").write_text(json.dumps({**group, "aggregate_metric_list": [{"metric": "acc"}]}))
    (tmp_path / "loose.yaml").write_text(json.dumps({**group, "group": "loose"}))
    return tmp_path


@pytest.fixture
def model() -> nn.Module:
    return llama(vocab_size=259)


def value(model: nn.Module, metric: str, **options: object) -> float:
    return measure_named(metric, None, byte_tokenizer(), None, **options).of(model)


def test_metrics_of_tasks(model: nn.Module, tasks: Path) -> None:
    metrics = {"choice": "acc_norm", "choice:acc": "acc", "whole": "bits_per_byte", "whole:byte_perplexity": "byte_perplexity"}
    measures = {metric: measure_named(given, None, byte_tokenizer(), None) for given, metric in metrics.items()}
    assert [measure.name.split(":")[1] for measure in measures.values()] == list(metrics.values())
    assert [measure.higher_is_better for measure in measures.values()] == [True, True, False, False]
    values = {metric: measure.of(model) for metric, measure in measures.items()}
    right = [values[metric] * len(WORDS) for metric in ("acc", "acc_norm")]
    assert right == [pytest.approx(round(number)) for number in right]
    assert values["byte_perplexity"] == pytest.approx(2 ** values["bits_per_byte"])
    bytewise = byte_tokenizer(bos=False)  # the harness puts <s> in front, even of texts that begin with it
    values["bits_per_byte"] = measure_named("whole", None, bytewise, None).of(model)
    with torch.no_grad():
        tokens = [torch.tensor([[1, *bytewise(word)["input_ids"]]]) for word in WORDS]
        nats = sum(model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1) for row in tokens)
    assert values["bits_per_byte"] == pytest.approx(nats / torch.tensor(2.0).log().item() / sum(map(len, WORDS)), rel=1e-4)


def test_a_task_in_a_file_and_a_group(model: nn.Module, tasks: Path) -> None:
    expected = value(model, "choice:acc")
    assert value(model, str(tasks / "choice.yaml") + ":acc") == expected
    in_file = measure_named(str(tasks / "choice.yaml"), None, byte_tokenizer(), None)
    assert (in_file.name, in_file.of(model)) == ("choice:acc_norm", value(model, "choice"))
    group = measure_named("both", None, byte_tokenizer(), None)
    assert (group.name, group.higher_is_better, group.of(model)) == ("both:acc", True, expected)


def test_the_first_filter_of_answers_counts(model: nn.Module, tasks: Path) -> None:
    assert value(model, "answer") == 0  # untrained
    model.generate = lambda input_ids, **_: torch.cat([input_ids, input_ids[:, 1:]], dim=1)  # says it again
    assert value(model, "answer") == 1


def test_some_documents_only(model: nn.Module, tasks: Path) -> None:
    two = value(model, "choice:acc", documents=2)
    (tasks / "rows.jsonl").write_text("".join((tasks / "rows.jsonl").read_text().splitlines(keepends=True)[:2]))
    assert two == value(model, "choice:acc")


def test_nothing_is_changed(model: nn.Module, tasks: Path) -> None:
    tokenizer = byte_tokenizer()
    model.train()
    before = torch.get_rng_state()
    measure_named("choice", None, tokenizer, None).of(model)
    assert model.training
    assert tokenizer.pad_token is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_search(model: nn.Module, tasks: Path) -> None:
    options = {"metric": "whole:byte_perplexity", "tokenizer": byte_tokenizer(), "progress": False}
    config = ReparamConfig(target_modules="all-linear")
    folder = tasks / "run"
    result = search(model, config, BATCHES, tolerance="2%", max_trials=3, run_folder=folder, **options)
    assert result.metric == options["metric"]
    assert result.chosen.metric <= result.limit
    again = value(result.model.base_model.model, result.metric)
    assert again == pytest.approx(result.chosen.metric, rel=1e-4)

    def go_on() -> None:
        search(llama(vocab_size=259), config, BATCHES, tolerance="2%", max_trials=3, run_folder=folder, **options)

    go_on()
    (tasks / "rows.jsonl").write_text((tasks / "rows.jsonl").read_text().replace("weights", "weighty"))
    with pytest.raises(ValueError, match="another `metric`"):
        go_on()
    (tasks / "rows.jsonl").write_text((tasks / "rows.jsonl").read_text().replace("weighty", "weights"))
    describe(tasks, "whole", ROLLING, doc_to_target="{{first}} {{first}}")
    with pytest.raises(ValueError, match="another `metric`"):
        go_on()


def test_a_task_that_reports_other_metrics_than_it_names(model: nn.Module, tasks: Path) -> None:
    named = {"metric_list": [{"metric": "mine", "aggregation": "mean", "higher_is_better": True}]}
    (tasks / "own.py").write_text("def results(doc, answers):\n    return {}\n")
    path = Path(describe(tasks, "odd", ROLLING, **named))
    path.write_text(path.read_text() + "process_results: !function own.results\n")
    with pytest.raises(ValueError, match="odd:mine: the task names this metric, and reports only"):
        value(model, str(path))


def test_one_process_only(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reparam_peft.evaluation.harness, "processes", lambda: (2, 0))
    with pytest.raises(ValueError, match="search in a single one"):
        measure_named("whole", None, byte_tokenizer(), None)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("no_such_task", "nor a file of one"),
        ("choice:f1", "choice has no metric 'f1', only acc_norm, acc"),
        ("pair", "several tasks; name one: choice, other"),
        ("both:acc_norm", "both has no metric 'acc_norm', only acc"),
        ("loose", "loose has no metrics of its own; name one of its tasks: choice, other"),
    ],
)
def test_what_is_no_metric_is_refused(tasks: Path, metric: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_named(metric, None, byte_tokenizer(), None)


def test_what_cannot_be_measured_is_refused_before_any_work(tasks: Path) -> None:
    def refused(metric: str, message: str, tokenizer: object = byte_tokenizer(), **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            measure_named(metric, None, tokenizer, None, **options)

    refused("choice", "needs a `tokenizer`", None)
    refused("choice", "`documents` must be a whole number", documents=0)
    refused("perplexity", "`documents=3` is for a task", documents=3)
    refused(describe(tasks, "unsafe", CHOICE, unsafe_code=True), "unsafe runs generated code")
    mine = {"metric_list": [{"metric": "mine", "aggregation": "mean"}], "process_results": "x"}
    path = describe(tasks, "mine", CHOICE, **mine)
    refused(path, "mine:mine: the task does not say whether higher is better")
    assert measure_named(path, None, byte_tokenizer(), True).higher_is_better
    refused(
        describe(tasks, "vague", CHOICE, metric_list=[{"metric": "mine"}], process_results="x"), "vague.yaml cannot be loaded"
    )
    refused(str(tasks / "both.yaml"), "must describe one task, and no group")
    (tasks / "broken.yaml").write_text("task: [")
    refused(str(tasks / "broken.yaml"), "broken.yaml cannot be loaded as a task")
    (tasks / "empty.yaml").write_text("{}")
    refused(str(tasks / "empty.yaml"), "empty.yaml cannot be loaded as a task")
