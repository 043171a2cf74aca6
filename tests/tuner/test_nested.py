"""One adapter, many sizes: `from_pretrained(…, keep=…)` takes the first columns of A and rows of B."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from support.models import bert, gpt2, llama
from support.narrow import GROUPS, narrow_config, narrow_products
from support.tolerances import relative_error
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from reparam_peft import ReparamConfig, compress, plan, retruncate
from reparam_peft.numerics.decompositions import Whole
from reparam_peft.tuner.data_free import installing
from reparam_peft.tuner.layer import ReparamLayer

LESS = [{"input_ids": torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(i))} for i in range(3)]


def nested(make: Callable[[], nn.Module] = llama, batches: object = LESS, **options: object) -> PeftModel:
    ways = {way: options.pop(way) for way in ("sequential", "run_folder") if way in options}
    given = {"target_modules": "all-linear", "keep": 1.0, "form": "factors", "rank_multiple": 4, "ceiling": 0.999}
    return compress(make(), ReparamConfig(**{**given, "neurons": False, **options}), batches, progress=False, **ways)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "other"}])
def test_an_adapter_loads_at_smaller_sizes(tmp_path: Path, options: dict[str, object]) -> None:
    large = nested()
    assert large.peft_config["default"].smaller_keeps[:3] == [0.95, 0.9, 0.85]
    large.save_pretrained(tmp_path)
    small = PeftModel.from_pretrained(llama(), tmp_path, keep=0.62, **options)
    adapter = options.get("adapter_name", "default")
    own = small.peft_config[adapter]
    assert own.keep == 0.6
    assert 0.5 < small.size_report().keep <= 0.6
    assert own.dense_modules
    for name, layer in small.get_base_model().named_modules():
        if isinstance(layer, ReparamLayer):
            got = layer.reparam_factors[adapter].factors
            whole = large.get_base_model().get_submodule(name).reparam_factors["default"].factors
            rank = own.rank_pattern[name]
            assert torch.equal(got.A, whole.A[:, :rank])
            assert torch.equal(got.B, whole.B[:rank])
            assert got.A.untyped_storage().nbytes() == got.A.nbytes
    for name in own.dense_modules:
        assert torch.equal(small.get_base_model().get_submodule(name).weight, llama().get_submodule(name).weight)


def test_a_module_whose_name_ends_as_that_of_a_dense_one_keeps_its_factors(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
        return nn.Sequential(nn.Linear(64, 64, bias=False), inner)

    batches = [{"input": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}]
    given = {"keep": 1.0, "form": "factors", "allocation": "loss", "ceiling": 0.999, "rank_multiple": 4}
    compress(net(), ReparamConfig(target_modules=["0", "1.2"], **given), batches, progress=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    ranks = {name: [None] if name == "0" else [20] for name in fields["rank_pattern"]}
    path.write_text(json.dumps({**fields, "smaller_keeps": [0.85], "smaller_ranks": ranks}))
    small = PeftModel.from_pretrained(net(), tmp_path, keep=0.85)
    assert set(small.peft_config["default"].rank_pattern) == {"1.0", "1.2"}
    for name in ("1.0", "1.2"):
        factors = small.get_base_model().get_submodule(name).reparam_factors["default"].factors
        assert factors.A.isfinite().all()
        assert factors.A.shape == (64, 20)


def test_ranks_that_are_given_stay(tmp_path: Path) -> None:
    model = nested(rank_pattern={"layers.0.mlp.up_proj": 36})
    ranks = model.peft_config["default"].smaller_ranks["model.layers.0.mlp.up_proj"]
    assert ranks == [36] * len(ranks)


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
def test_it_is_what_compress_makes_at_that_size(tmp_path: Path, keep: float) -> None:
    nested().save_pretrained(tmp_path)
    small, made = PeftModel.from_pretrained(llama(), tmp_path, keep=keep), nested(ceiling=None, keep=keep)
    assert small.peft_config["default"].rank_pattern == made.peft_config["default"].rank_pattern
    assert small.peft_config["default"].dense_modules == made.peft_config["default"].dense_modules
    with torch.no_grad():
        assert relative_error(small(**LESS[0]).logits, made(**LESS[0]).logits) < 1e-4


def qwen2() -> nn.Module:
    """Queries, keys and values with bias, all else without."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 100}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


class Convolutions(nn.Sequential):
    """Whose inputs have a mean, so that a bias has something to preserve."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(16, 48, 3), nn.ReLU(), nn.Conv2d(48, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 1)


IMAGES = [{"x": torch.randn(8, 16, 9, 9, generator=torch.Generator().manual_seed(i))} for i in range(3)]


@pytest.mark.parametrize("keep", [0.7, 0.4])
@pytest.mark.parametrize(
    ("make", "targets", "batches"),
    [(gpt2, "all-linear", LESS), (qwen2, "all-linear", LESS), (bert, "all-linear", LESS), (Convolutions, ["0", "2"], IMAGES)],
)
def test_biases_go_with_the_rank(
    tmp_path: Path, make: Callable[[], nn.Module], targets: object, batches: list[dict[str, torch.Tensor]], keep: float
) -> None:
    large = nested(make, batches, target_modules=targets)
    large.save_pretrained(tmp_path)
    small = PeftModel.from_pretrained(make(), tmp_path, keep=keep)
    made = nested(make, batches, target_modules=targets, keep=keep, ceiling=None)
    assert small.peft_config["default"].moved_bias
    assert small.peft_config["default"].rank_pattern == made.peft_config["default"].rank_pattern
    biases = {name: module.bias for name, module in made.named_modules() if getattr(module, "feature_mean", 0) is None}
    assert any(bias is not None for bias in biases.values())
    for name, bias in biases.items():
        own = small.get_submodule(name)
        assert own.feature_mean is None
        if bias is not None:
            torch.testing.assert_close(own.bias, bias, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        outputs = [model(**batches[0]) for model in (small, made)]
    assert relative_error(*(getattr(output, "logits", output) for output in outputs)) < 1e-4


def test_the_means_stay_with_the_large_one_only(tmp_path: Path) -> None:
    large = nested(gpt2)
    large.save_pretrained(tmp_path / "large")
    again = PeftModel.from_pretrained(gpt2(), tmp_path / "large")
    again.save_pretrained(tmp_path / "again")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("large", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert sum(key.endswith("feature_mean") for key in one) == 8
    small = PeftModel.from_pretrained(gpt2(), tmp_path / "again", keep=0.5)
    small.save_pretrained(tmp_path / "small")
    assert not any(key.endswith("feature_mean") for key in load_file(tmp_path / "small" / "adapter_model.safetensors"))
    standalone = large.to_standalone()
    assert not any(key.endswith("feature_mean") for key in standalone.state_dict())
    with torch.no_grad():
        assert torch.equal(standalone(**LESS[0]).logits, large(**LESS[0]).logits)
    before = large.peft_config["default"].rank_pattern.copy()
    retruncate(large, 0.8, LESS, progress=False)
    assert any(rank == before[name] for name, rank in large.peft_config["default"].rank_pattern.items())
    large.save_pretrained(tmp_path / "cut")
    assert not any(key.endswith("feature_mean") for key in load_file(tmp_path / "cut" / "adapter_model.safetensors"))


def test_a_config_without_its_weights_serves_many_sizes_too(tmp_path: Path) -> None:
    nested(gpt2).save_pretrained(tmp_path / "large")
    fresh = get_peft_model(gpt2(), ReparamConfig.from_pretrained(tmp_path / "large")).eval()
    with torch.no_grad():
        fresh(**LESS[0])  # which factorises the weights, since no factors have arrived
    fresh.save_pretrained(tmp_path / "fresh")
    small = PeftModel.from_pretrained(gpt2(), tmp_path / "fresh", keep=0.5)
    for name, layer in small.get_base_model().named_modules():
        if isinstance(layer, ReparamLayer):
            assert torch.equal(layer.reparam_factors["default"].bias, gpt2().get_submodule(name).bias)


def test_a_bare_model_takes_a_smaller_size(tmp_path: Path) -> None:
    nested(gpt2).save_pretrained(tmp_path)
    config = ReparamConfig.from_pretrained(tmp_path, keep=0.5)
    bare = inject_adapter_in_model(config, gpt2())
    set_peft_model_state_dict(bare, load_peft_weights(tmp_path))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(gpt2(), tmp_path, keep=0.5)(**LESS[0]).logits
        assert torch.equal(bare.eval()(**LESS[0]).logits, expected)


@pytest.mark.parametrize("route", ["transformers", "second", "merged"])
def test_the_means_survive_other_routes(tmp_path: Path, route: str) -> None:
    gpt2().save_pretrained(tmp_path / "dense")
    nested(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "dense")).save_pretrained(tmp_path / "large")
    folder = tmp_path / "again"
    if route == "transformers":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        model.load_adapter(str(tmp_path / "large"))
        model.save_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(gpt2(), tmp_path / "large")
        if route == "merged":
            model.merge_adapter()
            model.unmerge_adapter()
        else:
            model.load_adapter(tmp_path / "large", "second")
            folder /= "second"
        model.save_pretrained(tmp_path / "again")
    one, other = (PeftModel.from_pretrained(gpt2(), path, keep=0.5) for path in (tmp_path / "large", folder))
    with torch.no_grad():
        assert torch.equal(one(**LESS[0]).logits, other(**LESS[0]).logits)


@pytest.mark.parametrize("keep", [None, 0.5])
def test_a_checkpoint_without_the_means_is_refused(tmp_path: Path, keep: float | None) -> None:
    nested(gpt2).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if not key.endswith("feature_mean")}, path)
    with pytest.raises(ValueError, match="feature_mean"):
        PeftModel.from_pretrained(gpt2(), tmp_path, keep=keep)
    if keep is None:
        gpt2().save_pretrained(tmp_path / "dense")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        with pytest.raises(ValueError, match="damaged"):
            model.load_adapter(str(tmp_path))


def test_block_by_block_with_biases(tmp_path: Path) -> None:
    options = {"sequential": True, "run_folder": tmp_path / "run"}
    large = nested(gpt2, **options)
    (tmp_path / "run" / "block-0001.safetensors").unlink()  # as if it was killed before
    again = nested(gpt2, **options)
    for name, buffer in large.named_buffers():
        if name.endswith("feature_mean"):
            assert torch.equal(buffer, again.get_buffer(name))
    large.save_pretrained(tmp_path / "large")
    small = PeftModel.from_pretrained(gpt2(), tmp_path / "large", keep=0.6)
    for name, layer in small.get_base_model().named_modules():
        if isinstance(layer, ReparamLayer):
            whole = large.get_base_model().get_submodule(name).reparam_factors["default"]
            A, rank = whole.factors.A, layer.r["default"]
            expected = whole.bias + A[:, rank:] @ whole.feature_mean[rank:]
            torch.testing.assert_close(layer.reparam_factors["default"].bias, expected, rtol=1e-5, atol=1e-6)


def test_a_smaller_one_is_saved_trained_and_made_standalone(tmp_path: Path) -> None:
    nested().save_pretrained(tmp_path / "large")
    small = PeftModel.from_pretrained(llama(), tmp_path / "large", keep=0.6, is_trainable=True)
    small(**LESS[0], labels=LESS[0]["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters() if parameter.requires_grad)
    small.eval().save_pretrained(tmp_path / "small")
    again = PeftModel.from_pretrained(llama(), tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(**LESS[0]).logits, small(**LESS[0]).logits)
        assert torch.equal(again.to_standalone()(**LESS[0]).logits, small(**LESS[0]).logits)
    stored = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert (
        sum(tensor.numel() for tensor in stored.values()) < 0.6 * small.size_report().to_dict()["targets"]["dense_parameters"]
    )
    with pytest.raises(ValueError, match="does not know its ranks at smaller sizes"):
        PeftModel.from_pretrained(llama(), tmp_path / "small", keep=0.5)


def test_other_ways_of_peft_take_the_config_of_a_smaller_size(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    nested(lambda: base, task_type="CAUSAL_LM").save_pretrained(tmp_path / "large")
    expected = PeftModel.from_pretrained(llama(), tmp_path / "large", keep=0.6)
    by_auto = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "large", config=ReparamConfig.from_pretrained(tmp_path / "large", keep=0.6)
    )
    beside = PeftModel.from_pretrained(llama(), tmp_path / "large", keep=0.9)
    beside.add_adapter("small", ReparamConfig.from_pretrained(tmp_path / "large", keep=0.6))
    beside.load_adapter(tmp_path / "large", "small")
    beside.set_adapter("small")
    with torch.no_grad():
        for model in (by_auto, beside):
            assert torch.equal(model(**LESS[0]).logits, expected(**LESS[0]).logits)


def test_a_plan_brings_its_ceiling() -> None:
    made = plan(
        llama(), ReparamConfig(target_modules="all-linear", keep=0.9, form="factors", ceiling=0.95), LESS, progress=False
    )
    small = compress(llama(), ReparamConfig(target_modules="all-linear"), LESS, plan=made, progress=False)
    assert small.peft_config["default"].ceiling == 0.95
    assert small.peft_config["default"].smaller_keeps
    with pytest.raises(ValueError, match=r"`plan` is for `ceiling=0\.95`, and the config says 0\.5"):
        compress(llama(), ReparamConfig(target_modules="all-linear", ceiling=0.5), LESS, plan=made, progress=False)
    with pytest.raises(ValueError, match="`plan` is for `allocation='loss'`, and the config says 'uniform'"):
        compress(llama(), ReparamConfig(target_modules="all-linear", allocation="uniform"), LESS, plan=made, progress=False)


def test_retruncate_forgets_the_smaller_sizes() -> None:
    assert retruncate(nested(), 0.4, progress=False).peft_config["default"].smaller_keeps is None


def test_sizes_that_cannot_be_loaded(tmp_path: Path) -> None:
    nested(keep=0.8).save_pretrained(tmp_path)
    for keep in (0.81, 0, -1, True, "0.5"):
        with pytest.raises(ValueError, match="`keep` must be a number"):
            PeftModel.from_pretrained(llama(), tmp_path, keep=keep)
    with pytest.raises(ValueError, match="`keep` must be at least"):
        PeftModel.from_pretrained(llama(), tmp_path, keep=0.001)
    whole = PeftModel.from_pretrained(llama(), tmp_path, keep=0.8)
    assert whole.size_report().keep > 0.75


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {"form": "pivot"}),
        (gpt2, {"form": "pivot"}),
        (llama, {"method": "autoencoder"}),
        (llama, {"ceiling": None, "keep": 0.8}),
    ],
)
def test_products_without_an_order_say_so(tmp_path: Path, make: Callable[[], nn.Module], options: dict[str, object]) -> None:
    model = nested(make, **options)
    assert model.peft_config["default"].smaller_keeps is None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not know its ranks at smaller sizes"):
        PeftModel.from_pretrained(make(), tmp_path, keep=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smaller_keeps": [1.0]}, "fractions below `keep`"),
        ({"smaller_keeps": [0.5, 0.6]}, "from large to small"),
        ({"smaller_keeps": None}, "fractions below `keep`"),
        ({"smaller_ranks": {}}, "dict of the modules"),
        ({"smaller_keeps": [0.5]}, "must hold 1 ints"),
    ],
)
def test_damaged_orders_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    nested().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((TypeError, ValueError), match=message):
        PeftModel.from_pretrained(llama(), tmp_path, keep=0.5)


def test_ranks_at_a_smaller_size_above_those_in_the_file_are_refused(tmp_path: Path) -> None:
    nested().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    name = next(iter(fields["smaller_ranks"]))
    fields["smaller_ranks"][name][0] = fields["rank_pattern"][name] + 1
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"`smaller_ranks` must be in \[1, "):
        PeftModel.from_pretrained(llama(), tmp_path, keep=0.95)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_has_lost_neurons_loads_at_lower_ranks(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    products = narrow_products(make(), GROUPS[type(make()).__name__], "factors")
    lower = {name: one.rank if isinstance(one.factors, Whole) else one.rank // 2 for name, one in products.items()}
    for name, one in products.items():
        if one.bias is not None and not isinstance(one.factors, Whole):
            products[name] = one._replace(feature_mean=torch.randn(one.rank, generator=torch.Generator().manual_seed(0)))
    smaller = {"smaller_keeps": [0.5], "smaller_ranks": {name: [rank] for name, rank in lower.items()}}
    with installing(products):
        large = get_peft_model(make(), narrow_config(products, "factors", **smaller)).eval()
    large.save_pretrained(tmp_path)
    small = PeftModel.from_pretrained(make(), tmp_path, keep=0.5)
    assert small.peft_config["default"].rank_pattern == lower
    for name, one in products.items():
        module = small.get_base_model().get_submodule(name).reparam_factors["default"]
        if isinstance(one.factors, Whole):
            assert torch.equal(module.stored.W, one.factors.W)
            continue
        rank = lower[name]
        assert torch.equal(module.factors.A, one.factors.A[:, :rank])
        assert torch.equal(module.factors.B, one.factors.B[:rank])
        if one.bias is not None:
            torch.testing.assert_close(module.bias, one.bias + one.factors.A[:, rank:] @ one.feature_mean[rank:])
