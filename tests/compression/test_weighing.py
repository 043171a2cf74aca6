"""Errors are weighed by the metrics that the config names, and each of them pays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.compressing import IMAGES, TEXT, batches_of, compressed, config_of, layers, output_errors, planned, scale_of
from support.models import CASES, Case, bert, convnet, gpt2, llama, net, token_inputs
from support.tolerances import assert_close, relative_error

from reparam_peft import Refinement, ReparamConfig, Statistics, calibrate
from reparam_peft.calibration import sums
from reparam_peft.compression.weighing import Weigher
from reparam_peft.layers.kinds import layer_kind
from reparam_peft.numerics.decompositions import factorize


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
        options = {"form": form, "method": method, "keep": 0.4, "neurons": False}  # so that factors are of whole matrices
        small = compressed(model, statistics, target_modules=targets, **options)
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


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("moves_bias", [True, False])
def test_statistics_and_moments_stay_as_they_are(moves_bias: bool, gradients: bool) -> None:
    config = ReparamConfig(target_modules=["query"], method="whitened")
    statistics = calibrate(bert(), config, TEXT, progress=False)
    weigher, name = replace(Weigher.of(config), gradients=gradients), next(iter(statistics.reads))
    moments = statistics.moments(name, moves_bias)
    before = moments.gram.clone()
    of_statistics = weigher.weighing(name, statistics, moves_bias)
    of_moments = weigher.weighing(name, statistics, moves_bias, moments)
    assert torch.equal(moments.gram, before)
    assert torch.equal(statistics.moments(name, moves_bias).gram, before)
    assert torch.equal(of_statistics.gram, of_moments.gram)


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
        parts = [*made.modules, *made.neurons]
        assert made.predicted_loss == pytest.approx(sum(part.predicted_loss for part in parts))
        return made.predicted_loss

    plain = loss(input_metric="none", output_metric="diagonal", allocation="uniform", form="factors")
    two_sided = loss(allocation="uniform", form="factors")
    pivoted = loss(allocation="uniform", form="pivot")
    allocated = loss(allocation="loss", form="pivot")
    assert 0 <= allocated <= pivoted <= two_sided
    assert allocated < pivoted or case.kind == "Conv2d"
    if case.kind in ("Linear", "Conv1D"):
        assert two_sided < plain


def test_outputs_too_wide_for_a_whole_metric_are_weighed_by_its_diagonal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, config = (
        llama(num_hidden_layers=1),
        {"target_modules": ["mlp.up_proj", "mlp.down_proj", "lm_head"], "neurons": False},
    )
    whole = calibrate(model, ReparamConfig(**config), TEXT, progress=False)
    monkeypatch.setattr(sums, "WHOLE_BYTES", 8 * 70 * 71 // 2)
    monkeypatch.setattr(sums, "WHOLE_TIMES_WEIGHT", 1)
    statistics = calibrate(model, ReparamConfig(**config), TEXT, progress=False)
    for name, record in statistics.outputs.items():
        expected = whole.fisher(name)
        assert_close(statistics.fisher(name), expected if "down_proj" in name else expected.diagonal(), torch.float32)
        assert statistics.loss_scale(name) == pytest.approx(whole.loss_scale(name))
        assert record.gram.nbytes <= sums.WHOLE_BYTES
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    assert loaded.merge(whole).fisher("lm_head").shape == whole.merge(loaded).fisher("lm_head").shape == (100,)
    expected = compressed(llama(num_hidden_layers=1), loaded, **config)
    name = "model.layers.0.mlp.up_proj"
    product = layers(expected)[name].factorized("default").factors
    weighing = Weigher.of(config_of(**config, method="whitened")).weighing(name, loaded, moves_bias=False)
    best = factorize(model.get_submodule(name).weight.detach(), len(product.B), weighing.input, weighing.output)
    assert relative_error(product.A @ product.B, best.A @ best.B) < 1e-4
    short = Refinement(epochs=1, batch_size=4, autocast=None)
    for arguments, more in (
        ({"max_memory": 230_000}, {}), ({"sequential": True}, {}), ({"refine": short}, {}), ({}, {"budget": "bytes"}),
    ):  # fmt: skip
        options = {**config, **more}
        small = compressed(llama(num_hidden_layers=1), TEXT, arguments=arguments, **options)
        assert small(**token_inputs()).logits.isfinite().all()
        assert "budget" in more or small.size_report().keep <= 0.5
        if "max_memory" in arguments:
            assert_close(small(**token_inputs()).logits, expected(**token_inputs()).logits)


def test_of_an_input_that_never_varies_products_stay_of_the_size_of_the_weight() -> None:
    x = torch.sin(torch.arange(20.0))
    model, targets = net(), ["first", "second"]
    sizes = {name: float(model.get_submodule(name).weight.norm()) for name in targets}
    small = compressed(model, [{"x": x.repeat(rows, 1)} for rows in (50, 30)], target_modules=targets)
    for name, layer in layers(small).items():
        assert layer.dense_matrix("default").norm() < 2 * sizes[name], name
    assert_close(small(x[None]), net()(x[None]), torch.bfloat16)
