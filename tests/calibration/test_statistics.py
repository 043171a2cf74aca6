"""`Statistics`: added up, saved, loaded, and refused where they are of something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.batches import text
from support.gathering import assert_same, gather, linear_layers, named, sums_of
from support.models import bert, gpt2, llama
from torch import Tensor, nn

from reparam_peft import Statistics
from reparam_peft.numerics.grams import unpack

NAME = "model.layers.0.self_attn.q_proj"
BATCHES = [text([8, 5, 3], 8)]


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return gather(llama(), linear_layers, BATCHES, seed=2)


def tensors_of(statistics: Statistics) -> dict[str, Tensor]:
    return {" ".join(key): value for key, value in sums_of(statistics).items() if isinstance(value, Tensor)}


# Merging


@pytest.mark.parametrize(
    ("build", "modules"),
    [(llama, linear_layers), (bert, linear_layers), (gpt2, linear_layers), (llama, named("model.embed_tokens"))],
    ids=["Linear", "Linear with bias", "Conv1D", "Embedding"],
)
def test_two_halves_are_the_whole(build: Callable[[], nn.Module], modules: Any) -> None:
    first, second = [text([8, 5], 8), text([6, 6], 6, seed=1)], [text([7, 1, 3], 7, seed=2)]
    rows = sum(len(batch["input_ids"]) for batch in first)
    one, whole = (gather(build(), modules, batches) for batches in (first, first + second))
    two = gather(build(), modules, second, first_row=rows)
    before = {key: tensor.clone() for key, tensor in tensors_of(one).items()}
    merged = one.merge(two)
    assert merged.weight_norms == whole.weight_norms
    assert_same(merged, whole, tolerance=1e-12)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors_of(one).items())
    assert_same(two.merge(one), merged, tolerance=1e-12)


def test_modules_of_one_of_the_two_are_all_there() -> None:
    batches = [text([8, 5], 8)]
    one, two = (gather(llama(), named(f"model.layers.{i}.mlp.up_proj"), batches) for i in (0, 1))
    merged = one.merge(two)
    for part in (one, two):
        for name in part.reads:
            assert torch.equal(merged.gram(name), part.gram(name))
            assert torch.equal(merged.fisher(name), part.fisher(name))


def test_disjoint_modules_of_the_same_data_count_their_predictions_once() -> None:
    model, whole = llama(), gather(llama(), linear_layers, BATCHES)
    modules = linear_layers(model)
    names = list(modules)
    parts = [{name: modules[name] for name in names[start:end]} for start, end in ((0, 7), (7, None))]
    one, two = (gather(model, part, BATCHES, starts=modules.values()) for part in parts)
    merged = one.merge(two)
    assert merged.gradient_tokens == whole.gradient_tokens
    assert {n: merged.loss_scale(n) for n in names} == pytest.approx({n: whole.loss_scale(n) for n in names}, rel=1e-5)


def test_gradients_that_some_modules_lack_are_told() -> None:
    model = llama()
    modules = linear_layers(model)
    first, *others = modules
    without = gather(model, {first: modules[first]}, BATCHES, gradients=False)
    rest = gather(model, {name: modules[name] for name in others if "q_proj" not in name}, BATCHES)
    merged = without.merge(rest)
    merged.check({first: modules[first]})
    with pytest.raises(ValueError, match=f"{first}: the statistics hold no gradients"):
        merged.check({first: modules[first]}, gradients=True)


def test_merging_refuses_another_model_and_other_sharing(statistics: Statistics) -> None:
    other = llama()
    with torch.no_grad():
        other.get_submodule(NAME).weight.mul_(1.01)
    with pytest.raises(ValueError, match=rf"{NAME}: the statistics are of a weight of norm .*; they are of another model"):
        statistics.merge(gather(other, linear_layers, [text([8], 8)]))
    alone = gather(llama(), named("model.layers.0.self_attn.k_proj"), [text([8], 8)])
    with pytest.raises(ValueError, match=r"k_proj: it shares the input of .*; calibrate both with the same `target_modules`"):
        statistics.merge(alone)


# Files


def test_saving_and_loading_keeps_every_bit(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    loaded = Statistics.load(path)
    assert_same(loaded, statistics, tolerance=0)
    assert loaded.weight_norms == statistics.weight_norms
    assert tensors_of(loaded).keys() == tensors_of(statistics).keys()
    assert loaded.nbytes == statistics.nbytes == sum(8 * t.numel() for t in tensors_of(statistics).values())
    assert loaded.seed == 2
    assert loaded.tokens == 16
    loaded.check(linear_layers(llama()))
    assert_same(loaded.merge(loaded), statistics.merge(statistics), tolerance=0)


def test_the_same_statistics_give_the_same_bytes_and_others_another_fingerprint(statistics: Statistics, tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(6)]
    for path in paths:
        statistics.save(path)
    assert len({path.read_bytes() for path in paths}) == 1
    loaded = Statistics.load(paths[0])
    assert loaded.fingerprint() == statistics.fingerprint()
    loaded.seed += 1
    seeds = loaded.fingerprint()
    next(iter(loaded.inputs.values())).gram[0, 0] += 1
    assert len({statistics.fingerprint(), seeds, loaded.fingerprint()}) == 3


def saved(statistics: Statistics, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    statistics.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return load_file(path), metadata


def changed_field(metadata: dict[str, str], **fields: Any) -> dict[str, str]:
    return {**metadata, "statistics": json.dumps({**json.loads(metadata["statistics"]), **fields})}


def without(key: str) -> Callable[..., Any]:
    return lambda tensors, metadata: ({k: v for k, v in tensors.items() if k != key}, metadata)


def with_value(key: str, value: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda tensors, metadata: ({k: value(v).contiguous() if k == key else v for k, v in tensors.items()}, metadata)


def spoilt(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


TAMPERED: dict[str, Callable[..., Any]] = {
    "another format": lambda t, m: (t, {**m, "format": "reparam_peft statistics 0"}),
    "no metadata": lambda t, m: (t, None),
    "no fields": lambda t, m: (t, {"format": m["format"]}),
    "fields are no JSON": lambda t, m: (t, {**m, "statistics": "{"}),
    "fields are a list": lambda t, m: (t, {**m, "statistics": "[]"}),
    "unknown field": lambda t, m: (t, changed_field(m, colour=1)),
    "unknown tensor": lambda t, m: ({**t, "colours/red": torch.ones(1)}, m),
    "rows are no counts": lambda t, m: (t, changed_field(m, rows={NAME: "many"})),
    "rows of nothing": lambda t, m: (t, changed_field(m, rows={})),
    "no rows": lambda t, m: (t, changed_field(m, rows={**json.loads(m["statistics"])["rows"], NAME: 0})),
    "shares with a stranger": lambda t, m: (t, changed_field(m, inputs={NAME: "stranger"})),
    "no gradient rows": lambda t, m: (t, changed_field(m, gradient_rows={})),
    "a missing Gram": without(f"grams/{NAME}"),
    "a missing sum": without(f"sums/{NAME}"),
    "a missing Fisher matrix": without(f"output_grams/{NAME}"),
    "missing energies": without(f"energies/{NAME}"),
    "a Gram with NaN": with_value(f"grams/{NAME}", lambda v: spoilt(v, torch.nan)),
    "a sum with inf": with_value(f"sums/{NAME}", lambda v: spoilt(v, torch.inf)),
    "a Gram that is not square": with_value(f"grams/{NAME}", lambda v: v[:, :-1]),
    "a Fisher matrix that is a number": with_value(f"output_grams/{NAME}", lambda v: v[0, 0]),
    "a sum of another length": with_value(f"sums/{NAME}", lambda v: v[:-1]),
    "energies of another length": with_value(f"energies/{NAME}", lambda v: v[:-1]),
    "whole numbers": with_value(f"grams/{NAME}", lambda v: v.long()),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampered_files_are_refused(what: str, statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    tensors, metadata = TAMPERED[what](*saved(statistics, path))
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"statistics\.safetensors"):
        Statistics.load(path)


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, b"{}"], ids=["empty", "garbage", "short"])
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"statistics\.safetensors is damaged"):
        Statistics.load(path)


def test_a_truncated_file_and_a_checkpoint_are_refused(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"statistics\.safetensors is damaged"):
        Statistics.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="does not hold statistics"):
        Statistics.load(path)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "nowhere.safetensors")


# Checking against a model


def test_statistics_fit_their_model_also_in_half_precision(statistics: Statistics) -> None:
    statistics.check(linear_layers(llama()))
    statistics.check(linear_layers(llama().to(torch.bfloat16)))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: llama(hidden_size=32), r"q_proj: the statistics are of 64 features, and the weight is \(32, 32\)"),
        (lambda: llama(num_hidden_layers=3), "the statistics are of a weight of norm"),
        (lambda: llama(vocab_size=90), "the statistics are of a weight of norm"),
        (gpt2, "the statistics do not hold this module; they are of another model or of other targets"),
    ],
    ids=["narrower", "deeper", "another vocabulary", "another architecture"],
)
def test_statistics_of_another_shape_are_refused(build: Callable[[], nn.Module], match: str, statistics: Statistics) -> None:
    with pytest.raises(ValueError, match=match):
        statistics.check(linear_layers(build()))


def test_a_layer_that_is_wider_or_not_there_is_named(statistics: Statistics) -> None:
    modules = linear_layers(llama())
    name = "model.layers.1.mlp.gate_proj"
    with pytest.raises(ValueError, match=rf"{name}: the statistics are of 160 features, and the weight is \(96, 64\)"):
        statistics.check({**modules, name: nn.Linear(64, 96)})
    with pytest.raises(ValueError, match="lm_head: the statistics do not hold this module; they are of another model or of"):
        statistics.check({**modules, "lm_head": nn.Linear(64, 100)})


def test_statistics_of_other_weights_are_refused(statistics: Statistics) -> None:
    other = llama()
    with torch.no_grad():
        other.get_submodule(NAME).weight.mul_(1.001)
    with pytest.raises(ValueError, match=rf"{NAME}: the statistics are of a weight of norm .*; they are of another model"):
        statistics.check(linear_layers(other))


def test_a_module_that_no_batch_reached_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    net = Net()
    got = gather(net, named("used", "unused"), [{"x": torch.randn(10, 6)}])
    with pytest.raises(
        ValueError, match=r"unused: no batch reached this module. Give batches that use it, or leave it out with"
    ):
        got.check(named("used", "unused")(net))


TENSORS = {
    "grams/q": torch.eye(3, dtype=torch.float64) * 6,
    "grams/embed": torch.tensor([2.0, 3.0], dtype=torch.float64),
    "sums/q": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    "sums/embed": torch.tensor([2.0, 3.0], dtype=torch.float64),
    "weighted_grams/q": torch.eye(3, dtype=torch.float64),
    "weighted_sums/q": torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64),
    **{f"output_grams/{name}": torch.eye(2, dtype=torch.float64) * 4 for name in ("q", "k")},
    **{f"energies/{name}": torch.tensor([9.0, 8.0], dtype=torch.float64) for name in ("q", "k")},
}
FIELDS: dict[str, Any] = {
    "inputs": {"q": "q", "k": "q", "embed": "embed"},
    "rows": {"q": 4, "embed": 5},
    "weights": {"q": 0.25},
    "gradient_rows": {"q": 2, "k": 2},
    "predictions": {"q": 7, "k": 7},
    "weight_norms": {"q": 1.5, "k": 2.5, "embed": 3.5},
    "seed": 11,
}
METADATA = {"format": "reparam_peft statistics 1", "statistics": json.dumps(FIELDS)}


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "old.safetensors", metadata=METADATA)
    got = Statistics.load(tmp_path / "old.safetensors")
    assert got.reads == FIELDS["inputs"]
    assert (got.input_rows("k"), got.input_rows("embed"), got.output_rows("k")) == (4, 5, 2)
    assert (got.tokens, got.gradient_tokens, got.seed) == (5, 7, 11)
    assert torch.equal(got.gram("k"), TENSORS["grams/q"] / 4)
    assert torch.equal(got.mean("embed"), TENSORS["sums/embed"] / 5)
    assert torch.equal(got.weighted_gram("k"), TENSORS["weighted_grams/q"] / 0.25)
    assert got.weighted_gram("embed") is None
    assert torch.equal(got.fisher("k"), TENSORS["output_grams/k"] / 2)
    assert got.loss_scale("q") == 9 / (8 * 8 / 2) * 2 / 7
    assert got.weight_norms == FIELDS["weight_norms"]


def test_what_is_read_is_written_packed(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "old.safetensors", metadata=METADATA)
    Statistics.load(tmp_path / "old.safetensors").save(tmp_path / "new.safetensors")
    tensors, metadata = contents(tmp_path / "new.safetensors")
    assert metadata == {**METADATA, "format": "reparam_peft statistics 2"}
    assert tensors.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        is_packed = "grams" in key and tensor.ndim == 2
        assert torch.equal(unpack(tensors[key]) if is_packed else tensors[key], tensor), key


def test_what_only_a_module_needs_is_forgotten() -> None:
    got = gather(llama(), linear_layers, [text([5], 5)])
    query, key = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    got.forget(query)
    assert query not in got.outputs
    assert got.gram(key).shape == (64, 64), "which it read, too"
    for name in ("k", "v"):
        got.forget(f"model.layers.0.self_attn.{name}_proj")
    assert query not in got.inputs
