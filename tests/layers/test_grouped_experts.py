"""Experts that are computed together compute what the loop over experts does, with its gradients, or are left to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.batches import text
from support.experts import EXPERTS, HIDDEN, LAYOUTS, NEURONS, fused, routing
from support.models import qwen_moe, token_inputs
from support.tolerances import assert_close
from support.versions import is_unable
from torch import Tensor, nn

from reparam_peft import ReparamConfig, compress
from reparam_peft.layers import experts as of_experts
from reparam_peft.layers import grouped_experts
from reparam_peft.layers.experts import fused_parameters, open_experts
from reparam_peft.layers.factorized_kinds import FactorizedLinear
from reparam_peft.layers.neuron_groups import rows_of


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets experts be computed together on a CPU, too; fills up with the number of experts of each product that is."""
    if is_unable("torch", "2.8"):
        pytest.skip("this PyTorch multiplies experts one by one")
    seen: list[int] = []

    def product(x: Tensor, parts: Any, counts: Any) -> Tensor:
        seen.append(len(parts))
        return grouped_experts.product(x, parts, counts)

    monkeypatch.setattr(grouped_experts, "DEVICES", {"cpu"})
    monkeypatch.setattr(of_experts, "product", product)
    return seen


def factorised(layout: str, forms: list[str], neurons: list[int]) -> Any:
    """Experts whose layers are products in these forms, of ranks of their own, with so many neurons left."""
    experts = fused(layout)
    reader, writer = (name.rpartition(".")[2] for name in fused_parameters(experts))
    for key in (reader, writer):
        open_experts(experts, key)
        for index, form in enumerate(forms):
            layer = experts.get_submodule(key)[index]
            kept = torch.arange(NEURONS)[: neurons[index]]
            of_layout = "interleaved" if "interleaved" in layout else "rows" if reader == "up_proj" else "split"
            rows = rows_of(of_layout, kept, NEURONS) if key == reader else torch.arange(HIDDEN)
            matrix = layer.weight.detach()[rows] if key == reader else layer.weight.detach()[:, kept]
            out_features, in_features = matrix.shape
            if form == "dense" and neurons[index] == NEURONS:
                continue  # the layer of the parameter
            made = FactorizedLinear(in_features, out_features, min(matrix.shape) if form == "dense" else 1 + index, form,
                                    bias=layer.bias is not None)  # fmt: skip
            if form == "pivot":
                made.A.set_pivots(torch.randperm(out_features)[: made.rank].sort().values)
            for parameter in made.parameters():
                nn.init.normal_(parameter, std=0.5)
            experts.get_submodule(key)[index] = made
    return experts


def gradients(experts: Any, together: bool) -> tuple[Tensor, dict[str, Tensor]]:
    experts.zero_grad()
    experts.config._experts_implementation = "grouped_mm" if together else "eager"
    hidden, chosen, weights = routing()
    hidden.requires_grad_()
    y = experts(hidden, chosen, weights)
    y.square().sum().backward()
    return y, {"": hidden.grad, **{name: parameter.grad for name, parameter in experts.named_parameters()}}


@pytest.mark.parametrize("neurons", [[NEURONS] * EXPERTS, [NEURONS - 1, 2, NEURONS]], ids=["all", "some"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_together_compute_what_they_do_one_by_one(layout: str, neurons: list[int], products: list[int]) -> None:
    for forms in (["factors", "pivot", "factors"], ["dense", "pivot", "dense"], ["dense", "dense", "dense"]):
        experts = factorised(layout, forms, neurons)
        expected, of_loop = gradients(experts, together=False)
        assert not products
        got, of_products = gradients(experts, together=True)
        assert products == [EXPERTS, EXPERTS]  # also that which no token has chosen, for its gradients of zero
        products.clear()
        assert_close(got, expected)
        for name, gradient in of_loop.items():
            torch.testing.assert_close(of_products[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        with torch.no_grad():
            assert_close(experts(*routing()), expected)
            assert products == [2, 2]  # those with tokens
        products.clear()


def test_compressed_models_compute_together_as_their_config_says(products: list[int]) -> None:
    config = ReparamConfig(target_modules=[], target_parameters="all-experts", keep=0.4, rank_multiple=1)
    small = compress(qwen_moe(), config, [text([24, 20, 24, 17], 24)], progress=False).eval()
    assert any(getattr(module, "size", None) is not None for module in small.modules())  # neurons
    with torch.no_grad():
        small.get_base_model().set_experts_implementation("eager")
        expected = small(**token_inputs()).logits
        assert not products
        small.get_base_model().set_experts_implementation("grouped_mm")
        assert_close(small(**token_inputs()).logits, expected)
    assert products == [4] * 4
    merged = copy.deepcopy(small)
    merged.merge_adapter()
    assert_close(merged(**token_inputs()).logits, expected)


def test_large_experts_are_left_to_the_loop(products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    experts = factorised("split", ["factors"] * EXPERTS, [NEURONS] * EXPERTS)
    with torch.no_grad():
        together = experts(*routing())
        assert products
        products.clear()
        layers = [experts.get_submodule(f"{key}.0") for key in ("gate_up_proj", "down_proj")]
        size = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
        monkeypatch.setattr(grouped_experts, "LARGEST", size)
        experts(*routing())
        assert products
        products.clear()
        monkeypatch.setattr(grouped_experts, "LARGEST", size - 1)
        assert_close(experts(*routing()), together)
    assert not products


def test_what_must_be_called_is_called(products: list[int]) -> None:
    config = ReparamConfig(target_modules=[], target_parameters="all-experts", keep=0.5, keep_base=True, init_weights=False)
    small = get_peft_model(qwen_moe(), config).eval()
    small.get_base_model().set_experts_implementation("grouped_mm")
    layer = small.get_submodule("base_model.model.model.layers.0.mlp.experts.down_proj.1")
    small(**token_inputs())
    count = len(products)
    assert count == 4
    calls: list[int] = []
    for module in (layer, layer.factorized("default").B):
        hook = module.register_forward_hook(lambda *_: calls.append(1))
        small(**token_inputs())
        hook.remove()
    assert len(calls) == 2  # one layer of two is left to the loop, as both of a layer are
    assert len(products) == count + 2 * 2
    with torch.autocast("cpu", torch.bfloat16):
        small(**token_inputs())
    small.add_adapter("second", config)
    small.base_model.set_adapter(["default", "second"])
    small(**token_inputs())
    small.double()(**token_inputs())
    assert len(products) == count + 2 * 2
    small.float().base_model.disable_adapter_layers()
    assert small(**token_inputs()).logits.isfinite().all()
    assert len(products) == 2 * count + 2 * 2
