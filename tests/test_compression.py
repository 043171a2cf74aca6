"""`compress`, `plan` and `calibrate`: every method on every layer kind, the budget, the processes, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.batches import Batch, images, pairs, read, text
from support.compressing import ALL, IMAGES, ROWS, TEXT, Q, batches_of, compressed, layers, output_errors, planned, scale_of
from support.model_state import assert_same_model, state_of
from support.models import (
    CASES,
    Case,
    Net,
    bert,
    convnet,
    gpt2,
    image_inputs,
    llama,
    mixture,
    net,
    qwen_moe,
    t5,
    token_inputs,
    vit,
)
from support.tolerances import assert_close, relative_error
from torch import Tensor, multiprocessing, nn
from transformers import BertModel

from reparam_peft import Plan, ReparamConfig, Statistics, calibrate, compress
from reparam_peft.layers.kinds import layer_kind
from reparam_peft.numerics.storage import uniform_rank
from reparam_peft.tuner.matrices import matrix_storage

# The budget


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("allocation", ["uniform", "loss"])
@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_the_budget_is_met_and_never_exceeded(case: Case, form: str, allocation: str, keep: float, tmp_path: Path) -> None:
    options = {"target_modules": case.target_modules, "keep": keep, "form": form, "allocation": allocation}
    model = case.model()
    shapes = {
        name: layer_kind(module).shape(module)
        for name, module in model.named_modules()
        if hasattr(module, "weight") and _known(module)
    }
    small = compressed(model, batches_of(case), **options)
    small.save_pretrained(tmp_path)
    config = small.peft_config["default"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    dense = sum(shapes[name][0] * shapes[name][1] for name in config.dense_modules)
    stored = sum(tensor.numel() for tensor in tensors.values()) + dense
    total = sum(shapes[name][0] * shapes[name][1] for name in [*config.rank_pattern, *config.dense_modules])
    assert stored <= keep * total
    assert stored == config.stored_parameters == small.size_report().to_dict()["targets"]["stored_parameters"]
    assert total == config.dense_parameters
    in_file = {name.rpartition(".reparam_factors.")[0] for name in tensors}
    assert in_file == {f"base_model.model.{name}" for name in config.rank_pattern}
    fresh = case.model()
    storages = {n: matrix_storage(fresh.get_submodule(n), config) for n in config.rank_pattern}
    if config.rank_pattern == {n: uniform_rank(keep, storage) for n, storage in storages.items()}:
        left = {n: keep * s.dense - s.parameters(config.rank_pattern[n]) for n, s in storages.items()}
        step = 1
    else:
        left = dict.fromkeys(storages, keep * total - stored)
        step = 2
    for name, storage in storages.items():  # one step more, or dense, would not fit
        rank = config.rank_pattern[name] + step
        price = min([storage.parameters(rank)] * (rank <= min(shapes[name])) + [storage.dense])
        assert price - storage.parameters(config.rank_pattern[name]) > left[name], name


def _known(module: nn.Module) -> bool:
    try:
        layer_kind(module)
    except (TypeError, ValueError):
        return False
    return True


def test_keep_1_leaves_everything_dense() -> None:
    with pytest.warns(UserWarning, match="All 14 targets stay dense"):
        small = compressed(llama(), TEXT, target_modules="all-linear", keep=1.0)
    assert torch.equal(small(**token_inputs()).logits, llama()(**token_inputs()).logits)


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_ranks_that_are_given_are_kept_under_loss_allocation(form: str) -> None:
    given = {"model.layers.0.self_attn.q_proj": 3, r"layers\.1\.mlp\.up_proj": 11}
    dense = ["model.layers.1.self_attn.k_proj"]
    small = compressed(
        llama(), TEXT, target_modules="all-linear", form=form, rank_pattern=given, dense_modules=dense, rank_multiple=None
    )
    config = small.peft_config["default"]
    assert config.allocation == "loss"
    assert config.rank_pattern["model.layers.0.self_attn.q_proj"] == 3
    assert config.rank_pattern["model.layers.1.mlp.up_proj"] == 11
    assert set(dense) <= set(config.dense_modules)
    assert small.size_report().keep <= 0.5
    others = {n: r for n, r in config.rank_pattern.items() if n not in given and not n.endswith("layers.1.mlp.up_proj")}
    large = [rank for name, rank in others.items() if not name.endswith(("k_proj", "v_proj"))]  # those are (32, 64)
    assert large
    assert all(rank % 8 == 0 for rank in large)


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_small_matrices_are_compressed_without_asking_for_smaller_steps(form: str) -> None:
    for build, targets, batches in ((convnet, ["conv0", "conv1"], IMAGES), (llama, "all-linear", TEXT)):
        small = compressed(build(), batches, target_modules=targets, form=form, rank_multiple=None, keep=0.4)
        assert small.size_report().keep <= 0.4


def test_uniform_ranks_that_exceed_the_budget_are_refused() -> None:
    with pytest.raises(ValueError, match="of which 10,240 are in matrices that stay dense"):
        compressed(
            llama(),
            TEXT,
            target_modules=["gate_proj"],
            dense_modules=["model.layers.0.mlp.gate_proj"],
            allocation="uniform",
            rank_multiple=None,
        )


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_r_gives_one_rank_to_all(form: str) -> None:
    small = compressed(llama(), TEXT, target_modules=["q_proj", "down_proj"], r=9, form=form)
    config = small.peft_config["default"]
    assert config.allocation == "uniform"
    assert set(config.rank_pattern.values()) == {9}
    exact = compressed(bert(), TEXT, target_modules=["query", "dense"], r="full", form=form)
    assert_close(exact(**token_inputs()).logits, bert()(**token_inputs()).logits)


def test_floor_ceiling_and_multiple_are_kept() -> None:
    made = planned(llama(), TEXT, target_modules="all-linear", floor=0.3, ceiling=0.7, rank_multiple=2)
    assert all(0.3 <= m.stored_parameters / m.dense_parameters <= 0.7 for m in made.modules)
    assert all(module.rank % 2 == 0 for module in made.modules)


# Methods, metrics, forms


VARIANTS = [
    *({"method": "svd"},),
    *(
        {"method": "whitened", "input_metric": i, "output_metric": o}
        for i, o in itertools.product(("gram", "diagonal", "none"), ("fisher", "diagonal", "none"))
    ),
    *({"method": "autoencoder", "output_metric": o} for o in ("fisher", "none")),
    {"method": "autoencoder", "input_metric": "diagonal"},
    {"method": "whitened", "shrinkage": 0.0, "output_shrinkage": 0.0},
    {"method": "whitened", "init_weights": False},
]


@pytest.mark.parametrize("allocation", ["uniform", "loss"])
@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(str(value) for value in v.values()))
def test_every_variant_runs_and_loads(variant: dict[str, Any], form: str, allocation: str, tmp_path: Path) -> None:
    small = compressed(
        bert(), TEXT, target_modules=["query", "intermediate.dense"], form=form, allocation=allocation, **variant
    )
    config = small.peft_config["default"]
    assert (config.form, config.allocation, config.method) == (form, allocation, variant["method"])
    assert small.size_report().keep <= 0.5
    assert config.moved_bias == (variant["method"] != "svd")
    got = small(**token_inputs()).logits
    assert got.isfinite().all()
    small.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(bert(), tmp_path)(**token_inputs()).logits, got)


def test_whitened_is_the_optimum_and_the_autoencoder_reaches_it(case: Case) -> None:
    options = {"target_modules": case.target_modules, "allocation": "uniform", "form": "factors", "keep": 0.4}
    exact = {"output_metric": "none", "shrinkage": 0.0}
    statistics = calibrate(case.model(), ReparamConfig(target_modules=case.target_modules), batches_of(case), progress=False)
    svd, whitened, trained = (
        output_errors(compressed(case.model(), statistics, **options, **more), statistics, case.model())
        for more in ({"method": "svd"}, {"method": "whitened", **exact}, {"method": "autoencoder", **exact})
    )
    assert whitened.keys() == trained.keys() <= svd.keys()  # biases that are moved may cost a small matrix its saving
    if all(svd[name] > 0 for name in whitened) and case.kind != "Linear with bias":
        assert sum(whitened.values()) < sum(svd[name] for name in whitened)
    for name in whitened:
        scale = scale_of(case.model(), name, statistics)
        assert trained[name] <= 1.02 * whitened[name] + 1e-5 * scale, name
        assert whitened[name] <= 1.001 * trained[name] + 1e-6 * scale, name


@pytest.mark.parametrize("metric", ["gram", "diagonal", "none"])
def test_the_autoencoder_is_trained_in_the_metric_that_the_config_names(metric: str) -> None:
    options = {"target_modules": ["q_proj"], "allocation": "uniform", "form": "factors"}
    options |= {"input_metric": metric, "output_metric": "none"}
    whitened, trained = (compressed(llama(), TEXT, method=method, **options) for method in ("whitened", "autoencoder"))
    for name, layer in layers(whitened).items():
        got = layers(trained)[name].dense_matrix("default")
        assert relative_error(got, layer.dense_matrix("default")) < 0.02, name


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize(
    ("method", "dtype"), [("whitened", torch.float32), ("whitened", torch.bfloat16), ("autoencoder", torch.float32)]
)
def test_moved_biases_leave_the_mean_output_as_it_was(method: str, dtype: torch.dtype, form: str) -> None:
    for build, targets, batches in (
        (bert, ["query", "dense"], TEXT),
        (gpt2, ["c_attn", "c_fc"], TEXT),
        (convnet, ["conv0"], [{"x": batch["x"].to(dtype)} for batch in IMAGES]),
    ):
        model = build().to(dtype)
        statistics = calibrate(model, ReparamConfig(target_modules=targets), batches, progress=False)
        small = compressed(model, statistics, target_modules=targets, form=form, method=method, keep=0.4)
        original = build().to(dtype)
        assert layers(small)
        for name, layer in layers(small).items():
            module, mean = original.get_submodule(name), statistics.mean(name)
            before = layer_kind(module).matrix(module.weight).double() @ mean + module.bias.double()
            factors = layer.reparam_factors["default"]
            A, B = (factor.double() for factor in factors.factors)
            after = A @ (B @ mean) + factors.bias.double()
            assert_close(after, before, dtype)
            spread = statistics.covariance(name).trace().sqrt()
            assert (after - before).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * max(spread, before.norm())
            assert torch.equal(layer.base_layer.bias, module.bias)


def test_svd_moves_no_bias_and_needs_no_gradients() -> None:
    small = compressed(bert(), TEXT, target_modules=["query"], method="svd", allocation="uniform", form="factors")
    expected = get_peft_model(bert(), ReparamConfig(target_modules=["query"], keep=0.5)).eval()
    assert torch.equal(small(**token_inputs()).logits, expected(**token_inputs()).logits)
    assert not any("bias" in name for layer in layers(small).values() for name in layer.reparam_factors.state_dict())


@pytest.mark.parametrize("case", [c for c in CASES if c.kind != "Embedding"], ids=lambda c: c.kind)
def test_every_ingredient_lowers_the_predicted_loss(case: Case) -> None:
    statistics = calibrate(case.model(), ReparamConfig(target_modules=case.target_modules), batches_of(case), progress=False)

    def loss(**options: Any) -> float:
        made = planned(case.model(), statistics, target_modules=case.target_modules, keep=0.5, **options)
        assert made.predicted_loss == pytest.approx(sum(module.predicted_loss for module in made.modules))
        return made.predicted_loss

    plain = loss(input_metric="none", output_metric="diagonal", allocation="uniform", form="factors")
    two_sided = loss(allocation="uniform", form="factors")
    pivoted = loss(allocation="uniform", form="pivot")
    allocated = loss(allocation="loss", form="pivot")
    assert 0 <= allocated <= pivoted <= two_sided
    assert allocated < pivoted or case.kind == "Conv2d"
    if case.kind in ("Linear", "Conv1D"):
        assert two_sided < plain


def test_predicted_loss_falls_with_keep() -> None:
    statistics = calibrate(llama(), ReparamConfig(target_modules="all-linear"), TEXT, progress=False)
    losses = [
        planned(llama(), statistics, target_modules="all-linear", keep=keep).predicted_loss
        for keep in (0.2, 0.4, 0.6, 0.8, 0.95)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


# Statistics, plans, passes


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_statistics_in_place_of_batches(case: Case, form: str, tmp_path: Path) -> None:
    options = {"target_modules": case.target_modules, "form": form}
    statistics = calibrate(case.model(), ReparamConfig(**options), iter(batches_of(case)), seed=4, progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    small = compressed(case.model(), iter(batches_of(case)), seed=4, **options)
    for given in (statistics, Statistics.load(tmp_path / "statistics.safetensors")):
        assert_same_model(compressed(case.model(), given, **options), small)
    config = small.peft_config["default"]
    assert config.seed == 4
    assert config.calibration_tokens == statistics.tokens > 0
    assert config.gradient_tokens == statistics.gradient_tokens > 0


def test_compression_is_reproducible_and_follows_the_seed() -> None:
    one, two, three = (compressed(llama(), TEXT, target_modules="all-linear", seed=seed) for seed in (1, 1, 2))
    assert_same_model(one, two)
    with pytest.raises(AssertionError):
        assert_same_model(one, three)


@pytest.mark.parametrize("allocation", ["uniform", "loss"])
@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_a_plan_gives_the_model_that_was_planned(case: Case, form: str, allocation: str, tmp_path: Path) -> None:
    options = {"target_modules": case.target_modules, "form": form, "allocation": allocation}
    model = case.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = planned(model, batches_of(case), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not layers(model)
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == made
    assert str(loaded) == str(made)
    expected = compressed(case.model(), batches_of(case), **options)
    for one in (made, loaded):
        assert_same_model(compressed(case.model(), batches_of(case), arguments={"plan": one}, **options), expected)
    config = expected.peft_config["default"]
    assert made.ranks == config.rank_pattern
    assert sorted(made.dense_modules) == config.dense_modules
    assert made.stored_parameters == config.stored_parameters
    assert made.dense_parameters == config.dense_parameters
    assert made.predicted_loss == pytest.approx(config.predicted_loss)
    for module in made.modules:
        assert len(module.spectrum) == min(module.shape)
        assert module.predicted_loss == pytest.approx(sum(module.spectrum[module.rank :]) if module.rank else 0.0, abs=1e-12)
        assert f"{module.stored_parameters:,}" in str(made)


def test_a_plan_that_was_changed_by_hand_is_obeyed() -> None:
    made = planned(llama(), TEXT, target_modules=["q_proj", "v_proj"])
    fields = made.to_dict()
    fields["modules"] = [{**entry, "rank": 5} for entry in fields["modules"]]
    small = compressed(llama(), TEXT, target_modules=["q_proj", "v_proj"], arguments={"plan": Plan.from_dict(fields)})
    assert set(small.peft_config["default"].rank_pattern.values()) == {5}
    assert {layer.r["default"] for layer in layers(small).values()} == {5}


def test_a_plan_fills_in_what_the_config_leaves_open() -> None:
    made = planned(llama(), TEXT, **Q, method="svd", allocation="uniform", form="factors", keep=0.4)
    small = compress(llama(), ReparamConfig(**Q), TEXT, plan=made, progress=False)
    config = small.peft_config["default"]
    assert (config.method, config.allocation, config.form, config.keep) == ("svd", "uniform", "factors", 0.4)
    assert config.rank_pattern == made.ranks


def test_uniform_ranks_without_gradients_are_planned_without_reading_the_data() -> None:
    made = planned(llama(), read(TEXT), **Q, allocation="uniform", output_metric="none")
    assert (made.calibration_tokens, made.gradient_tokens, made.predicted_loss) == (0, 0, None)
    assert made.ranks


@pytest.mark.parametrize(
    ("build", "targets", "batches", "memory"),
    [
        (llama, "all-linear", TEXT, 8 * (2 * 160**2 + 160**2)),
        (bert, ["query", "key", "value", "dense"], TEXT, 8 * (2 * 96**2 + 2 * 96**2)),
        (t5, ["q", "k", "v", "o", "wi_0", "wi_1", "wo"], [pairs([8, 3], [6, 2], (8, 6))], 8 * (3 * 48**2)),
        (convnet, ["conv0", "conv1"], IMAGES, 8 * (2 * 72**2 + 16**2)),
    ],
    ids=["Llama", "BERT", "T5", "Conv2d"],
)
def test_several_passes_give_what_one_gives(
    build: Callable[[], nn.Module], targets: Any, batches: list[Batch], memory: int
) -> None:
    whole = compressed(build(), iter(batches), target_modules=targets)
    model = build()
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    parts = compressed(model, iter(batches), target_modules=targets, arguments={"max_memory": memory})
    handle.remove()
    assert len(calls) >= 2 * len(batches)
    assert_same_model(parts, whole, tolerance=1e-6)
    one = {k: v for k, v in vars(whole.peft_config["default"]).items() if k not in ("predicted_loss",)}
    assert {k: v for k, v in vars(parts.peft_config["default"]).items() if k not in ("predicted_loss",)} == one
    first, second = (
        planned(build(), batches, target_modules=targets),
        planned(build(), batches, target_modules=targets, arguments={"max_memory": memory}),
    )
    assert first.ranks == second.ranks
    assert first.predicted_loss == pytest.approx(second.predicted_loss)


# Models


def bert_encoder() -> BertModel:
    torch.manual_seed(0)
    return BertModel(bert().config).eval()


TOKENS = [{"x": torch.randn(8, 30, 16, generator=torch.Generator().manual_seed(0))}]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, list[Batch]]] = {
    "T5": (t5, ["q", "k", "v", "o", "wi_0", "wi_1", "wo"], [pairs([8, 3], [6, 2], (8, 6)), pairs([5, 5], [4, 1], (5, 4))]),
    "ViT": (vit, "all-linear", [images(4, (3, 16, 16), "pixel_values")]),
    "ViT, patches": (vit, ["projection"], [images(4, (3, 16, 16), "pixel_values")]),
    "encoder without logits": (bert_encoder, "all-linear", TEXT),
    "plain module": (net, ["first", "second"], ROWS),
    "mixture": (mixture, [f"experts.{i}.{j}" for i in range(3) for j in (0, 2)], TOKENS),
    "Qwen2-MoE": (
        qwen_moe,
        [*PROJECTIONS, "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"],
        TEXT,
    ),
}


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("key", MODELS)
def test_models_of_every_sort(key: str, form: str, tmp_path: Path) -> None:
    build, targets, batches = MODELS[key]
    small = compressed(build().train(), batches, target_modules=targets, form=form, keep=0.6, arguments={})

    def output(model: nn.Module) -> Tensor:
        with torch.no_grad():
            result = model(**batches[0])
        return result if isinstance(result, Tensor) else result[0]

    got = output(small)
    assert got.isfinite().all()
    assert 0 < small.size_report().keep <= 0.6
    small.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(build(), tmp_path).eval()), got)
    assert_close(output(small.merge_and_unload()), got)


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_half_precision_models(case: Case, form: str, tmp_path: Path) -> None:
    def cast(batches: list[Batch]) -> list[Batch]:
        return [{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]

    options = {"target_modules": case.target_modules, "form": form, "allocation": "uniform"}
    half = compressed(case.model().bfloat16(), cast(batches_of(case)), **options)
    half.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} <= {torch.bfloat16, torch.uint8}
    single = compressed(case.model(), batches_of(case), **options)
    statistics = calibrate(case.model(), ReparamConfig(target_modules=case.target_modules), batches_of(case), progress=False)
    rounded, exact = (output_errors(small, statistics, case.model()) for small in (half, single))
    for name, error in rounded.items():
        assert error < 1.05 * exact[name] + 1e-4 * scale_of(case.model(), name, statistics), name


# Faults: nothing of the model has changed


class Spoils(nn.Module):
    """Makes its input NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


def with_nan_activations() -> nn.Module:
    model = net()
    model.second = nn.Sequential(Spoils(), model.second)
    return model


def with_nan_weight() -> nn.Module:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    return model


def llama_statistics(**options: Any) -> Statistics:
    return calibrate(llama(**options), ReparamConfig(target_modules=["q_proj"]), TEXT, progress=False)


def planned_for(**options: Any) -> dict[str, Any]:
    return {"plan": planned(options.pop("model", llama)(), TEXT, **{"target_modules": ["q_proj"], **options})}


def other_llama() -> nn.Module:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.1)
    return model


NAMES = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
FAULTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[], Any], Callable[[], dict[str, Any]], Any, str]] = {
    "no batches": (llama, Q, list, dict, ValueError, "`batches` must hold at least one batch, got none"),
    "exhausted": (llama, Q, lambda: read(TEXT), dict, ValueError, "got none; a generator can be read only once"),
    "exhausted, several passes": (llama, ALL, lambda: read(TEXT), lambda: {"max_memory": 700_000}, ValueError, "got none"),
    "not accepted": (llama, Q, lambda: [*TEXT, ROWS[0]], dict, ValueError, r"the model does not accept batch 2 \(\['x'\]\)"),
    "no mapping": (llama, Q, lambda: [torch.ones(2)], dict, ValueError, "mappings of keyword arguments, got a Tensor"),
    "NaN activations": (
        with_nan_activations, {"target_modules": ["first", "second.1"]}, lambda: ROWS, dict, ValueError,
        r"second\.1: its inputs hold NaN or infinite values in batch 0; repair the model or its data",
    ),
    "NaN in the data": (
        net, {"target_modules": ["first", "second"]}, lambda: [ROWS[0], {"x": ROWS[1]["x"] / 0}], dict, ValueError,
        "first: its inputs hold NaN or infinite values in batch 1",
    ),
    "NaN weight": (with_nan_weight, ALL, lambda: TEXT, dict, ValueError, r"layers\.1\.mlp\.down_proj: `weight` contains NaN"),
    "never reached": (
        net, {"target_modules": ["first", "unused"]}, lambda: ROWS, dict, ValueError,
        "unused: no batch reached this module. Give batches that use it, or leave it out with `exclude_modules`",
    ),
    "an expert without tokens": (
        mixture, {"target_modules": r"experts\.\d\.0"}, lambda: TOKENS, dict, ValueError, r"experts\.3\.0: no batch reached",
    ),
    "keep too small": (
        llama, {**ALL, "keep": 0.01}, lambda: TEXT, dict, ValueError,
        "`keep=0.01` allows 860 parameters, and the least that can be stored is .* Raise `keep`, or lower `floor` or",
    ),
    "statistics of another model": (
        other_llama, Q, llama_statistics, dict, ValueError, "1.self_attn.q_proj: the statistics are of a weight of norm",
    ),
    "statistics of another shape": (
        llama, Q, lambda: llama_statistics(hidden_size=32), dict, ValueError,
        r"q_proj: the statistics have shape \(32, 32\), and the weight is \(64, 64\)",
    ),
    "statistics of other targets": (
        llama, ALL, llama_statistics, dict, ValueError, "k_proj: the statistics do not hold this module",
    ),
    "dense modules beyond the budget": (
        llama, {**ALL, "keep": 0.3, "dense_modules": NAMES}, lambda: TEXT, dict, ValueError,
        "61,440 for the 6 targets that `dense_modules` and `rank_pattern` fix",
    ),
    "tied weight": (
        gpt2, {"target_modules": ["wte"]}, lambda: TEXT, dict, ValueError, r"transformer\.wte: the weight is shared",
    ),
    "no such target": (
        llama, {"target_modules": ["nothing"]}, lambda: TEXT, dict, ValueError, "`target_modules` .*nothing.* match no module",
    ),
    "target of another kind": (
        llama, {"target_modules": ["input_layernorm"]}, lambda: TEXT, dict, TypeError, "a LlamaRMSNorm cannot be",
    ),
    "plan of other targets": (llama, ALL, lambda: TEXT, planned_for, ValueError, "the plan is of other targets"),
    "plan of more targets": (llama, Q, lambda: TEXT, lambda: planned_for(**ALL), ValueError, "the plan is of other targets"),
    "plan of another shape": (
        lambda: llama(hidden_size=32), Q, lambda: TEXT, planned_for, ValueError,
        r"q_proj: the plan is for a shape of \(64, 64\), and the weight is \(32, 32\)",
    ),
    "plan of another form": (
        llama, {**Q, "form": "pivot"}, lambda: TEXT, lambda: planned_for(form="factors"), ValueError,
        "`plan` is for `form='factors'`, and the config says 'pivot'",
    ),
    "plan of another keep": (
        llama, {**Q, "keep": 0.6}, lambda: TEXT, planned_for, ValueError,
        "`plan` is for `keep=0.5`, and the config says 0.6; leave it out of the config, or make a plan with it",
    ),
    "plan of another allocation": (
        llama, {**Q, "allocation": "loss"}, lambda: TEXT, lambda: planned_for(allocation="uniform"), ValueError,
        "`plan` is for `allocation='uniform'`, and the config says 'loss'",
    ),
    "plan of other ranks": (
        llama, {**Q, "rank_pattern": {"q_proj": 3}}, lambda: TEXT, planned_for, ValueError,
        "q_proj: the config says rank 3, and the plan .*; leave `r`, `rank_pattern` and `dense_modules` out of the config",
    ),
    "plan of another r": (
        llama, {**Q, "r": 7}, lambda: TEXT, lambda: planned_for(r=8), ValueError,
        "q_proj: the config says rank 7, and the plan 8",
    ),
    "a plan's path": (llama, Q, lambda: TEXT, lambda: {"plan": "plan.json"}, TypeError, "read one with `Plan.load`"),
    "tied weight that the plan factorises": (
        gpt2, {"target_modules": ["wte", "c_fc"]}, lambda: TEXT, dict, ValueError, r"transformer\.wte: the weight is shared",
    ),
    "plan without moved biases": (
        bert, {"target_modules": ["query"], "method": "whitened", "allocation": "uniform"}, lambda: TEXT,
        lambda: planned_for(model=bert, target_modules=["query"], method="svd", allocation="uniform", form="pivot"),
        ValueError, "`plan` is for `method='svd'`, and the config says 'whitened', which stores other biases",
    ),
    "memory too small": (
        llama, ALL, lambda: TEXT, lambda: {"max_memory": 1000}, ValueError,
        r"q_proj: its statistics take [\d,]+ bytes, and `max_memory` is 1,000; raise it",
    ),
    "config of a compressed model": (
        llama, {**Q, "stored_parameters": 5}, lambda: TEXT, dict, ValueError, "`config` is that of a compressed model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_and_leaves_the_model_as_it_was(fault: str) -> None:
    build, options, batches, arguments, error, match = FAULTS[fault]
    model = build().train()
    given, arguments = batches(), arguments()
    before = state_of(model), [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=match):
        compressed(model, given, arguments=arguments, **options)
    assert state_of(model) == before[0]
    assert [type(module) for module in model.modules()] == before[1]
    assert model.state_dict().keys() == before[2].keys()
    assert all(torch.equal(value.nan_to_num(7), before[2][name].nan_to_num(7)) for name, value in model.state_dict().items())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("wrap", [ReparamConfig(**Q), LoraConfig(**Q)], ids=["ours", "LoRA"])
@pytest.mark.parametrize("inner", [False, True])
def test_wrapped_models_are_refused(wrap: Any, inner: bool) -> None:
    wrapped = get_peft_model(llama(), wrap)
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    with pytest.raises(TypeError, match="`model` is wrapped by PEFT already; give the base model, or merge the adapter first"):
        compressed(wrapped.get_base_model() if inner else wrapped, TEXT, **Q)
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())


def test_an_error_while_factorising_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import reparam_peft.compression.run as module

    real, count = module.factorize, iter(range(100))

    def fails(*args: Any) -> Any:
        if next(count) == 5:
            raise ValueError("no memory left")
        return real(*args)

    monkeypatch.setattr(module, "factorize", fails)
    model = llama()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"model\.layers\.\d.*_proj: no memory left"):
        compressed(model, TEXT, **ALL)
    assert state_of(model) == before
    assert not layers(model)


def test_the_config_of_the_caller_is_not_changed() -> None:
    config = ReparamConfig(**ALL, keep=0.5)
    before = dict(vars(config))
    one, two = (compress(llama(), config, TEXT, progress=False) for _ in range(2))
    assert vars(config) == before
    assert_same_model(one, two)


def test_a_target_that_no_gradient_reaches_gets_a_uniform_rank() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x), "other": self.unused(x)}

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="unused: no gradient reaches its output, so that its rank is uniform"):
        small = compressed(Two(), ROWS, target_modules=["first", "second", "unused"])
    ranks = small.peft_config["default"].rank_pattern
    assert ranks["unused"] == uniform_rank(0.5, matrix_storage(Two().unused, small.peft_config["default"]))
    assert small.size_report().keep <= 0.5


# Two processes


SHARED: dict[str, tuple[Callable[[], nn.Module], list[Batch], dict[str, Any]]] = {
    "pivot": (llama, [*TEXT, text([6, 6], 6, seed=3)], ALL),
    "factors": (bert, TEXT, {"target_modules": ["query", "key", "value", "dense"], "form": "factors"}),
    "uniform": (gpt2, TEXT, {"target_modules": ["c_attn", "c_fc"], "allocation": "uniform", "output_metric": "none"}),
    "autoencoder": (net, ROWS, {"target_modules": ["first", "second"], "method": "autoencoder"}),
    "embedding": (llama, TEXT, {"target_modules": ["embed_tokens"]}),
    "many sizes": (gpt2, TEXT, {"target_modules": ["c_attn", "c_fc"], "form": "factors", "ceiling": 0.99, "keep": 0.9}),
    "fewer batches": (llama, TEXT[:1], ALL),
}


def run_process(rank: int, folder: str) -> None:
    """What each of two processes does: every entry of `SHARED`, its state and its plan written to files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for key, (build, batches, options) in SHARED.items():
        torch.manual_seed(rank)
        made = planned(build(), batches, **options)
        small = compressed(build(), iter(batches), **options)
        torch.save((small.state_dict(), small.peft_config["default"].to_dict(), made.to_dict()), f"{folder}/{key}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(run_process, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("key", SHARED)
def test_two_processes_give_what_one_gives(key: str, shared: Path) -> None:
    build, batches, options = SHARED[key]
    small, made = compressed(build(), batches, **options), planned(build(), batches, **options)
    (state, config, first), (other, config_of_other, second) = (
        torch.load(shared / f"{key}.{rank}", weights_only=False) for rank in (0, 1)
    )
    assert config == config_of_other
    assert first == second
    assert state.keys() == other.keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        assert torch.equal(state[name], other[name]), name
        if tensor.is_floating_point():
            assert relative_error(state[name], tensor) < 1e-6, name
        else:
            assert torch.equal(state[name], tensor), name
    assert Plan.from_dict(first).ranks == made.ranks == small.peft_config["default"].rank_pattern
    if options.get("output_metric") != "none":  # which needs no gradients
        assert Plan.from_dict(first).predicted_loss == pytest.approx(made.predicted_loss, rel=1e-6)
    assert config["calibration_tokens"] == small.peft_config["default"].calibration_tokens


def test_inputs_of_the_cases_are_accepted(case: Case) -> None:
    assert image_inputs()["x"].shape[1:] == IMAGES[0]["x"].shape[1:]
    assert case.output(compressed(case.model(), [case.inputs()], target_modules=case.target_modules)).isfinite().all()
