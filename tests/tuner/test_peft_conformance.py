"""PEFT's contract: every layer kind, form and origin × every behaviour, with the original weight dropped and with it kept.

PEFT's own suite runs against the package too: tests/run_peft_suite.py.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from support.few_bits import FEW_BITS, config_in_few_bits
from support.models import CASES, Case, bert, gpt2, gpt_oss, image_inputs, llama, qwen_moe, t5, token_inputs
from support.narrow import GROUPS, kept_neurons, narrow_config, narrow_products, narrowed
from support.tolerances import assert_close, assert_equal
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from reparam_peft import ReparamConfig, Statistics, calibrate, compress
from reparam_peft.layers import nearest
from reparam_peft.layers.kinds import layer_kind
from reparam_peft.numerics import decompositions as decompositions
from reparam_peft.numerics.decompositions import Factors
from reparam_peft.tuner.data_free import installing
from reparam_peft.tuner.layer import ReparamLayer

ROUTES = {
    "default": {},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "is_trainable": {"is_trainable": True},
    "low_cpu_mem_usage and is_trainable": {"low_cpu_mem_usage": True, "is_trainable": True},
}


@dataclass
class Way(Case):
    """A case in one form, out of `get_peft_model` or, with moved biases, out of `compress`."""

    form: str = "factors"
    calibrated: bool = False
    target_parameters: str | None = None

    def config(self, **options: Any) -> ReparamConfig:
        if self.calibrated:
            options["allocation"] = "uniform"  # so that the same targets stay dense at every `keep`
        targets = {"target_modules": self.target_modules, "target_parameters": self.target_parameters}
        return ReparamConfig(**targets, form=self.form, **{"keep": 0.5, **options})

    def compressed(self, model: nn.Module | None = None, **options: Any) -> PeftModel:
        model = self.model() if model is None else model
        if not self.calibrated:
            return get_peft_model(model, self.config(**options)).eval()
        statistics = statistics_of(self.build, self.target_modules, self.target_parameters)
        return compress(model, self.config(**options), statistics, progress=False).eval()

    def __str__(self) -> str:
        return f"{self.kind}, {self.form}{', compress' if self.calibrated else ''}"


@dataclass
class NarrowWay(Way):
    """A case whose MLPs have lost neurons; where they have biases, these are moved."""

    def compressed(self, model: nn.Module | None = None, keep: float = 0.5, **options: Any) -> PeftModel:
        return narrowed(self.model() if model is None else model, form=self.form, keep=keep, **options)

    def __str__(self) -> str:
        return f"{self.kind}, {self.form}, fewer neurons"


@dataclass
class CodedWay(Way):
    """All linear layers of a Llama, in each form that there is, with numbers in 8 and 4 bits and in the dtype of the model."""

    def config(self, **options: Any) -> ReparamConfig:
        return config_in_few_bits(self.model(), **options)

    def __str__(self) -> str:
        return f"{self.kind}, {FEW_BITS}"


def way(case: Way, form: str, calibrated: bool = False) -> Way:
    return Way(case.kind, case.build, case.target_modules, case.inputs, form, calibrated)


FORMS = [("factors", False), ("pivot", False), ("pivot", True)]
CALIBRATED = [way(CASES[1], "factors", True), *(way(CASES[number], "pivot", True) for number in (1, 2, 3))]
NARROW = [
    NarrowWay("Linear", llama, ["gate_proj", "up_proj", "down_proj"], token_inputs, "pivot"),
    NarrowWay("Conv1D", gpt2, ["c_fc", "mlp.c_proj"], token_inputs, "factors", calibrated=True),
]
EXPERTS = [
    Way("Experts", qwen_moe, [], token_inputs, "factors", target_parameters="all-experts"),
    Way("Experts", gpt_oss, [], token_inputs, "pivot", calibrated=True, target_parameters="all-experts"),
]
WITH_NEURONS = [*(way(case, form) for case in CASES for form in ("factors", "pivot")), *CALIBRATED, *EXPERTS]
WAYS = [*WITH_NEURONS, *NARROW]
CODED = CodedWay("Linear", llama, "all-linear", token_inputs)


def linear_ways(*builds: Callable[[], nn.Module]) -> list[Way]:
    """All linear layers of language models, in every form and of every origin."""
    return [Way(build.__name__, build, "all-linear", token_inputs, *form) for build in builds for form in FORMS]


@cache
def calibration_of(
    build: Callable[[], nn.Module], target_modules: tuple[str, ...] | str, target_parameters: str | None
) -> Statistics:
    generator = torch.Generator().manual_seed(0)
    if build is CASES[3].build:
        batch = {"x": torch.randn(8, *image_inputs()["x"].shape[1:], generator=generator)}
    else:
        batch = {"input_ids": torch.randint(3, 100, (8, 12), generator=generator)}
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = ReparamConfig(target_modules=targets, target_parameters=target_parameters)
    return calibrate(build(), config, [batch], progress=False)


def statistics_of(
    build: Callable[[], nn.Module], target_modules: list[str] | str, target_parameters: str | None = None
) -> Statistics:
    modules = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    return calibration_of(build, modules, target_parameters)


@pytest.fixture(params=WAYS, ids=str)
def case(request: pytest.FixtureRequest) -> Way:
    """Every layer kind in both forms, and with moved biases."""
    return request.param


@pytest.fixture(params=[*WAYS, CODED], ids=str)
def stored_case(request: pytest.FixtureRequest) -> Way:
    """And with numbers in few bits."""
    return request.param


@pytest.fixture(params=WITH_NEURONS, ids=str)
def whole_case(request: pytest.FixtureRequest) -> Way:
    """Those in which all neurons are left."""
    return request.param


@pytest.fixture
def decompositions_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A list that grows by the shape of each matrix that is decomposed."""
    shapes: list[tuple[int, ...]] = []
    factorize = decompositions.factorize

    def counted(weight: torch.Tensor, *args: Any) -> decompositions.Factors:
        shapes.append(tuple(weight.shape))
        return factorize(weight, *args)

    for module in (nearest, decompositions):
        monkeypatch.setattr(module, "factorize", counted)
    for name in ("svd", "eigh", "eigvalsh", "qr", "svdvals", "cholesky_ex", "lu_factor"):
        original = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda X, *args, _f=original, **kwargs: (shapes.append(X.shape), _f(X, *args, **kwargs))[1]
        )
    return shapes


def compressed(case: Way, **options: Any) -> PeftModel:
    return case.compressed(**options)


def masks(model: nn.Module) -> int:
    """Bytes of the masks of the pivot form and of the neurons that are left, which are no parameters."""
    masks = (".A.mask", ".kept_rows", ".kept_columns")
    return sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(masks))


def layers(model: nn.Module) -> Iterator[ReparamLayer]:
    return (module for module in model.modules() if isinstance(module, ReparamLayer))


def all_dropped(model: nn.Module) -> bool:
    found = list(layers(model))
    return bool(found) and all(one.base_weight_dropped and one.base_layer.weight is None for one in found)


def test_forward_is_of_low_rank_and_holds_no_weight(case: Way) -> None:
    small = compressed(case)
    assert all_dropped(small)
    assert not any("base_layer.weight" in name for name, _ in small.named_parameters())
    before, after = case.model(), small.size_report()
    assert sum(p.numel() for p in small.parameters()) + masks(small) == after.to_dict()["model"]["stored_parameters"]
    assert sum(p.numel() for p in before.parameters()) == after.to_dict()["model"]["dense_parameters"]
    assert case.output(small).isfinite().all()


def test_full_rank_is_the_original_function(whole_case: Way) -> None:
    assert_close(whole_case.output(compressed(whole_case, r="full")), whole_case.output(whole_case.model()))


def test_biases_are_kept(case: Way) -> None:
    original = dict(case.model().named_parameters())
    for name, one in compressed(case).base_model.model.named_modules():
        if isinstance(one, ReparamLayer):
            bias = getattr(one.base_layer, "bias", None)
            fused, _, expert = name.rpartition(".")
            own = original[f"{fused}_bias"][int(expert)] if f"{fused}_bias" in original else original.get(f"{name}.bias")
            assert (bias is None) == (own is None)
            assert bias is None or torch.equal(bias, own)
            moved = one.reparam_factors["default"].bias
            assert (moved is not None) == (case.calibrated and bias is not None)
            assert moved is None or not torch.equal(moved, bias)


def test_init_weights_false_is_not_the_identity(whole_case: Way) -> None:
    random = compressed(whole_case, r="full", init_weights=False)
    assert whole_case.output(random).isfinite().all()
    with pytest.raises(AssertionError):
        assert_close(whole_case.output(random), whole_case.output(whole_case.model()))


@pytest.mark.parametrize("keep_base", [False, True])
def test_checkpoint_loads_without_decomposition(
    stored_case: Way, keep_base: bool, tmp_path: Path, decompositions_run: list[tuple[int, ...]]
) -> None:
    saved = compressed(stored_case, keep_base=keep_base)
    saved.save_pretrained(tmp_path)
    expected = stored_case.output(saved)
    decompositions_run.clear()
    for route, options in ROUTES.items():
        loaded = PeftModel.from_pretrained(stored_case.model(), tmp_path, **options).eval()
        assert torch.equal(stored_case.output(loaded), expected)
        assert decompositions_run == []
        assert all_dropped(loaded) != keep_base
        trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert bool(trainable) == ("is_trainable" in route)
        assert all("reparam_factors" in name for name in trainable)
        assert not any(tensor.device.type == "meta" for tensor in loaded.parameters())


def test_checkpoint_holds_the_factors_and_nothing_else(case: Way, tmp_path: Path) -> None:
    saved = compressed(case)
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ranks = saved.peft_config["default"].rank_pattern
    expected = set()
    for name, rank in ranks.items():
        one = saved.get_submodule(f"base_model.model.{name}")
        size = (saved.peft_config["default"].sizes or {}).get(name, [one.out_features, one.in_features])
        as_one = size != [one.out_features, one.in_features] and rank == min(size)
        parts = ["B.weight"] + ["A.weight" if case.form == "factors" else "A.mask"] * (not as_one)
        parts += ["A.K.weight"] * (case.form == "pivot" and rank < size[0] and not as_one)
        parts += ["kept_rows"] * (size[0] < one.out_features) + ["kept_columns"] * (size[1] < one.in_features)
        parts += ["bias"] * (case.calibrated and getattr(one.base_layer, "bias", None) is not None)
        expected |= {f"base_model.model.{name}.reparam_factors.{part}" for part in parts}
    assert set(tensors) == expected
    stored = sum(tensor.numel() for tensor in tensors.values())
    assert (
        stored
        == saved.peft_config["default"].stored_parameters
        == saved.size_report().to_dict()["targets"]["stored_parameters"]
    )


@pytest.mark.parametrize("case", [c for c in [*WAYS, CODED] if c.kind != "Conv2d"], ids=str)
def test_loads_onto_a_base_on_meta(case: Way, tmp_path: Path, decompositions_run: list[tuple[int, ...]]) -> None:
    saved = compressed(case)
    saved.save_pretrained(tmp_path)
    decompositions_run.clear()
    with torch.device("meta"):
        skeleton = type(saved.get_base_model())(saved.config)
    loaded = PeftModel.from_pretrained(skeleton, tmp_path, low_cpu_mem_usage=True)
    assert decompositions_run == []
    assert all_dropped(loaded)
    for got, expected in zip(layers(loaded), layers(saved), strict=True):
        assert all(
            torch.equal(a, b)
            for a, b in zip(got.reparam_factors.parameters(), expected.reparam_factors.parameters(), strict=True)
        )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_base_on_meta_runs_once_the_rest_is_loaded(form: tuple[str, bool], tmp_path: Path) -> None:
    saved = compressed(way(CASES[0], *form))
    saved.save_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(saved.config)
    loaded = PeftModel.from_pretrained(skeleton, tmp_path, low_cpu_mem_usage=True).eval()
    base = loaded.get_base_model()
    base.load_state_dict(llama().state_dict(), strict=False, assign=True)
    base.model.rotary_emb = llama().model.rotary_emb  # its buffers are in no checkpoint
    assert torch.equal(CASES[0].output(loaded), CASES[0].output(saved))


@pytest.mark.parametrize(
    "case",
    [
        *linear_ways(llama, gpt2, bert),
        *NARROW,
        CODED,
        *(Way("Embedding", llama, ["embed_tokens", "lm_head"], token_inputs, *f) for f in FORMS),
    ],
    ids=str,
)
def test_transformers_load_adapter(case: Way, tmp_path: Path, decompositions_run: list[tuple[int, ...]]) -> None:
    saved = case.compressed()
    saved.save_pretrained(tmp_path)
    decompositions_run.clear()
    loaded = case.model()
    loaded.load_adapter(str(tmp_path))
    assert decompositions_run == []
    assert all_dropped(loaded)
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()  # in the file they start anywhere, which rounds products differently
    assert torch.equal(case.output(loaded), case.output(saved))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_auto_classes(task_type: str | None, tmp_path: Path, decompositions_run: list[tuple[int, ...]]) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    saved = get_peft_model(base, ReparamConfig(target_modules="all-linear", keep=0.5, task_type=task_type)).eval()
    saved.save_pretrained(tmp_path / "adapter")
    decompositions_run.clear()
    expected = saved(**token_inputs()).logits
    for auto in [AutoPeftModelForCausalLM] if task_type else [AutoPeftModel, AutoPeftModelForCausalLM]:
        assert torch.equal(auto.from_pretrained(tmp_path / "adapter")(**token_inputs()).logits, expected)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "adapter")(**token_inputs()).logits, expected)
    assert decompositions_run == []
    assert "import reparam_peft" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("case", [c for c in WITH_NEURONS if not c.calibrated], ids=str)
def test_direct_injection_round_trip(case: Way) -> None:
    injected = inject_adapter_in_model(case.config(), case.model())
    state = peft.get_peft_model_state_dict(injected)
    other = inject_adapter_in_model(case.config(init_weights=False), case.model())
    result = peft.set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(case.output(other), case.output(injected))


@pytest.mark.parametrize("keep_base", [False, True])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_gives_an_ordinary_model(stored_case: Way, keep_base: bool, safe_merge: bool, tmp_path: Path) -> None:
    small = compressed(stored_case, keep_base=keep_base)
    expected = stored_case.output(small)
    merged = small.merge_and_unload(safe_merge=safe_merge)
    assert_close(stored_case.output(merged), expected)
    original = stored_case.model()
    assert [type(m) for m in merged.modules()] == [type(m) for m in original.modules()]
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in original.state_dict().items()}
    if isinstance(merged, PreTrainedModel):
        merged.save_pretrained(tmp_path)
        assert torch.equal(stored_case.output(type(merged).from_pretrained(tmp_path)), stored_case.output(merged))


@pytest.mark.parametrize("keep_base", [False, True])
def test_merge_and_unmerge_restore_every_bit(stored_case: Way, keep_base: bool) -> None:
    small = compressed(stored_case, keep_base=keep_base)
    expected, state = stored_case.output(small), {k: v.clone() for k, v in small.state_dict().items()}
    small.merge_adapter()
    assert all(one.merged for one in layers(small))
    assert_close(stored_case.output(small), expected)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        small.merge_adapter()
    small.unmerge_adapter()
    assert torch.equal(stored_case.output(small), expected)
    assert state.keys() == small.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())


@pytest.mark.parametrize("keep_base", [False, True])
def test_safe_merge_refuses_nan_and_changes_nothing(case: Way, keep_base: bool) -> None:
    small = compressed(case, keep_base=keep_base)
    last = list(layers(small))[-1]
    last.reparam_factors["default"].B.weight.data.view(-1)[0] = torch.nan
    for merge in (small.merge_adapter, small.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"):
            merge(safe_merge=True)
    assert not any(one.merged for one in layers(small))
    assert len(list(layers(small))) == len(small.peft_config["default"].rank_pattern)


def test_several_adapters_from_checkpoints_switch(case: Way, tmp_path: Path, decompositions_run: list[tuple[int, ...]]) -> None:
    outputs = {}
    for name, keep in (("large", 0.5), ("small", 0.25)):
        small = compressed(case, keep=keep)
        outputs[name] = case.output(small)
        small.save_pretrained(tmp_path / name)
    decompositions_run.clear()
    both = PeftModel.from_pretrained(case.model(), tmp_path / "large", adapter_name="large")
    both.load_adapter(tmp_path / "small", adapter_name="small")
    for name in ("small", "large", "small"):
        both.set_adapter(name)
        assert torch.equal(case.output(both.eval()), outputs[name])
        assert both.active_adapters == [name]
    assert decompositions_run == []
    with pytest.raises(ValueError, match="exactly one adapter must be active"):
        both.base_model.set_adapter(["large", "small"])
    assert both.active_adapters == ["small"]
    both.save_pretrained(tmp_path / "both")
    reloaded = PeftModel.from_pretrained(case.model(), tmp_path / "both" / "small")
    assert torch.equal(case.output(reloaded), outputs["small"])
    both.delete_adapter("small")
    assert both.active_adapters == ["large"]
    assert torch.equal(case.output(both), outputs["large"])


def test_second_fresh_adapter_factorises_the_first(case: Way) -> None:
    small = compressed(case)
    expected = case.output(small)
    with pytest.warns(UserWarning, match="factorises the product of adapter 'default'"):
        small.add_adapter("again", replace(case, calibrated=False).config(r="full"))
    assert torch.equal(case.output(small), expected)
    small.set_adapter("again")
    assert_close(case.output(small), expected)


@pytest.mark.parametrize(
    ("what", "match"),
    [
        (lambda m: m.disable_adapter().__enter__(), "adapters cannot be disabled"),
        (lambda m: m.base_model.disable_adapter_layers(), "adapters cannot be disabled"),
        (lambda m: m.unload(), "base model cannot be restored"),
        (lambda m: m.delete_adapter("default"), "is the last one and cannot be deleted"),
        (lambda m: m.base_model.set_adapter([]), "exactly one adapter must be active"),
    ],
    ids=["disable", "disable layers", "unload", "delete last", "none active"],
)
def test_what_needs_the_original_weight_raises_before_changing_anything(
    case: Way, what: Callable[[PeftModel], Any], match: str
) -> None:
    small = compressed(case)
    expected = case.output(small)
    grads = [p.requires_grad for p in small.parameters()]
    with pytest.raises(ValueError, match=match) as caught:
        what(small)
    assert "keep_base=True" in str(caught.value)
    assert torch.equal(case.output(small), expected)
    assert [p.requires_grad for p in small.parameters()] == grads
    assert small.active_adapters == ["default"]
    assert small.get_model_status().enabled is True


def test_kept_base_disables_unloads_deletes_and_adds(whole_case: Way) -> None:
    case = whole_case
    original = case.output(case.model())
    small = compressed(case, keep_base=True)
    expected = case.output(small)
    check = assert_close if case.target_parameters else assert_equal  # opened experts compute in another order
    with small.disable_adapter():
        check(case.output(small), original)
    assert torch.equal(case.output(small), expected)
    small.add_adapter("full", replace(case, calibrated=False).config(r="full", keep_base=True))
    small.base_model.set_adapter(["default", "full"])
    assert_close(case.output(small), expected)  # W + (AB − W) + (W − W)
    small.merge_adapter()
    assert_close(case.output(small), expected)
    small.unmerge_adapter()
    small.set_adapter("default")
    small.delete_adapter("default")
    small.delete_adapter("full")
    check(case.output(small.base_model), original)
    again = compressed(case, keep_base=True)
    again.merge_adapter()
    unloaded = again.unload()
    assert torch.equal(case.output(unloaded), original)
    assert not list(layers(unloaded))


def test_adapter_of_other_layers_is_refused(tmp_path: Path) -> None:
    for name in ("q_proj", "k_proj"):
        get_peft_model(llama(), ReparamConfig(target_modules=[name], keep=0.5)).save_pretrained(tmp_path / name)
    first = PeftModel.from_pretrained(llama(), tmp_path / "q_proj")
    expected = first(**token_inputs()).logits
    with pytest.raises(ValueError, match=r"q_proj: adapter 'other' has no factors for this layer"):
        first.load_adapter(tmp_path / "k_proj", adapter_name="other")
    assert list(first.peft_config) == ["default"]
    assert torch.equal(first(**token_inputs()).logits, expected)


def test_dense_target_of_another_adapter_keeps_its_weight(tmp_path: Path) -> None:
    narrow = get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"], keep=0.5)).eval()
    wide = get_peft_model(llama(), ReparamConfig(target_modules=["q_proj", "v_proj"], keep=0.5)).eval()
    for name, saved in (("narrow", narrow), ("wide", wide)):
        saved.save_pretrained(tmp_path / name)
    both = PeftModel.from_pretrained(llama(), tmp_path / "narrow", adapter_name="narrow")
    both.load_adapter(tmp_path / "wide", adapter_name="wide")
    for name, saved in (("wide", wide), ("narrow", narrow)):
        both.set_adapter(name)
        assert torch.equal(both(**token_inputs()).logits, saved(**token_inputs()).logits)


def test_modules_to_save(tmp_path: Path) -> None:
    small = get_peft_model(bert(), ReparamConfig(target_modules=["query"], r=4, modules_to_save=["classifier"]))
    with torch.no_grad():
        small.classifier.modules_to_save["default"].weight.normal_()
    small.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(loaded(**token_inputs()).logits, small(**token_inputs()).logits)
    assert not torch.equal(loaded(**token_inputs()).logits, bert()(**token_inputs()).logits)


def headed(name: str) -> Callable[[], PreTrainedModel]:
    """A tiny BERT with the head of a task, whose weights are new in each model, as those of a base model's are."""

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        config = copy.deepcopy(bert().config)
        config.num_labels = 2
        return getattr(transformers, f"BertFor{name}")(config).eval()

    return build


TASKS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, torch.Tensor]]] = {
    "SEQ_CLS": (bert, {}),
    "TOKEN_CLS": (headed("TokenClassification"), {}),
    "QUESTION_ANS": (headed("QuestionAnswering"), {}),
    "FEATURE_EXTRACTION": (lambda: bert().bert, {}),
    "CAUSAL_LM": (llama, {}),
    "SEQ_2_SEQ_LM": (t5, {"decoder_input_ids": token_inputs()["input_ids"]}),
}
HEADS = {"SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}


@pytest.mark.parametrize("calibrated", [False, True], ids=["get_peft_model", "compress"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_type_trains_saves_loads_and_merges(task: str, calibrated: bool, tmp_path: Path) -> None:
    build, more = TASKS[task]
    inputs = {**token_inputs(), **more}
    config = ReparamConfig(task_type=task, target_modules="all-linear", keep=0.6)
    model = compress(build(), config, [inputs], progress=False) if calibrated else get_peft_model(build(), config)
    assert type(model) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    head = HEADS.get(task)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("reparam_factors" in name for name in trained)
    assert head is None or any(f"{head}.modules_to_save.default" in name for name in trained)
    assert head is None or not any(head in name for name in model.peft_config["default"].rank_pattern)

    def output(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs)[0]

    before = output(model.eval())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**inputs)[0].exp().mean().backward()
    optimizer.step()
    expected = output(model.eval())
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    for options in ROUTES.values():
        # Without it PEFT may leave modules that it saves whole, such as heads, on a GPU.
        loaded = PeftModel.from_pretrained(build(), tmp_path, torch_device="cpu", **options).eval()
        assert type(loaded) is type(model)
        assert torch.equal(output(loaded), expected)
    saved = (loaded.peft_config["default"].to_dict()["modules_to_save"], model.peft_config["default"].modules_to_save)
    assert saved[0] == saved[1]
    loaded.add_adapter("ref", loaded.peft_config["default"])
    loaded.set_adapter("ref")
    assert torch.equal(output(loaded), expected)
    assert_close(output(model.merge_and_unload()), expected)


def test_a_config_with_a_task_serves_two_models() -> None:
    config = ReparamConfig(task_type="TOKEN_CLS", target_modules=["query"], r=4)
    first = get_peft_model(TASKS["TOKEN_CLS"][0](), config)
    second = get_peft_model(TASKS["TOKEN_CLS"][0](), config)
    for model in (first, second):
        assert model.peft_config["default"].modules_to_save == ["classifier", "score"]


def test_status_and_counts(case: Way, capsys: pytest.CaptureFixture[str]) -> None:
    small = compressed(case)
    status = small.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.num_adapter_layers == len(small.peft_config["default"].rank_pattern)
    assert status.trainable_params == small.peft_config["default"].stored_parameters - masks(small)
    assert {one.module_type for one in small.get_layer_status()} <= {"reparam.Linear", "reparam.Conv2d", "reparam.Embedding"}
    small.print_trainable_parameters()
    assert f"trainable params: {status.trainable_params:,}" in capsys.readouterr().out


def test_training_updates_the_factors_only(case: Way) -> None:
    small = compressed(case).train()
    before = {name: value.clone() for name, value in small.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    for _ in range(2):
        result = small(**case.inputs())
        (result if isinstance(result, torch.Tensor) else result.logits).square().mean().backward()
        optimizer.step()
    for name, value in small.named_parameters():
        if not name.endswith("key.reparam_factors.default.bias"):  # a softmax does not see it
            assert torch.equal(value, before[name]) == ("reparam_factors" not in name), name
        assert (value.grad is not None) == ("reparam_factors" in name), name


@pytest.mark.parametrize("case", [*linear_ways(llama, gpt2, bert), *NARROW, CODED], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(case: Way) -> None:
    small = case.compressed()

    def gradients() -> list[torch.Tensor]:
        small.zero_grad()
        small(**token_inputs()).logits.square().mean().backward()
        return [p.grad.clone() for p in small.parameters() if p.requires_grad]

    small.train()
    for module in small.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = gradients()
    small.gradient_checkpointing_enable({"use_reentrant": False})
    for got, expected in zip(gradients(), plain, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("case", [*linear_ways(llama, gpt2), *NARROW, CODED], ids=str)
def test_generate_is_that_of_the_merged_model(case: Way) -> None:
    small = case.compressed()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = small.generate(**token_inputs(), **options)
    assert tokens.shape == (2, 20)
    assert torch.equal(small.generate(**token_inputs(), **options, use_cache=False), tokens)
    assert torch.equal(small.merge_and_unload().generate(**token_inputs(), **options), tokens)


# Each kind in one form at least.
COMPILED = ["Linear, factors", "Linear with bias, pivot", "Embedding, factors", "Conv1D, pivot, compress", "Conv2d, pivot"]


@pytest.mark.parametrize("case", [*(c for c in WAYS if str(c) in [*COMPILED, str(NARROW[0])]), CODED], ids=str)
def test_compile(case: Way) -> None:
    small = compressed(case)
    expected = case.output(small)
    torch._dynamo.reset()
    assert_close(case.output(torch.compile(small, backend="aot_eager")), expected)


def test_deepcopy_and_state_dict_round_trip(stored_case: Way) -> None:
    small = compressed(stored_case)
    twin = copy.deepcopy(small)
    assert torch.equal(stored_case.output(twin), stored_case.output(small))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    result = twin.load_state_dict(small.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(stored_case.output(twin), stored_case.output(small))


@pytest.mark.parametrize(("dtype", "low_cpu_mem_usage"), [(torch.bfloat16, False), (torch.float16, True)])
def test_half_precision_is_stored_and_loaded_in_half_precision(
    case: Way, dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    trained = case.compressed(case.model().to(dtype))
    factors = [p for n, p in trained.named_parameters() if "reparam_factors" in n]
    assert {p.dtype for p in factors} == {torch.float32}, "PEFT's users expect factors that train in float32"
    trained.save_pretrained(tmp_path)
    count = sum(p.numel() for p in factors)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 2 * count + masks(trained)
    assert trained.peft_config["default"].stored_bytes == 2 * count + masks(trained)
    assert count * 2 < os.path.getsize(tmp_path / "adapter_model.safetensors") < count * 2 + 20_000
    loaded = PeftModel.from_pretrained(case.model().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {p.dtype for n, p in loaded.named_parameters() if "reparam_factors" in n} == {dtype}
    resumed = PeftModel.from_pretrained(case.model().to(dtype), tmp_path, is_trainable=True)
    assert {p.dtype for n, p in resumed.named_parameters() if "reparam_factors" in n} == {torch.float32}
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.inputs().items()}
    half = Case(case.kind, case.build, case.target_modules, lambda: inputs)
    assert half.output(loaded).dtype == dtype
    assert_close(half.output(loaded).float(), case.output(compressed(case)), dtype)
    assert {p.dtype for p in loaded.merge_and_unload().parameters()} == {dtype}


def test_autocast(stored_case: Way) -> None:
    small = compressed(stored_case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = stored_case.output(small)
    assert_close(got.float(), stored_case.output(small), torch.bfloat16)


def text_data(labels: bool) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 100, (16, 12), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3 if labels else row} for row in rows]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("supervised", [True, False], ids=["sequence classification", "causal language model"])
def test_trainer_trains_saves_and_resumes(
    supervised: bool, form: tuple[str, bool], tmp_path: Path, decompositions_run: list[tuple[int, ...]]
) -> None:
    build, modules = (bert, ["query", "key", "value"]) if supervised else (llama, "all-linear")
    case = Way("", build, modules, token_inputs, *form)
    task_type = "SEQ_CLS" if supervised else "CAUSAL_LM"

    def trainer(steps: int) -> Trainer:
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[],
            use_cpu=True, disable_tqdm=True, logging_steps=1, seed=0, save_strategy="steps",
        )  # fmt: skip
        return Trainer(case.compressed(task_type=task_type), arguments, train_dataset=text_data(supervised))

    whole = trainer(4)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert torch.tensor(losses).isfinite().all()
    resumed = trainer(4)
    decompositions_run.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert decompositions_run == []
    for got, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, expected)
    decompositions_run.clear()
    final = PeftModel.from_pretrained(build(), tmp_path / "checkpoint-4")
    assert decompositions_run == []
    assert torch.equal(final(**token_inputs()).logits, whole.model.eval()(**token_inputs()).logits)


def test_mixed_batches_are_refused() -> None:
    small = get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"], keep=0.5))
    with pytest.raises(ValueError, match="cannot mix adapters within a batch"):
        small(**token_inputs(), adapter_names=["default", "default"])


def test_low_rank_forward_never_builds_the_matrix(case: Way) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    small = compressed(case)
    shapes = {tuple(shape) for one in layers(small) for shape in (one.weight_shape, reversed(one.weight_shape))}
    shapes |= {(one.out_features, one.in_features) for one in layers(small)}
    own = {parameter.untyped_storage().data_ptr() for parameter in small.parameters()}

    class Watch(TorchDispatchMode):
        made: set[tuple[int, ...]] = set()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in own:
                self.made.add(tuple(result.shape))
            return result

    with Watch() as watch:
        case.output(small)
    assert watch.made
    assert not watch.made & shapes


def tampered_mask(tensors: dict[str, torch.Tensor], what: str, part: str = "A.mask") -> None:
    """Spoil the first mask of a checkpoint."""
    key = next(key for key in tensors if key.endswith(part))
    mask = tensors[key].clone()
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    if what == "one more":
        bits.view(-1)[bits.view(-1).argmin()] = 1
    elif what == "one less":
        bits.view(-1)[bits.view(-1).argmax()] = 0
    elif what == "beyond the last row":
        bits.view(-1)[bits.view(-1).argmax()] = 0
        bits[-1, -1] = 1
    mask = (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    changed = {"too long": torch.cat([mask, mask[:1] * 0]), "another dtype": mask.float(), "int64": mask.long()}
    tensors[key] = changed.get(what, mask)
    if what == "missing":
        del tensors[key]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "what", ["one more", "one less", "beyond the last row", "too long", "another dtype", "int64", "missing"]
)
def test_tampered_masks_are_refused_and_the_base_loses_nothing(what: str, route: str, tmp_path: Path) -> None:
    case = way(CASES[3], "pivot")  # 12 outputs: 4 bits of the second byte are of no row
    case.compressed().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tampered_mask(tensors, what)
    save_file(tensors, path, metadata={"format": "pt"})
    base = case.model()
    expected = case.output(base)
    with pytest.raises(ValueError, match=r"conv0|A\.mask"):
        PeftModel.from_pretrained(base, tmp_path, **ROUTES[route])
    assert torch.equal(case.output(base), expected)
    assert not list(layers(base))


@pytest.mark.parametrize("what", ["one more", "one less"])
def test_tampered_masks_are_refused_by_transformers_and_beside_another_adapter(what: str, tmp_path: Path) -> None:
    case = way(CASES[0], "pivot")
    small = case.compressed()
    small.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tampered_mask(tensors, what)
    save_file(tensors, path, metadata={"format": "pt"})
    base = case.model()
    with pytest.raises(ValueError, match=r"and the rank is 25"):
        base.load_adapter(str(tmp_path))
    expected = case.output(small)
    with pytest.raises(ValueError, match="rows as pivots, and the rank is"):
        small.load_adapter(tmp_path, adapter_name="other")
    assert list(small.peft_config) == ["default"]
    assert torch.equal(case.output(small), expected)


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_the_merged_model_has_zeros_where_neurons_are_left_out(build: Callable[[], PreTrainedModel]) -> None:
    small, base = narrowed(build()), build()
    products = narrow_products(base, GROUPS[type(base).__name__])
    merged = copy.deepcopy(small).merge_and_unload(safe_merge=True)
    for name, product in products.items():
        W = layer_kind(base.get_submodule(name)).matrix(merged.get_submodule(name).weight)
        rows = torch.arange(len(W)) if product.rows is None else product.rows
        columns = torch.arange(W.shape[1]) if product.columns is None else product.columns
        A, B = product.factors if isinstance(product.factors, Factors) else product.factors.factors()
        assert_close(W[rows][:, columns], A @ B)
        assert ((W != 0).any(1).sum(), (W != 0).any(0).sum()) == (len(rows), len(columns))
        if product.bias is not None:
            bias = merged.get_submodule(name).bias
            assert torch.equal(bias[rows], product.bias)
            assert (bias != 0).sum() == len(rows)
    with torch.no_grad():
        assert_close(merged(**token_inputs()).logits, small(**token_inputs()).logits)


def test_neurons_that_nothing_reads_are_left_out_without_loss() -> None:
    base = llama()
    for number, (_, consumer) in enumerate(GROUPS["LlamaForCausalLM"]):
        gone = torch.ones(160, dtype=torch.bool)
        gone[kept_neurons(160, number)] = False
        base.get_submodule(consumer).weight.data[:, gone] = 0
    expected = CASES[0].output(base)
    assert_close(CASES[0].output(narrowed(base, keep=1.0)), expected)


def test_what_has_lost_neurons_is_injected_directly_and_gets_others_by_its_state() -> None:
    products = narrow_products(llama(), GROUPS["LlamaForCausalLM"])
    with installing(products):
        injected = inject_adapter_in_model(narrow_config(products), llama())

    def first(indices: torch.Tensor | None) -> torch.Tensor | None:
        return None if indices is None else torch.arange(len(indices))

    others = {name: one._replace(rows=first(one.rows), columns=first(one.columns)) for name, one in products.items()}
    with installing(others):
        other = inject_adapter_in_model(narrow_config(products), llama())
    result = peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(injected))
    assert not result.unexpected_keys
    assert torch.equal(CASES[0].output(other), CASES[0].output(injected))
    for one, same in zip(layers(other), layers(injected), strict=True):
        assert torch.equal(one.dense_matrix("default"), same.dense_matrix("default")), "so are the neurons that are left"


def test_adapters_of_other_sizes_switch_as_wholes_and_are_not_added_up() -> None:
    case, original = NARROW[1], NARROW[1].output(gpt2())
    small = case.compressed(keep_base=True)
    expected = case.output(small)
    with small.disable_adapter():
        assert torch.equal(case.output(small), original)
    small.add_adapter("other", ReparamConfig(target_modules=case.target_modules, r="full", keep_base=True))
    small.add_adapter("same", small.peft_config["default"])
    for name, output in (("other", original), ("same", expected), ("default", expected)):
        small.set_adapter(name)
        assert_close(case.output(small), output)
    for refused in (
        lambda: small.base_model.set_adapter(["default", "other"]),
        lambda: small.merge_adapter(["default", "other"]),
    ):
        with pytest.raises(ValueError, match=r"'default' has lost neurons, so that its outputs or inputs are others"):
            refused()
    assert small.active_adapters == ["default"]
    assert torch.equal(case.output(small), expected)
    assert torch.equal(case.output(small.unload()), original)


def test_which_neurons_are_left_is_not_made_up(tmp_path: Path) -> None:
    small = NARROW[0].compressed()
    small.save_pretrained(tmp_path)
    waiting = get_peft_model(llama(), ReparamConfig.from_pretrained(tmp_path))
    with pytest.raises(RuntimeError, match="never loaded"):
        NARROW[0].output(waiting.eval())
    waiting.load_state_dict(small.state_dict())
    assert torch.equal(NARROW[0].output(waiting), NARROW[0].output(small))
    fresh = copy.deepcopy(small.peft_config["default"])
    fresh.keep = 0.4
    with pytest.raises(ValueError, match=r"`sizes` says that modules have lost neurons, .* and not which"):
        get_peft_model(llama(), fresh)


@pytest.mark.parametrize(
    ("what", "part", "route"),
    [
        *(("one more", "kept_rows", route) for route in ROUTES),
        *((what, "kept_columns", "default") for what in ("one less", "too long", "another dtype", "missing")),
    ],
)
def test_tampered_masks_of_neurons_are_refused(what: str, part: str, route: str, tmp_path: Path) -> None:
    NARROW[0].compressed().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tampered_mask(tensors, what, part)
    save_file(tensors, path, metadata={"format": "pt"})
    base = llama()
    with pytest.raises(ValueError, match=rf"mlp\.(gate|down)_proj.*{part}"):
        PeftModel.from_pretrained(base, tmp_path, **ROUTES[route])
    assert not list(layers(base))
    assert torch.equal(NARROW[0].output(base), NARROW[0].output(llama()))
    if what == "one more":
        with pytest.raises(ValueError, match=r"are left|the rank is"):
            base.load_adapter(str(tmp_path))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fc1": [30, 20]}, "smaller, got"),
        ({"fc1": [31, 20]}, "smaller, got"),
        ({"conv0": [6, 27]}, "has no neurons that could be left out"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, list[int]], message: str) -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(20, 30), "conv0": nn.Conv2d(3, 12, 3)})
    config = ReparamConfig(target_modules=list(sizes), rank_pattern=dict.fromkeys(sizes, 4), sizes=sizes)
    with pytest.raises(ValueError, match=message), installing({}):
        get_peft_model(model, config)
