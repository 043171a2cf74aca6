"""A block under construction: its factorised layers, what changed in it, and how it is kept and restored."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from reparam_peft.compression.student import (
    changed_parameters,
    factorized_layer,
    plain_modules,
    products_of,
    restore,
    state_of,
    targets_within,
)
from reparam_peft.layers.product import Product, tensors_of
from reparam_peft.numerics.decompositions import Whole, factorize
from reparam_peft.numerics.pivoting import pivot
from reparam_peft.numerics.storage import Storage
from reparam_peft.runtime.modules import set_module
from reparam_peft.tuner.layer import ReparamLayer
from reparam_peft.tuner.targets import Target


class Block(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def target_of(module: nn.Linear, rank: int | None) -> Target:
    return Target(module, rank, Storage(module.out_features, module.in_features))


def student_of(original: Block) -> tuple[Block, dict[str, Target]]:
    """A copy with `up` factorised and another norm."""
    student = copy.deepcopy(original).requires_grad_(False)
    targets = {"up": target_of(original.up, 3), "down": target_of(original.down, None)}
    product = Product(factorize(original.up.weight.detach(), 3))
    set_module(student, "up", factorized_layer(targets["up"], product, student.up))
    student.norm.weight.data.mul_(2)
    return student, targets


def test_targets_of_a_block_have_names_relative_to_it() -> None:
    target = target_of(nn.Linear(2, 2), 1)
    assert targets_within({"a.0.x": target, "a.01.x": target, "b": target}, "a.0") == {"x": target}


def test_a_factorised_layer_computes_the_product_and_leaves_the_module_its_weight() -> None:
    original = block()
    factors = factorize(original.up.weight.detach(), 3)
    layer = factorized_layer(target_of(original.up, 3), Product(factors), original.up)
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), x @ (factors.A @ factors.B).T + original.up.bias)
    assert original.up.weight is not None
    assert isinstance(layer, ReparamLayer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_what_changed_beside_the_factors_is_told() -> None:
    original = block()
    student, _ = student_of(original)
    assert [name for name, _ in plain_modules(student)] == ["norm", "down"]
    assert set(products_of(student)) == {"up"}
    changed = changed_parameters(original, student)
    assert {name: set(values) for name, values in changed.items()} == {"norm": {"weight", "bias"}}


def test_a_finished_block_is_restored_to_the_bit() -> None:
    original, x = block(), torch.randn(4, 6)
    student, targets = student_of(original)
    restored = copy.deepcopy(original).requires_grad_(False)
    restore(restored, targets, state_of(original, student))
    assert torch.equal(restored(x), student(x))
    assert not torch.equal(restored(x), original(x))


def test_a_block_with_fewer_neurons_is_restored_too() -> None:
    original, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(4, 6)
    kept = torch.tensor([1, 2, 4, 7])
    student, restored = (copy.deepcopy(original).requires_grad_(False) for _ in range(2))
    targets = {
        "0": Target(original[0], 4, Storage(4, 6, bias=True, whole=(8, 6))),
        "2": Target(original[2], 2, Storage(6, 4, "pivot", bias=True, whole=(6, 8))),
    }
    first, second = original[0].weight.detach()[kept], original[2].weight.detach()[:, kept]
    products = {
        "0": Product(Whole(first), original[0].bias.detach()[kept], rows=kept),
        "2": Product(pivot(factorize(second, 2)), original[2].bias.detach(), columns=kept),
    }
    for name, product in products.items():
        set_module(student, name, factorized_layer(targets[name], product, student.get_submodule(name)))
    restore(restored, targets, state_of(original, student))
    assert torch.equal(restored(x), student(x))
    for name, product in products_of(restored).items():
        assert [one is None for one in product] == [one is None for one in products[name]]
        assert all(torch.equal(*pair) for pair in zip(tensors_of(product), tensors_of(products[name]), strict=True))
