"""Linear layers in few bits: what they compute, and that their numbers stay as they are wherever they go."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from reparam_peft.layers.coded import CodedLinear, linear
from reparam_peft.layers.factor_linear import FactorLinear
from reparam_peft.layers.factorized_kinds import FactorizedLinear
from reparam_peft.layers.nearest import nearest, nearest_product
from reparam_peft.layers.product import Product
from reparam_peft.numerics.decompositions import Corrected
from reparam_peft.numerics.storage import ALL_FORMS, Storage

WIDTHS = pytest.mark.parametrize("bits", [8, 4])
X = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))


def weight(out_features: int = 40, in_features: int = 48) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))


def coded(bits: int, dtype: torch.dtype = torch.float32) -> CodedLinear:
    layer = CodedLinear(48, 40, bits, dtype=dtype)
    layer.set_matrix(*nearest(weight(), bits))
    return layer


@WIDTHS
def test_numbers_and_scales_stay_when_the_model_is_cast_moved_or_copied(bits: int) -> None:
    layer = coded(bits)
    tensors, y = {name: tensor.clone() for name, tensor in layer.tensors.items()}, layer(X)
    for changed in (copy.deepcopy(layer), layer.to(torch.bfloat16), layer.half(), layer.float(), layer.to("cpu")):
        assert {name: tensor.dtype for name, tensor in changed.tensors.items()} == {n: t.dtype for n, t in tensors.items()}
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in changed.tensors.items())
    assert (layer.half().dtype, layer.half()(X.half()).dtype) == (torch.float16, torch.float16)
    assert torch.equal(layer.float()(X), y)
    assert not list(layer.parameters())


@WIDTHS
def test_what_computes_follows_the_buffers(bits: int) -> None:
    layer, other = coded(bits), CodedLinear(48, 40, bits)
    other.reset_parameters()
    before, expected = layer(X), other(X)
    assert not torch.equal(before, expected)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(X), expected)
    layer.set_matrix(*nearest(weight(), bits))
    assert torch.equal(layer(X), before)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer(X), expected)
    layer.share(coded(bits))
    assert torch.equal(layer(X), before)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert set(torch.load(file)) == set(layer.tensors)


@WIDTHS
def test_a_layer_on_meta_is_filled_in_and_until_then_computes_nothing(bits: int) -> None:
    layer = CodedLinear(48, 40, bits, device="meta", dtype=torch.bfloat16)
    layer.reset_parameters()
    with pytest.raises(ValueError, match="numbers in few bits are on the meta device"):
        layer(X)
    layer.load_state_dict(coded(bits).state_dict(), assign=True)
    assert torch.equal(layer.matrix(torch.float64), nearest(weight(), bits)[0])
    unfilled = CodedLinear(48, 40, bits)
    assert unfilled(X).isnan().all()


@WIDTHS
def test_a_matrix_of_another_shape_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"the matrix must be \(40, 48\) with scales .* got \(48, 40\)"):
        coded(bits).set_matrix(*nearest(weight(48, 40), bits))


def test_the_layer_of_sixteen_bits_is_a_plain_one() -> None:
    assert type(linear(4, 3, 16)) is type(linear(4, 3)) is FactorLinear


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize(("bits", "correction_bits"), [(8, 16), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_read_back_as_it_was_given(form: str, bits: int, correction_bits: int, dtype: torch.dtype) -> None:
    storage = Storage(40, 48, form, bias=True, bits=bits, correction_bits=correction_bits)
    rank = 40 if form == "dense" else 17
    product = nearest_product(weight().to(dtype), rank, form, storage.widths(rank))
    module = FactorizedLinear(48, 40, rank, form, True, torch.device("meta"), dtype, widths=storage.widths(rank))
    module.set_factors(product.factors, product.scales)
    module.set_bias(torch.ones(40))
    assert (module.form, dict(module.widths), module.dtype) == (form, storage.widths(rank), dtype)
    for given, read in zip(product.factors, module.stored, strict=True):
        assert torch.equal(given.to(read.dtype), read)
    assert all(torch.equal(scales, module.scales[name]) for name, scales in product.scales.items())
    stored = [tensor for name, tensor in module.state_dict().items() if not name.endswith("placeholder")]
    assert sum(t.numel() * t.element_size() for t in stored) == storage.bytes(rank, dtype.itemsize)
    y, W = module(X.to(dtype)), module.matrix(torch.float64)
    assert torch.allclose(y.double(), X.double() @ W.mT + 1, atol=1e-5 if dtype == torch.float32 else 0.3)
    factors = module.factors
    assert torch.allclose(factors.A.double() @ factors.B.double(), W, atol=1e-6 if dtype == torch.float32 else 0.05)


def test_scales_are_those_of_the_matrices_in_few_bits() -> None:
    module = FactorizedLinear(48, 40, 17, widths={"A": 8, "B": 8})
    product = nearest_product(weight(), 17, "factors", {"A": 8, "B": 8})
    for scales in ({}, {"A": product.scales["A"]}, {**product.scales, "W": product.scales["A"]}):
        with pytest.raises(ValueError, match=r"`scales` must be those of \['A', 'B'\]"):
            module.set_factors(product.factors, scales)


def test_a_corrected_matrix_trains_its_factors_and_passes_gradients_on() -> None:
    product: Product = nearest_product(weight(), 4, "corrected", {"Q": 4})
    assert isinstance(product.factors, Corrected)
    module = FactorizedLinear(48, 40, 4, "corrected", widths={"Q": 4})
    module.set_factors(product.factors, product.scales)
    x = X.clone().requires_grad_()
    module(x).sum().backward()
    assert [name for name, _ in module.named_parameters()] == ["B.weight", "A.weight"]
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert torch.allclose(x.grad, module.matrix(torch.float32).sum(0).expand(3, -1), atol=1e-4)
    with pytest.raises(TypeError, match="`factors` are Whole, and this module stores the form 'corrected'"):
        module.set_factors(nearest_product(weight(), 40, "dense").factors, product.scales)
