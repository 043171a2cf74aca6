"""`compress`: every method on every layer kind, the budget, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.batches import Batch, images, pairs, read
from support.compressing import ALL, IMAGES, ROWS, TEXT, Q, batches_of, compressed, config_of, output_errors, planned, scale_of
from support.model_state import assert_same_model, state_of
from support.models import (
    Case,
    bert,
    byte_tokenizer,
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
from support.tolerances import assert_close
from torch import Tensor, nn
from transformers import BertModel

from reparam_peft import Refinement, ReparamConfig, Statistics, calibrate, compress, plan, self_written
from reparam_peft.calibration import self_written as text_of_model
from reparam_peft.layers.kinds import layer_kind
from reparam_peft.numerics.storage import uniform_rank
from reparam_peft.tuner.layer import ReparamLayer
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
    storages = {n: matrix_storage(fresh.get_submodule(n), n, config) for n in config.rank_pattern}
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
    "exhausted, several passes": (llama, ALL, lambda: read(TEXT), lambda: {"max_memory": 350_000}, ValueError, "got none"),
    "not accepted": (llama, Q, lambda: [*TEXT, ROWS[0]], dict, ValueError, r"the model does not accept batch 2 \(\['x'\]\)"),
    "no mapping": (llama, Q, lambda: [3], dict, ValueError, "got a int as number 0"),
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
        r"q_proj: the statistics are of 32 features, and the weight is \(64, 64\)",
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
        r"down_proj: its statistics take [\d,]+ bytes, and `max_memory` is 1,000; raise it",
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


def test_the_config_of_the_caller_is_not_changed() -> None:
    config = ReparamConfig(**ALL, keep=0.5)
    before = dict(vars(config))
    one, two = (compress(llama(), config, TEXT, progress=False) for _ in range(2))
    assert vars(config) == before
    assert_same_model(one, two)


# Two processes


def test_inputs_of_the_cases_are_accepted(case: Case) -> None:
    assert image_inputs()["x"].shape[1:] == IMAGES[0]["x"].shape[1:]
    assert case.output(compressed(case.model(), [case.inputs()], target_modules=case.target_modules)).isfinite().all()


@pytest.mark.parametrize(
    "ways", [{}, {"sequential": True}, {"refine": Refinement(epochs=1)}], ids=["one-shot", "sequential", "refine"]
)
def test_an_error_while_layers_are_put_in_place_undoes_all(ways: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = llama().train(), []
    before = state_of(model), [type(module) for module in model.modules()]
    own = ReparamLayer.update_layer

    def fails(self: ReparamLayer, name: str, *args: Any, **options: Any) -> None:
        calls.append(name)
        if calls.count("adapter") == 2:  # others are those of students
            raise torch.OutOfMemoryError("injected")
        own(self, name, *args, **options)

    monkeypatch.setattr(ReparamLayer, "update_layer", fails)
    with pytest.raises(torch.OutOfMemoryError):
        compress(model, config_of(**Q), TEXT, adapter_name="adapter", progress=False, **ways)
    assert (state_of(model), [type(module) for module in model.modules()]) == before
    assert not hasattr(model, "peft_config")
    monkeypatch.undo()
    assert all(module.training for module in compress(model, config_of(**Q), TEXT, progress=False, **ways).modules())


# Models that accelerate spreads over devices, here with its hooks and on its disk


@pytest.mark.parametrize(
    "ways", [{}, {"sequential": True, "refine": Refinement(epochs=1, batch_size=2)}], ids=["one-shot", "both"]
)
def test_models_spread_over_devices_are_compressed_as_others(ways: dict[str, Any], tmp_path: Path) -> None:
    places = {"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    spread = dispatch_model(llama(), {**places, "model.layers": "cpu"}, main_device="cpu", offload_dir=tmp_path)
    one, two = (compress(model, config_of(**ALL), TEXT[:1], progress=False, **ways) for model in (spread, llama()))
    with torch.no_grad():
        assert torch.equal(one.eval()(**TEXT[0]).logits, two.eval()(**TEXT[0]).logits)
    one.save_pretrained(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter/adapter_model.safetensors").keys()


def test_layers_that_are_offloaded_are_refused_before_anything_is_read() -> None:
    model = cpu_offload(llama(), execution_device=torch.device("cpu"))
    for what in (compress, plan, calibrate):
        with pytest.raises(ValueError, match=r"it is offloaded.*`compress_checkpoint`"):
            what(model, config_of(**Q), (no_text() for _ in range(1)), progress=False)


# Text that the model writes itself


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What a Llama writes for `batches="self"`, which is made short."""
    monkeypatch.setattr(text_of_model, "WINDOWS", 5)
    monkeypatch.setattr(text_of_model, "LENGTH", 16)
    return self_written(llama(), byte_tokenizer(), 5, 16, seed=1, batch_size=2, progress=False)


def no_text(*args: Any, **options: Any) -> None:
    raise AssertionError("text is written")


def test_the_word_self_stands_for_what_the_model_writes(short: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    config, options = config_of(**Q), {"seed": 1, "progress": False}
    own = {**options, "tokenizer": byte_tokenizer()}
    expected = plan(llama(), config, short, **options)
    assert plan(llama(), config, "self", **own).to_dict() == expected.to_dict()
    assert plan(llama(), config, "self", max_memory=10**5, **own).ranks == expected.ranks, "text is written once"
    assert calibrate(llama(), config, "self", **own).fingerprint() == calibrate(llama(), config, short, **options).fingerprint()
    small = compress(llama(), config, "self", **own)
    assert_same_model(small, compress(llama(), config, short, **options))
    monkeypatch.setattr(text_of_model, "self_written", no_text)
    with pytest.raises(ValueError, match="Raise `keep`"):
        compress(llama(), config_of(keep=1e-4, **Q), "self", **own)


def test_text_is_kept_with_the_blocks_of_a_run(short: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compressed_by_block(batches: Any, folder: Path | None, **options: Any) -> PeftModel:
        arguments = {"seed": 1, "progress": False, "sequential": True, "refine": Refinement(epochs=1), "run_folder": folder}
        return compress(llama(), config_of(**Q), batches, **arguments, **options)

    first = compressed_by_block("self", tmp_path, tokenizer=byte_tokenizer())
    assert_same_model(compressed_by_block(short, None), first)
    monkeypatch.setattr(text_of_model, "self_written", no_text)
    (tmp_path / "block-0001.safetensors").unlink()
    assert_same_model(compressed_by_block("self", tmp_path, tokenizer=byte_tokenizer()), first)
