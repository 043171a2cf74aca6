"""`retruncate`: the tail of the spectrum, the budget, PEFT's contract afterwards, and what is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.compressing import TEXT, batches_of, layers
from support.model_state import assert_same_model
from support.models import Case, bert, byte_tokenizer, convnet, gpt2, llama, token_inputs
from support.narrow import narrowed
from support.tolerances import assert_close, relative_error
from torch import Tensor, nn

from reparam_peft import ReparamConfig, Statistics, compress, self_written
from reparam_peft.calibration import self_written as text_of_model
from reparam_peft.calibration.gather import gather_statistics
from reparam_peft.calibration.statistics import weight_norm
from reparam_peft.compression import truncation as truncation
from reparam_peft.compression.truncation import retruncate
from reparam_peft.layers.factorized import FactorizedModule


def trained(model: PeftModel, amount: float = 0.1) -> PeftModel:
    """The model with all its trainable parameters moved, as training would: products are no longer projections of W."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(amount * parameter.std(correction=0) * noise)
    return model.eval()


def adapted(model: nn.Module, target_modules: Any = "all-linear", keep: float = 0.8, **options: Any) -> PeftModel:
    return trained(get_peft_model(model, ReparamConfig(target_modules=target_modules, keep=keep, **options)))


def calibrated(case: Case, keep: float = 0.8, **options: Any) -> PeftModel:
    config = ReparamConfig(target_modules=case.target_modules, keep=keep, rank_multiple=2, ceiling=0.95, **options)
    return trained(compress(case.model(), config, batches_of(case), progress=False))


def products(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    found = {name: layer.reparam_factors[adapter_name].factors for name, layer in layers(model).items()}
    return {name: factors.A.detach().double() @ factors.B.detach().double() for name, factors in found.items()}


def ranks(model: PeftModel, adapter_name: str = "default") -> dict[str, int]:
    return dict(model.peft_config[adapter_name].rank_pattern)


def snapshot(model: PeftModel) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[int]]:
    configs = {name: copy.deepcopy(vars(config)) for name, config in model.peft_config.items()}
    return {k: v.clone() for k, v in model.state_dict().items()}, configs, [id(p) for p in model.parameters()]


def assert_unchanged(model: PeftModel, before: tuple[Any, ...]) -> None:
    state, configs, identities = snapshot(model)
    assert state.keys() == before[0].keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, before[0][name]), name
    assert configs == before[1]
    assert identities == before[2]


def output_error(model: PeftModel, outputs: list[Tensor]) -> float:
    """Summed squares over the calibration batches."""
    with torch.no_grad():
        got = [model(**batch) for batch in TEXT]
    return sum(float((a.logits - b).double().square().sum()) for a, b in zip(got, outputs, strict=True))


# Without data


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_error_is_the_tail_of_the_spectrum(case: Case, form: str) -> None:
    model = adapted(case.model(), case.target_modules, form=form)
    before, present = products(model), ranks(model)
    assert retruncate(model, 0.4) is model
    for name, M in products(model).items():
        rank = ranks(model)[name]
        assert rank == layers(model)[name].r["default"] == torch.linalg.matrix_rank(M, rtol=1e-6)
        assert rank < present[name]
        tail = torch.linalg.svdvals(before[name])[rank:].norm()
        assert abs(float((M - before[name]).norm() - tail)) <= 1e-5 * float(before[name].norm()), name


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("keep", [0.15, 0.3, 0.6])
def test_the_budget_is_met_and_no_single_rank_more_fits(case: Case, form: str, keep: float, tmp_path: Path) -> None:
    model = adapted(case.model(), case.target_modules, form=form)
    present = ranks(model)
    retruncate(model, keep)
    report, config = model.size_report(), model.peft_config["default"]
    assert report.keep <= keep == config.keep
    assert (config.r, config.form) == (None, form)
    stored = {matrix.name: matrix for matrix in report.matrices}
    left = keep * config.dense_parameters - config.stored_parameters
    for name, rank in ranks(model).items():
        out_features, in_features = stored[name].shape
        across = out_features + in_features - (2 * rank + 1 if form == "pivot" else 0)
        assert 1 <= rank <= present[name]
        assert rank == present[name] or across > left
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    dense = sum(matrix.dense_parameters for matrix in report.matrices if matrix.rank is None)
    assert sum(tensor.numel() for tensor in tensors.values()) + dense == config.stored_parameters


def test_every_matrix_keeps_the_same_fraction_of_what_it_stored() -> None:
    model = adapted(llama(hidden_size=96, intermediate_size=256))
    before = {matrix.name: matrix for matrix in model.size_report().matrices}
    retruncate(model, 0.4)
    for matrix in model.size_report().matrices:
        across = sum(matrix.shape)
        assert abs(matrix.stored_parameters - before[matrix.name].stored_parameters / 2) <= 1.5 * across


def test_twice_is_once() -> None:
    """Eckart & Young: the truncation of a truncation, where the ranks agree."""
    pattern = {"q_proj": 24, "k_proj": 16, "v_proj": 16, "o_proj": 24, "gate_proj": 40, "up_proj": 40, "down_proj": 40}
    once, twice = (adapted(llama().double(), rank_pattern=pattern) for _ in range(2))
    half = once.size_report().keep / 2
    retruncate(once, half / 2)
    retruncate(retruncate(twice, half), half / 2)
    assert ranks(once) == ranks(twice)
    for name, M in products(once).items():
        assert relative_error(products(twice)[name], M) < 1e-10


@pytest.mark.parametrize("with_data", [False, True])
def test_a_full_rank_model_can_be_truncated(with_data: bool) -> None:
    """`r="full"` stores more than the dense matrices; what is then trained and truncated fits, and nothing is dense."""
    model = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", r="full"))
    assert model.size_report().keep > 1
    assert retruncate(model, 1.0, TEXT if with_data else None, progress=False).size_report().keep <= 1
    assert not model.size_report().dense_modules
    if with_data:
        return
    expected = {name: torch.linalg.svdvals(module.weight.double()) for name, module in llama().named_modules()
                if name in ranks(model)}  # fmt: skip
    for name, M in products(model).items():
        rank = ranks(model)[name]
        assert_close(torch.linalg.svdvals(M)[:rank].float(), expected[name][:rank].float())


def test_what_is_stored_already_changes_nothing() -> None:
    model = adapted(llama())
    before = snapshot(model)
    assert retruncate(model, model.size_report().keep) is model
    assert retruncate(model, model.size_report().keep, TEXT, progress=False) is model
    assert_unchanged(model, before)


def test_a_matrix_whose_rank_stays_keeps_its_factors_to_the_bit() -> None:
    model = adapted(nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False)), ["0", "1"], keep=0.5)
    module = layers(model)["0"].reparam_factors["default"]
    stored = model.size_report().to_dict()["targets"]["stored_parameters"]
    retruncate(model, (stored - 80) / 3200)  # one rank of one of the two
    assert sorted(ranks(model).values()) == [9, 10]
    kept = next(name for name, rank in ranks(model).items() if rank == 10)
    assert kept != "0" or layers(model)["0"].reparam_factors["default"] is module
    assert sum(p.numel() for p in layers(model)[kept].reparam_factors.parameters()) == 800


def test_dense_targets_stay_dense_and_count() -> None:
    dense = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    model = adapted(llama(), dense_modules=dense, keep=0.9)
    weights = [model.get_base_model().get_submodule(name).weight.clone() for name in dense]
    retruncate(model, 0.4)
    assert model.peft_config["default"].dense_modules == dense == model.size_report().dense_modules
    assert 0.38 < model.size_report().keep <= 0.4
    for name, weight in zip(dense, weights, strict=True):
        assert torch.equal(model.get_base_model().get_submodule(name).weight, weight)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"20,480 in targets that are dense and stay so, {', '.join(dense)}"):
        retruncate(model, 0.2)
    assert_unchanged(model, before)


# With data


def test_output_error_on_the_calibration_batches_is_the_least() -> None:
    """At one rank: with the inputs' Gram alone the whitened truncation is the optimum, and the plain one is not."""
    torch.manual_seed(0)
    x = torch.randn(200, 24) @ torch.diag(torch.logspace(0, -2, 24)) @ torch.linalg.qr(torch.randn(24, 24)).Q
    config = {"input_metric": "gram", "output_metric": "none", "shrinkage": 0.0}

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    plain, whitened = (adapted(Net(nn.Linear(24, 32, bias=False), nn.Tanh(), nn.Linear(32, 4)), ["0"]) for _ in range(2))
    for field, value in config.items():
        setattr(whitened.peft_config["default"], field, value)
    M = products(plain)["0"]
    whitened.load_state_dict(plain.state_dict())
    retruncate(plain, 0.4)
    retruncate(whitened, 0.4, [{"x": x}], progress=False)
    assert ranks(plain) == ranks(whitened) == {"0": 5}
    errors = [float(((products(model)["0"] - M) @ x.double().mT).norm()) for model in (plain, whitened)]
    tail = torch.linalg.svdvals(M @ x.double().mT)[5:].norm()
    assert errors[1] <= errors[0]
    assert abs(errors[1] - float(tail)) <= 1e-4 * float(tail)
    assert whitened.peft_config["default"].method == "whitened"


def test_ranks_by_loss_cost_less_on_the_calibration_batches_than_none() -> None:
    plain, informed = (calibrated(Case("", bert, ["query", "key", "value", "dense"], token_inputs)) for _ in range(2))
    with torch.no_grad():
        outputs = [plain(**batch).logits for batch in TEXT]
    retruncate(plain, 0.4)
    retruncate(informed, 0.4, TEXT, progress=False)
    assert output_error(informed, outputs) < output_error(plain, outputs)


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_calibrated_truncation_meets_the_budget_and_raises_no_rank(case: Case, form: str, tmp_path: Path) -> None:
    model = calibrated(case, form=form)
    present = ranks(model)
    dense = model.peft_config["default"].dense_modules
    retruncate(model, 0.5, batches_of(case), seed=3, progress=False)
    config = model.peft_config["default"]
    assert model.size_report().keep <= config.keep == 0.5
    assert model.size_report().to_dict()["targets"]["stored_parameters"] == config.stored_parameters
    assert config.dense_modules == dense
    assert all(rank <= present[name] for name, rank in ranks(model).items())
    assert ranks(model).keys() == present.keys()
    assert (config.method, config.allocation, config.form, config.seed) == ("whitened", "loss", form, 3)
    assert config.calibration_tokens > 0 < config.gradient_tokens
    assert config.predicted_loss > 0
    assert_contract(case, model, tmp_path)


def test_truncating_an_exact_reparameterisation_is_compressing() -> None:
    options = {"target_modules": "all-linear", "keep": 0.5, "form": "factors", "rank_multiple": 2, "ceiling": 0.999}
    expected = compress(llama(), ReparamConfig(**options), TEXT, progress=False)
    model = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", r="full"))
    config = model.peft_config["default"]
    config.rank_multiple, config.ceiling = 2, 0.999
    retruncate(model, 0.5, TEXT, progress=False)
    assert ranks(model) == ranks(expected)
    assert config.predicted_loss == pytest.approx(expected.peft_config["default"].predicted_loss, rel=1e-3)
    for name, M in products(model).items():
        assert relative_error(M, products(expected)[name]) < 1e-3


def test_ranks_that_are_no_multiple_are_lowered_or_stay() -> None:
    model = adapted(llama(), rank_pattern={"q_proj": 13, "k_proj": 5, "v_proj": 5, "o_proj": 13}, keep=0.9, form="pivot")
    present = ranks(model)
    retruncate(model, model.size_report().keep * 0.93, TEXT, progress=False)
    assert all(rank <= present[name] for name, rank in ranks(model).items())
    assert any(rank == present[name] and rank % 8 for name, rank in ranks(model).items())


def test_moved_biases_preserve_the_mean_output(case: Case) -> None:
    model = calibrated(case)
    biases = {name: layer.reparam_factors["default"].bias for name, layer in layers(model).items()}
    base, modules = model.get_base_model(), layers(model)
    statistics = gather_statistics(base, modules, batches_of(case), progress=False)
    before, old = products(model), {name: bias if bias is None else bias.detach().double() for name, bias in biases.items()}
    retruncate(model, 0.5, statistics, progress=False)
    for name, M in products(model).items():
        bias = modules[name].reparam_factors["default"].bias
        assert (bias is None) == (old[name] is None)
        if bias is not None:
            mean = statistics.mean(name)
            assert relative_error(M @ mean + bias.double(), before[name] @ mean + old[name]) < 1e-4


def test_statistics_serve_as_batches_do_and_are_checked(tmp_path: Path) -> None:
    case = Case("", llama, "all-linear", token_inputs)
    first = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]  # from which gradients flow
    one, two = (calibrated(case, dense_modules=first) for _ in range(2))
    dense = [one.get_base_model().get_submodule(name) for name in one.peft_config["default"].dense_modules]
    statistics = gather_statistics(one.get_base_model(), layers(one), TEXT, progress=False, starts=dense)
    statistics.save(tmp_path / "statistics.safetensors")
    other = calibrated(case, keep=0.7)
    before = snapshot(other)
    with pytest.raises(ValueError, match="they are of another model"):
        retruncate(other, 0.5, statistics)
    assert_unchanged(other, before)
    retruncate(one, 0.2, Statistics.load(tmp_path / "statistics.safetensors"), progress=False)
    retruncate(two, 0.2, TEXT, progress=False)
    assert ranks(one) == ranks(two)
    assert ranks(one)["model.layers.0.self_attn.o_proj"] < 48
    for name, M in products(one).items():
        assert relative_error(M, products(two)[name]) < 1e-4


def test_statistics_of_factorised_layers_are_those_of_the_layers(case: Case) -> None:
    model = get_peft_model(case.model(), ReparamConfig(target_modules=case.target_modules, r="full")).eval()
    plain = case.model()
    names = layers(model)
    expected = gather_statistics(plain, {name: plain.get_submodule(name) for name in names}, batches_of(case), progress=False)
    got = gather_statistics(model.get_base_model(), names, batches_of(case), progress=False)
    assert got.reads == expected.reads
    assert all(got.input_rows(n) == expected.input_rows(n) and got.output_rows(n) == expected.output_rows(n) for n in names)
    for name in names:
        assert relative_error(got.gram(name), expected.gram(name)) < 1e-4
        assert relative_error(got.fisher(name), expected.fisher(name)) < 1e-3
        assert got.weight_norms[name] == pytest.approx(expected.weight_norms[name], rel=1e-5)
    got.check(names, gradients=True)


def test_norms_of_factorised_layers_are_of_what_they_compute_with() -> None:
    """One adapter is its product; two beside a kept W are W + Σ (A_i B_i − W), and none is W."""
    model = adapted(llama().double(), ["q_proj"], keep_base=True)
    model.add_adapter("second", ReparamConfig(target_modules=["q_proj"], keep=0.4, keep_base=True))
    name, layer = next(iter(layers(model).items()))
    W, (one, two) = layer.base_layer.weight, (products(model, adapter)[name] for adapter in ("default", "second"))
    assert weight_norm(layer) == pytest.approx(float(one.norm()))
    model.base_model.set_adapter(["default", "second"])
    assert weight_norm(layer) == pytest.approx(float((one + two - W).norm()))
    layer._active_adapter = []
    assert weight_norm(layer) == pytest.approx(float(W.norm()))


# PEFT's contract, afterwards


def assert_contract(case: Case, model: PeftModel, folder: Path) -> None:
    expected = case.output(model.eval())
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(case.model(), folder)
    assert_close(case.output(loaded), expected)
    assert ranks(loaded) == ranks(model)
    assert loaded.size_report() == model.size_report()
    again = PeftModel.from_pretrained(case.model(), folder, is_trainable=True, low_cpu_mem_usage=True)
    assert_close(case.output(again.eval()), expected)
    if hasattr(model.get_base_model(), "generate") and model.get_base_model().can_generate():
        inputs = case.inputs()["input_ids"][:, :4]
        assert model.generate(input_ids=inputs, max_new_tokens=3).shape == (2, 7)
    assert_close(case.output(model.merge_and_unload()), expected, torch.float16)


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_saves_loads_generates_and_merges(case: Case, form: str, tmp_path: Path) -> None:
    model = adapted(case.model(), case.target_modules, form=form)
    model.peft_config["default"].evaluation = {"perplexity": 20.0}
    retruncate(model, 0.5)
    assert model.peft_config["default"].evaluation is None
    assert not any(module.training for module in model.modules())
    assert_contract(case, model, tmp_path)


def test_moved_biases_and_calibrated_models_are_truncated_without_data(case: Case, tmp_path: Path) -> None:
    model = calibrated(case)
    biases = {n: layer.reparam_factors["default"].bias for n, layer in layers(model).items()}
    retruncate(model, 0.5)
    config = model.peft_config["default"]
    assert (config.method, config.allocation, config.form, config.predicted_loss) == ("svd", "uniform", "pivot", None)
    for name, layer in layers(model).items():
        assert (biases[name] is None) == (layer.reparam_factors["default"].bias is None)
        if biases[name] is not None:
            assert torch.equal(biases[name], layer.reparam_factors["default"].bias)
            assert biases[name].data_ptr() != layer.reparam_factors["default"].bias.data_ptr(), "an old optimizer may step it"
    assert_contract(case, model, tmp_path)


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_master_weights_stay_float32_above_a_bfloat16_base(form: str, with_data: bool, tmp_path: Path) -> None:
    model = adapted(llama().bfloat16(), form=form).train()
    before = products(model)
    layers(model)["model.layers.0.mlp.up_proj"].reparam_factors["default"].requires_grad_(False)
    retruncate(model, 0.5, TEXT if with_data else None, progress=False)
    for name, layer in layers(model).items():
        module = layer.reparam_factors["default"]
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert all(p.requires_grad != (name == "model.layers.0.mlp.up_proj") for p in module.parameters())
        assert all(m.training for m in module.modules())
        if not with_data:
            tail = torch.linalg.svdvals(before[name])[layer.r["default"] :].norm()
            error = (products(model)[name] - before[name]).norm()
            assert abs(float(error - tail)) <= 1e-5 * float(before[name].norm()), "no rounding to bfloat16"
    assert model.size_report().matrices[0].bytes_per_parameter == 2
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").popitem()[1].dtype in (torch.bfloat16, torch.uint8)
    loaded = PeftModel.from_pretrained(llama().bfloat16(), tmp_path)
    assert {p.dtype for p in layers(loaded)["model.layers.0.mlp.up_proj"].reparam_factors.parameters()} == {torch.bfloat16}
    retruncate(loaded, 0.3)
    assert {p.dtype for p in layers(loaded)["model.layers.0.mlp.up_proj"].reparam_factors.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in loaded.parameters() if p.dtype == torch.bfloat16 and p.ndim == 2)


def test_only_the_named_adapter_changes(tmp_path: Path) -> None:
    model = adapted(llama(), keep=0.6)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other", is_trainable=True)
    default, before = products(model), {k: v.clone() for k, v in model.state_dict().items() if ".other." in k}
    retruncate(model, 0.3, adapter_name="default")
    assert ranks(model, "other") == ranks(PeftModel.from_pretrained(llama(), tmp_path))
    assert all(torch.equal(tensor, before[k]) for k, tensor in model.state_dict().items() if ".other." in k)
    model.set_adapter("other")
    assert model.size_report().keep > 0.5
    retruncate(model, 0.4)
    assert (model.size_report("default").keep <= 0.3) < model.size_report("other").keep + 1 <= 1.4
    for name, M in products(model, "other").items():
        rank = ranks(model, "other")[name]
        assert abs(float((M - default[name]).norm() - torch.linalg.svdvals(default[name])[rank:].norm())) < 1e-4
    with pytest.raises(ValueError, match=r"active are \['other'\]; call `model.set_adapter\('default'\)`"):
        retruncate(model, 0.2, TEXT, adapter_name="default")


@pytest.mark.parametrize("with_data", [False, True])
def test_a_kept_base_stays(with_data: bool) -> None:
    """It is the product that is truncated, not W."""
    model = adapted(llama(), keep_base=True)
    before = products(model)
    retruncate(model, 0.5, TEXT if with_data else None, progress=False)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**token_inputs()).logits, llama()(**token_inputs()).logits)
        if with_data:
            with pytest.raises(ValueError, match=r"active are \[\]"):
                retruncate(model, 0.3, TEXT)
    for name, M in products(model).items():
        rank = ranks(model)[name]
        tail = torch.linalg.svdvals(before[name])[rank:].norm()
        error, slack = float((M - before[name]).norm()), 1e-5 * float(before[name].norm())
        assert error >= float(tail) - slack
        assert with_data or error <= float(tail) + slack


# Schedules


@pytest.mark.parametrize("with_data", [False, True])
def test_prune_train_prune(with_data: bool) -> None:
    model = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", keep=0.9, form="pivot"))
    labels = token_inputs()["input_ids"]
    data = TEXT if with_data else None

    def train(steps: int) -> list[float]:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(steps):
            loss = model(**token_inputs(), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        return losses

    model.train()
    runs = [train(6)]
    for keep in (0.7, 0.5):
        retruncate(model, keep, data, progress=False)
        assert model.training
        runs.append(train(6))
    assert all(run[-1] < run[0] for run in runs)
    assert runs[2][-1] < runs[0][0]
    assert model.size_report().keep <= 0.5


# What goes wrong


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
def test_a_failure_midway_leaves_the_model_as_it_was(
    with_data: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(bert(), ["query", "key", "dense"], form="pivot").train()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    calls = itertools.count()
    original = truncation._module

    def failing(*args: Any) -> nn.Module:
        if next(calls) == 3:
            raise error("midway")
        return original(*args)

    monkeypatch.setattr(truncation, "_module", failing)
    with pytest.raises(error, match="midway"):
        retruncate(model, 0.5, TEXT if with_data else None, progress=False)
    assert_unchanged(model, before)
    assert [module.training for module in model.modules()] == modes


def merged(model: PeftModel) -> None:
    model.merge_adapter()


def spoiled(model: PeftModel) -> None:
    layers(model)["model.layers.1.mlp.up_proj"].reparam_factors["default"].B.weight.data[0, 0] = torch.nan


def hooked(model: PeftModel) -> None:
    layers(model)["model.layers.1.mlp.up_proj"].reparam_factors["default"].A.register_forward_hook(lambda *args: None)


def with_lora(model: PeftModel) -> None:
    module = layers(model)["model.layers.1.mlp.up_proj"].reparam_factors["default"]
    module.A = get_peft_model(nn.Sequential(module.A), LoraConfig(target_modules=["0"])).base_model.model[0]


@pytest.mark.parametrize(
    ("keep", "options", "spoil", "error", "message"),
    [
        (0.0, {}, None, ValueError, r"`keep` must be in \(0, 1\].*got 0.0"),
        (1.5, {}, None, ValueError, r"`keep` must be in \(0, 1\].*got 1.5"),
        ("0.5", {}, None, TypeError, r"`keep` must be a number in \(0, 1\]"),
        (0.9, {}, None, ValueError, r"at most what is stored now, 0.\d+ \([\d,]+ of 86,016 parameters\), got 0.9"),
        (0.001, {}, None, ValueError, r"allows 86 parameters, and the least that can be stored is 2,240: rank 1.*Raise `keep`"),
        (0.5, {"adapter_name": "no"}, None, ValueError, r"must be one of \['default'\], got 'no'"),
        (0.5, {"batches": []}, None, ValueError, "at least one batch"),
        (0.5, {"batches": [{"no": torch.ones(1)}]}, None, ValueError, "does not accept batch 0"),
        (0.5, {"batches": Statistics()}, None, ValueError, "do not hold this module"),
        (0.5, {}, merged, ValueError, r"adapters \['default'\] are merged; call `model.unmerge_adapter\(\)`"),
        (0.5, {}, spoiled, ValueError, r"layers.1.mlp.up_proj: the factors contain NaN"),
        (0.5, {}, hooked, ValueError, r"layers.1.mlp.up_proj: its factors have hooks"),
        (0.5, {}, with_lora, ValueError, r"layers.1.mlp.up_proj: its factors are wrapped.*LoRA"),
    ],
)
def test_what_is_refused_changes_nothing(
    keep: Any, options: dict[str, Any], spoil: Callable[[PeftModel], None] | None, error: type[Exception], message: str
) -> None:
    model = adapted(llama())
    if spoil is not None:
        spoil(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        retruncate(model, keep, **options)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[k], before[k], rtol=0, atol=0, equal_nan=True) for k in before)


def test_other_models_are_refused() -> None:
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    for model in (llama(), lora, adapted(convnet(), ["conv0"]).get_base_model()):
        with pytest.raises(TypeError, match=r"must be a PeftModel of a ReparamConfig.*`compress`"):
            retruncate(model, 0.5)


def test_factors_that_were_never_loaded_are_refused(tmp_path: Path) -> None:
    adapted(llama()).save_pretrained(tmp_path)
    model = get_peft_model(llama(), ReparamConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="the factors of adapter 'default' were never loaded"):
        retruncate(model, 0.5)


def test_several_active_adapters_need_a_name() -> None:
    model = adapted(llama(), keep_base=True)
    model.add_adapter("second", ReparamConfig(target_modules="all-linear", keep=0.6, keep_base=True))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"must be given.*\['default', 'second'\]"):
        retruncate(model, 0.4)
    retruncate(model, 0.4, adapter_name="second")
    assert model.size_report("second").keep <= 0.4 < model.size_report("default").keep


def test_text_that_the_model_writes_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_of_model, "WINDOWS", 4)
    monkeypatch.setattr(text_of_model, "LENGTH", 16)
    own, given = adapted(llama()), adapted(llama())
    batches = self_written(given, byte_tokenizer(), 4, 16, batch_size=2, progress=False)
    retruncate(own, 0.5, "self", tokenizer=byte_tokenizer(), progress=False)
    assert_same_model(retruncate(given, 0.5, batches, progress=False), own)


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize(("make", "form"), [(llama, "pivot"), (gpt2, "factors"), (bert, "pivot")])
def test_what_has_lost_neurons_keeps_its_size_and_lowers_its_ranks(
    make: Callable[[], nn.Module], form: str, with_data: bool, tmp_path: Path
) -> None:
    model = trained(narrowed(make(), form=form))
    config, present, before = model.peft_config["default"], ranks(model), products(model)
    sizes, left = config.sizes, {n: (f.rows, f.columns) for n, f in modules_of(model).items()}
    keep = 0.7 * model.size_report().keep
    retruncate(model, keep, TEXT if with_data else None, progress=False)
    assert 0.8 * keep <= model.size_report().keep <= keep
    assert config.sizes == sizes
    lowered = {name for name, rank in ranks(model).items() if rank < present[name]}
    assert {name for name, module in modules_of(model).items() if module.form == "dense"} == {
        name for name, rank in ranks(model).items() if rank == min(sizes[name])
    }
    assert lowered & {name for name, rank in present.items() if rank == min(sizes[name])}, "of a matrix stored as it is, too"
    for name, module in modules_of(model).items():
        assert all(a is b is None or torch.equal(a, b) for a, b in zip((module.rows, module.columns), left[name], strict=True))
        assert name in lowered or torch.equal(products(model)[name], before[name])
        assert module.form in ("dense", form)
    assert_contract(Case("", make, list(sizes), token_inputs), model, tmp_path)


@pytest.mark.parametrize("keep", [0.98, 0.9, 0.5, 0.1])
def test_of_a_matrix_that_is_stored_as_it_is_a_rank_below_takes_less(keep: float) -> None:
    model = narrowed(llama(), form="factors", keep=1.0)
    stored = model.size_report().keep
    retruncate(model, keep * stored)
    assert keep * stored - 0.02 <= model.size_report().keep <= keep * stored
    config = model.peft_config["default"]
    for name, rank in ranks(model).items():
        out_features, in_features = config.sizes[name]
        assert rank == min(out_features, in_features) or rank * (out_features + in_features) < out_features * in_features


def modules_of(model: PeftModel) -> dict[str, FactorizedModule]:
    return {name: layer.factorized("default") for name, layer in layers(model).items()}
