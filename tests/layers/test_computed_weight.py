"""Weights that are computed where a model reads their numbers."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from support.models import gpt2, llama
from torch import Tensor, nn

from reparam_peft import ReparamConfig
from reparam_peft.layers import computed_weight
from reparam_peft.layers.computed_weight import ComputedWeight


class Reader(nn.Module):
    """Reads the weight of one layer itself, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layers[0].weight.to(x.dtype), self.layers[0].bias)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    computed_weight._tell_of_reading.cache_clear()


def weight(values: Tensor) -> ComputedWeight:
    return ComputedWeight.of(values.new_empty(()), values.shape, lambda: values * 1, "blocks.0.proj")


def test_shape_dtype_and_device_are_known_without_a_computation() -> None:
    def fails() -> Tensor:
        raise AssertionError("computed")

    lazy = ComputedWeight.of(torch.zeros((), dtype=torch.bfloat16), (3, 2), fails, "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (lazy.shape, lazy.size(0), lazy.ndim, lazy.dtype) == ((3, 2), 3, 2, torch.bfloat16)
        assert (lazy.device.type, lazy.is_floating_point(), lazy.numel(), len(lazy)) == ("cpu", True, 6, 3)
        assert not lazy.is_meta


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w @ torch.ones(2, 1),
        lambda w: F.linear(torch.ones(2), w),
        lambda w: w.T,
        lambda w: w[1:],
        lambda w: torch.cat([w, w]),
        lambda w: w.to(torch.float64),
        lambda w: w.detach() + 0,
    ],
)
def test_operations_get_the_numbers_with_gradients(operation: object) -> None:
    values = torch.randn(3, 2, requires_grad=True)
    with pytest.warns(UserWarning, match=r"blocks\.\*\.proj"):
        got = operation(weight(values))
    assert torch.equal(got, operation(values))
    assert type(got) is Tensor
    assert got.requires_grad == operation(values).requires_grad


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w.data.zero_(),
        lambda w: w.detach().add_(1),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: setattr(w, "data", torch.ones(3, 2)),
        lambda w: nn.init.normal_(w),
        lambda w: w.__iadd__(1),
        lambda w: torch.add(torch.ones(3, 2), 1, out=w),
        lambda w: torch._foreach_mul_([w], 2),
        lambda w: torch.ops.aten.copy_.default(w, torch.ones(3, 2)),
    ],
)
def test_writing_is_refused_with_the_name_of_the_layer(write: object) -> None:
    values = torch.randn(3, 2)
    before = values.clone()
    with pytest.raises(RuntimeError, match=r"blocks\.0\.proj: .*cannot be written to"):
        write(weight(values))
    assert torch.equal(values, before)


def test_it_can_be_frozen_and_pointed_to() -> None:
    values = torch.randn(3, 2)
    lazy = weight(values)
    lazy.requires_grad = False
    assert lazy.requires_grad_(False) is lazy
    assert lazy.data_ptr() == lazy.pointed_to.data_ptr()
    assert torch.equal(lazy.pointed_to, values)


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("options", [{"r": "full"}, {"r": 3}, {"r": 3, "keep_base": True}])
def test_a_model_that_reads_a_weight_computes_with_the_product(form: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(4, 12)
    expected = model(x)
    small = get_peft_model(model, ReparamConfig(target_modules=["layers.0"], form=form, **options))
    with pytest.warns(UserWarning, match=r"layers\.\*: the model reads this weight itself") as told:
        got, _ = small(x), small(x)
    assert len([one for one in told if "reads this weight" in str(one.message)]) == 1
    layer = small.base_model.model.layers[0]
    torch.testing.assert_close(got, layer(x))  # what the layer itself computes
    if options["r"] == "full":
        torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.reparam_factors.parameters())
    torch.testing.assert_close(small.merge_and_unload()(x), got)


def test_half_precision_is_the_base_dtype() -> None:
    model = Reader().bfloat16()
    small = get_peft_model(model, ReparamConfig(target_modules=["layers.0"], r=3))
    layer = small.base_model.model.layers[0]
    assert layer.reparam_factors["default"].dtype == torch.float32  # trained so
    assert layer.weight.dtype == (layer.weight + 0).dtype == torch.bfloat16


@pytest.mark.parametrize(("make", "targets"), [(llama, ["q_proj", "embed_tokens"]), (gpt2, ["c_attn"])])
def test_standalone_models_too_in_the_shape_of_the_layer(make: object, targets: list[str]) -> None:
    model = make()
    shapes = {name: module.weight.shape for name, module in model.named_modules() if name.endswith(tuple(targets))}
    small = get_peft_model(model, ReparamConfig(target_modules=targets, r=4))
    plain = small.to_standalone()
    for name, shape in shapes.items():
        read, wrapped = plain.get_submodule(name).weight, small.base_model.model.get_submodule(name).weight
        assert read.shape == shape
        assert torch.equal(read + 0, wrapped + 0)
        assert plain.state_dict()[f"{name}.weight"].shape == (1,)  # as in a checkpoint
    plain.load_state_dict(plain.state_dict())
    assert all(not name.endswith(tuple(f"{t}.weight" for t in targets)) for name, _ in plain.named_buffers())
