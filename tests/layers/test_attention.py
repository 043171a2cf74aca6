from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.tolerances import assert_close
from torch import Tensor, nn

from reparam_peft.layers.attention import (
    close_attentions,
    is_open_attention,
    open_attentions,
    open_attentions_of,
    projections_of,
)
from reparam_peft.layers.experts import ViewLinear
from reparam_peft.layers.parameters import OpenedParameter, close_parameter, open_parameter

LENGTH, OTHER = 5, 7
ATTENTIONS: dict[str, dict[str, Any]] = {
    "packed": {"batch_first": True},
    "sequence first": {"bias": False},
    "separate": {"kdim": 6, "vdim": 4},
    "separate values": {"vdim": 4, "add_bias_kv": True, "batch_first": True},
    "with positions added": {"add_bias_kv": True, "add_zero_attn": True},
    "dropout": {"dropout": 0.5, "batch_first": True},
}
causal = torch.ones(LENGTH, LENGTH).triu(1).bool()
padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False, "attn_mask": causal},
    "causal": {"need_weights": False, "attn_mask": causal, "is_causal": True},
    "padded": {"key_padding_mask": padding},
    "padded and causal": {"key_padding_mask": padding, "attn_mask": causal, "need_weights": False},
    "masks of numbers": {"key_padding_mask": padding.float(), "attn_mask": causal.float(), "need_weights": False},
    "a mask for each head": {"attn_mask": torch.randn(2 * 4, LENGTH, LENGTH)},
}


def build(options: dict[str, Any]) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, **options).double().eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.4)
    return attention


def tensors(attention: nn.MultiheadAttention, lengths: tuple[int, int, int] = (LENGTH,) * 3) -> list[Tensor]:
    torch.manual_seed(1)
    sizes = zip(lengths, (attention.embed_dim, attention.kdim, attention.vdim), strict=True)
    made = [torch.randn(2, length, features, dtype=torch.float64) for length, features in sizes]
    made = made if attention.batch_first else [x.transpose(0, 1) for x in made]
    return [made[0]] * 3 if attention._qkv_same_embed_dim and len(set(lengths)) == 1 else made


def opened(attention: nn.MultiheadAttention, parameters: bool = True) -> nn.MultiheadAttention:
    model = nn.ModuleDict({"attention": copy.deepcopy(attention)})
    open_attentions(model, ["attention.out_proj"])
    for key, reading in projections_of(model["attention"]).items() if parameters else ():
        open_parameter(model, f"attention.{key}", reading)
    made: Any = model["attention"]
    return made


def assert_same(one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.shape == b.shape
            assert_close(a, b)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_opened_attention_computes_what_torch_does(kind: str) -> None:
    attention = build(ATTENTIONS[kind])
    others = [opened(attention), opened(attention, parameters=False)]
    for options in CALLS.values():
        options = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
        inputs = tensors(attention)
        for other in others:
            assert_same(other(*inputs, **options), attention(*inputs, **options))
    query, key, value = tensors(attention, (LENGTH, OTHER, OTHER))
    key = value if attention.kdim == attention.vdim else key
    batch = 0 if attention.batch_first else 1
    for other in others:
        assert_same(other(query, key, value), attention(query, key, value))
        single = [x.select(batch, 0) for x in (query, key, value)]
        assert_same(other(*single), attention(*single))
        if attention.kdim == attention.vdim:
            assert_same(other(query, key, value + 1), attention(query, key, value + 1))
        torch.manual_seed(2)
        expected = attention.train()(query, key, value, need_weights=False)
        torch.manual_seed(2)
        assert_same(other.train()(query, key, value, need_weights=False), expected)
        attention.eval()


def test_layers_are_called_once_each_and_share_their_input() -> None:
    attention = opened(build({}))
    seen: list[tuple[str, int]] = []
    for name, layer in attention.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, id(args[0]))))
    attention(*tensors(attention))
    assert [name for name, _ in seen] == [*(f"in_proj_weight.{index}" for index in range(3)), "out_proj"]
    assert len({identity for _, identity in seen[:3]}) == 1


def test_gradients_are_those_of_torch() -> None:
    attention = build({})
    other = opened(attention)
    for module in (attention, other):
        module(*tensors(module))[0].square().sum().backward()
    packed: Any = other.in_proj_weight
    assert_close(torch.cat([layer.weight.grad for layer in packed.layers]), attention.in_proj_weight.grad)
    assert_close(other.in_proj_bias.grad, attention.in_proj_bias.grad)
    assert_close(other.out_proj.weight.grad, attention.out_proj.weight.grad)


def test_opening_is_undone_copied_and_pickled() -> None:
    model = nn.ModuleDict({"attention": build({}), "other": build({})})
    inputs = tensors(model["attention"])  # type: ignore[arg-type]
    expected, before = model["attention"](*inputs), dict(model.state_dict())
    open_attentions(model, ["attention.in_proj_weight", "other.norm", "nothing.out_proj"])
    assert open_attentions_of(model) == ["attention"]
    open_parameter(model, "attention.in_proj_weight", projections_of(model["attention"])["in_proj_weight"])
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer: Any = made["attention"].in_proj_weight
        layer.layers[2].weight.data.zero_()
        assert not torch.equal(made["attention"](*inputs)[0], expected[0])
        assert_same(model["attention"](*inputs), expected)
    close_attentions(model)  # has a parameter that is open
    assert is_open_attention(model["attention"])
    assert isinstance(model["attention"].in_proj_weight, OpenedParameter)
    close_parameter(model, "attention.in_proj_weight")
    close_attentions(model)
    assert not open_attentions_of(model)
    assert "forward" not in vars(model["attention"])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_same(model["attention"](*inputs), expected)


def test_what_cannot_be_computed_is_told() -> None:
    attention = opened(build({"batch_first": True}))
    x = torch.nested.nested_tensor([torch.randn(3, 16).double(), torch.randn(2, 16).double()])
    with pytest.raises(ValueError, match="enable_nested_tensor=False"):
        attention(x, x, x)
    with pytest.raises(ValueError, match="needs the `attn_mask`"):
        attention(*tensors(attention), is_causal=True)


def test_one_matrix_for_all_three_is_served_too() -> None:
    attention = build({})
    model = nn.ModuleDict({"attention": copy.deepcopy(attention)})
    open_attentions(model, ["attention.in_proj_weight"])
    open_parameter(model, "attention.in_proj_weight", type(projections_of(attention)["in_proj_weight"])(0, 1, 1, False))
    layers: Any = model["attention"].in_proj_weight
    assert isinstance(layers.layers[0], ViewLinear)
    assert len(layers.layers) == 1
    for lengths in ((LENGTH,) * 3, (LENGTH, OTHER, OTHER)):
        inputs = tensors(attention, lengths)
        assert_same(model["attention"](*inputs), attention(*inputs))
