"""Which parameters a config takes, and that they are open in the model only for as long as it holds factors of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import _get_submodules
from support.batches import text
from support.models import gpt_oss, llama, qwen_moe, siglip, token_inputs, xlnet
from support.tolerances import assert_close, relative_error
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModel, XLNetLMHeadModel

from reparam_peft import ReparamConfig, calibrate, compress, plan, search
from reparam_peft.layers.experts import fused_parameters

BATCHES = [text([24, 20, 24, 17], 24, seed=seed) for seed in range(3)]

FIRST = "model.layers.0.mlp.experts.gate_up_proj"


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("options", "experts", "others"),
    [
        ({"target_parameters": "all-experts", "target_modules": []}, 16, 0),
        ({"target_parameters": "all-experts", "target_modules": "all-linear"}, 16, 14),
        ({"target_parameters": ["experts.gate_up_proj"], "target_modules": []}, 8, 0),
        ({"target_parameters": [FIRST]}, 4, 0),
        ({"target_parameters": r".*layers\.1.*(gate_up|down)_proj", "target_modules": ["q_proj"]}, 8, 2),
        ({"target_parameters": "all-experts", "exclude_modules": r".*down_proj\.[01]"}, 12, 0),
        ({"target_parameters": "all-experts", "exclude_modules": ["down_proj"]}, 8, 0),
        ({"target_parameters": "all-experts", "exclude_modules": r".*layers\.0\..*", "target_modules": ["q_proj"]}, 8, 1),
        ({"target_parameters": "all-experts", "modules_to_save": ["layers.0.mlp.experts"]}, 8, 0),
        ({"target_parameters": ["q_proj.weight"]}, 0, 2),
        ({"target_parameters": ["q_proj.weight", "mlp.gate.weight"], "r": 2}, 0, 4),
    ],
)
def test_parameters_are_named_as_for_lora(options: dict[str, Any], experts: int, others: int) -> None:
    small = get_peft_model(qwen_moe(), ReparamConfig(**{"target_modules": [], "keep": 0.5, **options}))
    ranks = small.peft_config["default"].rank_pattern
    assert sum(".experts." in name for name in ranks) == experts
    assert sum(".experts." not in name for name in ranks) >= others
    opened = {name.rpartition(".")[0] for name in ranks if ".experts." in name}
    assert opened <= set(small.peft_config["default"].target_parameters)
    modules = dict(small.base_model.model.named_modules())
    assert opened == {name for name in fused_parameters(small.base_model.model) if name in modules}
    assert small(**token_inputs()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("build", "asked", "match"),
    [
        (llama, "all-experts", "has no fused experts"),
        (qwen_moe, ["nothing"], r"\['nothing'\] match no parameter of the model; its fused experts are model.layers.0"),
        (qwen_moe, ["input_layernorm.weight"], "input_layernorm"),
        (qwen_moe, r".*shared_expert_gate|.*norm\.weigh", "match no parameter"),
        (llama, ["nothing"], "match no parameter of the model; it has no fused experts"),
        (llama, ["input_layernorm.weight"], r"a parameter of shape \(64,\) and dtype torch.float32 makes no matrix"),
    ],
)
def test_what_cannot_be_opened_is_refused(build: Any, asked: Any, match: str) -> None:
    model = build()
    before = names_of(model)
    with pytest.raises((TypeError, ValueError), match=match):
        get_peft_model(model, ReparamConfig(target_modules=[], target_parameters=asked))
    assert names_of(model) == before


@pytest.mark.parametrize(
    ("build", "asked", "match"),
    [
        (lambda: nn.LSTM(8, 8), "weight_hh_l0", "a LSTM keeps it in a Python list, too"),
        (lambda: weight_norm(nn.Linear(8, 8)), "parametrizations.weight.original1", "a parametrisation computes a weight"),
    ],
)
def test_what_is_computed_with_by_other_ways_is_refused(build: Any, asked: str, match: str) -> None:
    model = nn.Sequential(build())
    with pytest.raises(ValueError, match=f"^0.{asked}: {match}"):
        get_peft_model(model, ReparamConfig(target_modules=[], target_parameters=[asked], r=2))


@pytest.mark.parametrize("asked", [3, [3], "("])
def test_values_are_checked(asked: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="target_parameters"):
        ReparamConfig(target_parameters=asked)


@pytest.mark.parametrize("build", [qwen_moe, gpt_oss])
def test_only_a_compressed_model_stays_open(build: Any, tmp_path: Path) -> None:
    model = build()
    before = dict(model.named_parameters())
    config = ReparamConfig(target_modules="all-linear", target_parameters="all-experts", keep=0.5)
    statistics = calibrate(model, config, BATCHES, progress=False)
    chosen = plan(model, config, statistics, progress=False)
    assert len(chosen.modules) == len(statistics.outputs) > 16
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    small = compress(model, config, statistics, plan=chosen, progress=False).eval()
    assert small.size_report().keep <= 0.5
    expected = small(**token_inputs()).logits
    small.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    assert torch.equal(loaded(**token_inputs()).logits, expected)
    merged = loaded.merge_and_unload()
    assert names_of(merged) == list(before)
    assert all(parameter.shape == before[name].shape for name, parameter in merged.named_parameters())
    assert_close(merged(**token_inputs()).logits, expected)


def test_a_typing_error_is_told_and_takes_nothing_else() -> None:
    for asked, experts in ((["experts.gate_up_proj", "down_prj"], 8), (r".*experts_.*", 0)):
        with pytest.warns(UserWarning, match="match no parameter of the model"):
            small = get_peft_model(qwen_moe(), ReparamConfig(target_modules="all-linear", target_parameters=asked, keep=0.5))
        ranks = small.peft_config["default"].rank_pattern
        assert sum(".experts." in name for name in ranks) == experts
        assert not {"lm_head", "model"} & ranks.keys()


def test_ranks_are_named_by_parameter_or_expert() -> None:
    config = ReparamConfig(
        target_modules=[],
        target_parameters="all-experts",
        rank_pattern={"experts.down_proj": 3, r".*\.0\..*gate_up_proj\.1": 5},
    )
    ranks = get_peft_model(qwen_moe(), config).peft_config["default"].rank_pattern
    assert {rank for name, rank in ranks.items() if "down_proj" in name} == {3}
    assert ranks[f"{FIRST}.1"] == 5 != ranks[f"{FIRST}.0"]


def test_open_models_take_adapters_searches_and_pickling() -> None:
    config = ReparamConfig(target_modules="all-linear", target_parameters="all-experts", keep=0.5)
    small = get_peft_model(qwen_moe(), config).eval()
    expected = small(**token_inputs()).logits
    with pytest.warns(UserWarning, match="factorises the product of adapter"):
        small.add_adapter("second", config)
    small.set_adapter("second")
    assert small(**token_inputs()).logits.isfinite().all()
    small.set_adapter("default")
    copied = pickle.loads(pickle.dumps(small.get_base_model()))
    assert torch.equal(copied(**token_inputs()).logits, expected)
    found = search(qwen_moe(), config, BATCHES, evaluation=BATCHES[:1], tolerance=0.5, keeps=[0.5], progress=False)
    assert found.model is not None


def test_experts_that_stay_dense_do_not_keep_the_others_in_memory() -> None:
    config = ReparamConfig(
        target_modules=[], target_parameters="all-experts", exclude_modules=r".*\.0", keep=0.5, init_weights=False
    )
    model = get_peft_model(qwen_moe(), config).get_base_model()
    kept = [model.get_submodule(f"{FIRST}.{expert}") for expert in range(4)]
    dense = kept[0].weight
    assert dense.untyped_storage().nbytes() == dense.nbytes
    assert all(layer.base_layer.weight is None for layer in kept[1:])


def test_an_adapter_in_a_file_names_its_parameters(tmp_path: Path) -> None:
    config = ReparamConfig(target_modules="all-linear", target_parameters="all-experts", keep=0.5)
    get_peft_model(qwen_moe(), config).save_pretrained(tmp_path)
    saved = ReparamConfig.from_pretrained(str(tmp_path))
    assert saved.target_parameters == sorted(saved.target_parameters, key=saved.target_parameters.index)
    assert len(saved.target_parameters) == 4
    assert not any(".experts." in name for name in saved.target_modules)  # tens of thousands, in a large model
    assert config.target_parameters == "all-experts"


def test_adapters_of_other_parameters_stand_beside_each_other() -> None:
    def config(key: str) -> ReparamConfig:
        return ReparamConfig(target_modules=[], target_parameters=[f"experts.{key}"], keep=0.5, keep_base=True)

    model = qwen_moe()
    dense, names = model(**token_inputs()).logits, names_of(model)
    both = get_peft_model(model, config("down_proj"))
    both.add_adapter("other", config("gate_up_proj"))
    for adapter, key in (("other", "gate_up_proj"), ("default", "down_proj")):
        both.set_adapter(adapter)
        alone = get_peft_model(qwen_moe(), config(key))
        assert torch.equal(both(**token_inputs()).logits, alone(**token_inputs()).logits)
    layers = both.get_layer_status()
    assert len(layers) == 16
    assert {tuple(layer.available_adapters) for layer in layers} == {("default",), ("other",)}
    plain = both.unload()
    assert names_of(plain) == names
    assert_close(plain(**token_inputs()).logits, dense)


def test_adapters_of_experts_load_in_any_order(tmp_path: Path) -> None:
    outputs = {}
    for name, keep in (("large", 0.8), ("small", 0.4)):
        small = get_peft_model(gpt_oss(), ReparamConfig(target_modules=[], target_parameters="all-experts", keep=keep))
        outputs[name] = small(**token_inputs()).logits
        small.save_pretrained(tmp_path / name)
    for first, second in (("large", "small"), ("small", "large")):
        both = PeftModel.from_pretrained(gpt_oss(), tmp_path / first, adapter_name=first)
        result = both.load_adapter(tmp_path / second, adapter_name=second)
        assert not result.missing_keys
        assert not result.unexpected_keys
        for name, expected in outputs.items():
            both.set_adapter(name)
            assert torch.equal(both(**token_inputs()).logits, expected)


def test_a_weight_as_a_parameter_is_its_layer_as_a_module() -> None:
    as_module = get_peft_model(llama(), ReparamConfig(target_modules=["gate_proj"], r=4))
    as_parameter = get_peft_model(llama(), ReparamConfig(target_modules=[], target_parameters=["gate_proj.weight"], r=4))
    assert torch.equal(as_module(**token_inputs()).logits, as_parameter(**token_inputs()).logits)


class Multiplies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.param = nn.Parameter(torch.randn(6, 8))
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x @ self.param)


def test_parameters_and_modules_of_the_model_itself() -> None:
    torch.manual_seed(0)
    model, x = Multiplies(), torch.randn(3, 6)
    y = model(x)
    options = {"target_modules": [], "r": "full", "keep_base": True}
    small = get_peft_model(model, ReparamConfig(target_parameters={"param": "(d) -> (m)"}, **options))
    assert list(small.peft_config["default"].rank_pattern) == ["param.0"]
    assert_close(small(x), y)
    assert names_of(small.unload()) == ["param", "head.weight", "head.bias"]


@pytest.mark.parametrize("pattern", ["(d) -> (m)", "(d) <- (m)"])  # what the model does, and not: read, then
def test_disabled_adapters_that_are_merged_are_not_read(pattern: str) -> None:
    torch.manual_seed(0)
    model, x = Multiplies(), torch.randn(3, 6)
    y = model(x)
    config = ReparamConfig(target_modules=[], target_parameters={"param": pattern}, r=2, keep_base=True)
    small = get_peft_model(model, config)
    expected = small(x)
    small.merge_adapter()
    assert_close(small(x), expected)
    with small.disable_adapter():
        assert_close(small(x), y)
    assert_close(small(x), expected)


def test_a_pattern_for_no_parameter_takes_no_modules() -> None:
    one = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    config = ReparamConfig(target_modules=["a"], target_parameters="nothing.*", r=2)
    assert list(get_peft_model(one, config).peft_config["default"].rank_pattern) == ["a"]


ATTENTION = ["rel_attn.q", "rel_attn.k", "rel_attn.v", "rel_attn.o", "rel_attn.r"]


def test_parameters_of_a_model_are_compressed_saved_merged_and_made_standalone(tmp_path: Path) -> None:
    model = xlnet()
    expected_names = set(names_of(model))
    dense = model(**token_inputs()).logits
    config = ReparamConfig(target_modules="all-linear", target_parameters=ATTENTION, keep=0.6)
    assert_close(
        get_peft_model(xlnet(), ReparamConfig(target_modules=[], target_parameters=ATTENTION, r="full"))(
            **token_inputs()
        ).logits,
        dense,
    )
    small = compress(model, config, BATCHES, progress=False).eval()
    assert small.size_report().keep <= 0.6
    patterns = small.peft_config["default"].target_parameters
    assert patterns["transformer.layer.0.rel_attn.q"] == "(a) -> (b c)"
    assert patterns["transformer.layer.1.rel_attn.o"] == "(a) <- (b c)"
    expected = small(**token_inputs()).logits
    with torch.no_grad():
        data_free = get_peft_model(xlnet(), config).eval()(**token_inputs()).logits
    assert relative_error(expected, dense) < relative_error(data_free, dense)
    small.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(xlnet(), tmp_path / "adapter").eval()
    assert_close(loaded(**token_inputs()).logits, expected)
    small.base_model.to_standalone().save_pretrained(tmp_path / "standalone")
    assert_close(XLNetLMHeadModel.from_pretrained(tmp_path / "standalone")(**token_inputs()).logits, expected)
    merged = loaded.merge_and_unload()
    assert set(names_of(merged)) == expected_names
    assert_close(merged(**token_inputs()).logits, expected)


def test_a_pattern_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    model = xlnet()
    before = names_of(model)
    expected = r"reads it as '\(a\) -> \(b c\)'"
    for pattern, match in (("(d n) (h)", expected), ("(d) <- (n h)", expected), ("d", "name each dimension once")):
        with pytest.raises(ValueError, match=match):
            get_peft_model(model, ReparamConfig(target_modules=[], target_parameters={"rel_attn.q": pattern}))
        assert names_of(model) == before
    small = get_peft_model(model, ReparamConfig(target_modules=[], target_parameters={"rel_attn.q": "(d) (n h)"}))
    assert len(small.peft_config["default"].rank_pattern) == 2
    small.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("->", "<-"))  # of a square matrix, which fits both ways
    with pytest.raises(ValueError, match=f"{expected}.* it was changed"):
        PeftModel.from_pretrained(xlnet(), tmp_path)


@pytest.mark.parametrize(
    ("build", "parameters", "inside"),
    [
        (qwen_moe, "all-experts", "experts.down_proj.3"),
        (gpt_oss, "all-experts", "experts.gate_up_proj.0"),
        (xlnet, ATTENTION, "rel_attn.q.0"),
        (siglip, None, "attention.in_proj_weight.2"),  # of `nn.MultiheadAttention`
    ],
)
def test_modules_are_found_by_all_names_that_the_model_gives_them(
    build: Any, parameters: Any, inside: str, tmp_path: Path
) -> None:
    config = ReparamConfig(target_modules="all-linear", target_parameters=parameters, keep=0.5, init_weights=False)
    small = get_peft_model(build(), config)
    small.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    loaded.add_adapter("second", small.peft_config["default"])
    small.base_model.to_standalone().save_pretrained(tmp_path / "standalone")
    plain = (AutoModel if build is siglip else type(build())).from_pretrained(tmp_path / "standalone")
    for model in (small, loaded, plain):
        named = dict(model.named_modules())
        assert any(name.endswith(inside) for name in named)
        assert all(model.get_submodule(name) is module for name, module in named.items())
        assert all(_get_submodules(model, name)[1] is module for name, module in named.items() if name)
    merged = loaded.merge_and_unload()
    assert all(merged.get_submodule(name) is module for name, module in merged.named_modules())
    assert merged.state_dict().keys() == build().state_dict().keys()
