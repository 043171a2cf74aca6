"""Matrices in 4 bits of rows of any length."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.tolerances import relative_error
from support.versions import unless
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reparam_peft.layers.base_codes import BaseCodes
from reparam_peft.layers.dequantizing import dequantized_matrix
from reparam_peft.layers.kinds import QUANTIZED, is_quantized
from reparam_peft.layers.quantized_bases import stored_bytes, with_own_codes
from reparam_peft.layers.schemes import SCHEMES

INT4 = SCHEMES["int4"]
ROWS = [16, 24, 48, 64, 80, 96, 100, 101, 160]


class Shapes(TorchDispatchMode):
    """Notes the shapes in which bitsandbytes is asked for matrices, which it reads rightly on some processors only."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dequantize_4bit" in str(func):
            self.asked.append(list(args[4]))
        return func(*args, **(kwargs or {}))

    def assert_right(self) -> None:
        assert self.asked
        assert all(rows == 1 or length % 64 == 0 for rows, length in self.asked)


def matrix_of(features: int) -> Tensor:
    return torch.randn(7, features, generator=torch.Generator().manual_seed(0))


def int4_layer(features: int) -> tuple[nn.Linear, Tensor]:
    """A layer in our 4 bits, and its matrix."""
    tensors = INT4.quantize(matrix_of(features))
    plain = nn.Linear(features, 7, bias=False, device="meta")
    return INT4.linear(plain, dict(tensors), torch.float32).eval(), INT4.numbers(tensors, (7, features)).float()


def arrived(features: int, kind: str, of_scales: bool, outputs: int = 32) -> tuple[nn.Module, Tensor]:
    """A layer as bitsandbytes makes it, and the matrix that it was made of."""
    library = INT4.imported()
    W = torch.randn(outputs, features, generator=torch.Generator().manual_seed(0))
    layer = library.nn.Linear4bit(features, outputs, quant_type=kind, compress_statistics=of_scales)
    words = {"requires_grad": False, "quant_type": kind, "compress_statistics": of_scales, "module": layer}
    layer.weight = library.nn.Params4bit(W, **words).to("cpu")
    return layer.requires_grad_(False).eval(), W


@pytest.mark.parametrize("features", ROWS)
def test_every_way_to_multiply_computes_with_the_numbers(features: int) -> None:
    linear, numbers = int4_layer(features)
    assert relative_error(numbers, matrix_of(features)) < 0.15
    linear.bias = nn.Parameter(torch.randn(7))
    tensors, shape = INT4.tensors(linear), (7, features)
    x, rows = torch.randn(3, features), torch.randn(3, features, requires_grad=True)
    with Shapes() as shapes:
        assert torch.allclose(dequantized_matrix(linear), numbers, atol=1e-6)
        assert torch.allclose(linear(rows), rows @ numbers.mT + linear.bias, atol=1e-4)
    shapes.assert_right()
    for product, bias in (
        (INT4.multiply(tensors, shape, torch.float32), 0),
        (lambda x: INT4.traced(x, tensors, shape), 0),
        (linear, linear.bias),
    ):
        assert torch.allclose(product(x), x @ numbers.mT + bias, atol=1e-4)
        (gradient,) = torch.autograd.grad(product(rows).sum(), rows)
        assert torch.allclose(gradient, numbers.sum(0).expand(3, -1), atol=1e-4)


@unless("torch", "2.7", "does not compile what has parameters of a class of bitsandbytes")
@pytest.mark.parametrize("features", ROWS)
def test_compiled_layers_compute_with_the_numbers(features: int) -> None:
    linear, numbers = int4_layer(features)
    linear.bias = nn.Parameter(torch.randn(7))
    torch.compiler.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    rows = torch.randn(3, features, requires_grad=True)
    assert torch.allclose(compiled(rows.detach()), rows @ numbers.mT + linear.bias, atol=1e-4)
    (gradient,) = torch.autograd.grad(compiled(rows).sum(), rows)
    assert torch.allclose(gradient, numbers.sum(0).expand(3, -1), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_have_the_dtype_of_their_input_and_that_of_autocast(dtype: torch.dtype) -> None:
    linear, numbers = int4_layer(48)
    x = torch.randn(3, 48).to(dtype).requires_grad_()
    y = linear(x)
    assert y.dtype == dtype
    assert relative_error(y.detach().float(), x.detach().float() @ numbers.mT) < 1e-2
    y.sum().backward()
    assert x.grad.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear(x.detach().float().requires_grad_())
    assert inside.dtype == torch.bfloat16
    inside.sum().backward()


def test_gradients_by_function_transforms() -> None:
    linear, numbers = int4_layer(48)
    x = torch.randn(3, 48)
    each = torch.func.vmap(torch.func.grad(lambda row: linear(row).sum()))(x)
    assert torch.allclose(each, numbers.sum(0).expand(3, -1), atol=1e-4)


def test_layers_are_copied_pickled_and_filled_in_by_assignment() -> None:
    linear, _ = int4_layer(48)
    x = torch.randn(3, 48)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert type(other) is type(linear)
        assert torch.equal(other(x), linear(x))
    expected = linear(x)
    stored = INT4.tensors(linear)
    linear.load_state_dict({"weight": linear.weight.data.clone()}, strict=False, assign=True)
    assert torch.equal(linear(x), expected)
    again = INT4.tensors(linear)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("of_scales", [False, True])
def test_what_arrived_and_was_filled_in_by_assignment_keeps_its_codes(of_scales: bool) -> None:
    layer, _ = arrived(96, "nf4", of_scales)
    expected, bytes_before = with_own_codes(layer), stored_bytes(layer)
    layer.load_state_dict({"weight": layer.weight.data.clone()}, strict=False, assign=True)
    assert is_quantized(layer)
    assert stored_bytes(layer) == bytes_before
    assert QUANTIZED.dtype(layer) == torch.float32
    kept = with_own_codes(layer)
    assert expected is not None
    assert kept is not None
    tensors, wanted = (module.state_dict() for module in (kept, expected))
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())


def test_a_matrix_that_took_the_place_of_codes_is_no_codes() -> None:
    layer, W = arrived(64, "nf4", of_scales=False)
    assert is_quantized(layer)
    layer.weight = nn.Parameter(W)
    assert not is_quantized(layer)


def test_an_order_that_nothing_knows_of_is_refused() -> None:
    layer, _ = arrived(128, "nf4", of_scales=False)
    numbers = layer.weight.data.reshape(32, 64)  # as they are after a pass on some processors
    layer.weight.data = numbers
    with pytest.raises(ValueError, match="in the order of bitsandbytes for CPUs, and its `quant_state` does not know"):
        QUANTIZED.own_matrix(layer)


@pytest.mark.parametrize("of_scales", [False, True])
@pytest.mark.parametrize("step", ["pass", "pass and state dict", "pass and assignment"])
def test_the_order_for_some_processors_is_undone(step: str, of_scales: bool) -> None:
    pack = getattr(INT4.imported().functional, "_convert_weight_packed_for_cpu", None)
    if pack is None:
        pytest.skip("this version of bitsandbytes has one order only")
    layer, _ = arrived(128, "nf4", of_scales)
    expected = QUANTIZED.own_matrix(layer).clone()
    layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
    if step == "pass and state dict":
        layer.state_dict()
    if step == "pass and assignment":
        layer.load_state_dict({"weight": layer.weight.data.clone()}, strict=False, assign=True)
    for _ in range(2):
        matrix = QUANTIZED.own_matrix(layer)
        assert matrix.dtype == expected.dtype
        assert relative_error(matrix, expected) < 0.01, "scales are rounded to bfloat16"
    assert is_quantized(layer)


@pytest.mark.parametrize("of_scales", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("features", [48, 64, 96])
def test_the_matrix_of_a_layer_that_arrives_is_that_of_its_blocks(features: int, kind: str, of_scales: bool) -> None:
    layer, W = arrived(features, kind, of_scales)
    with Shapes() as shapes:
        assert relative_error(dequantized_matrix(layer), W) < (0.12 if kind == "nf4" else 0.15)
    shapes.assert_right()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("features", "outputs"), [(48, 32), (96, 32), (96, 24), (64, 64)])
def test_what_is_corrected_computes_with_the_matrix_that_is_merged(features: int, outputs: int, gradients: bool) -> None:
    layer, _ = arrived(features, "nf4", of_scales=False, outputs=outputs)
    codes = BaseCodes(layer, QUANTIZED)
    expected = codes.matrix()
    x = torch.randn(5, features, requires_grad=gradients)
    assert relative_error(codes(x).detach(), x.detach() @ expected.mT + layer.bias) < 1e-2  # some processors round to bfloat16
    if gradients:
        (gradient,) = torch.autograd.grad(codes(x).sum(), x)
        assert relative_error(gradient, expected.sum(0).expand(5, -1)) < 1e-2
