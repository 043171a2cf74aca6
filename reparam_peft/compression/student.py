"""The student: a block under construction, whose matrices become products one after another."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import chain

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..layers.kinds import stored_weight
from ..layers.product import Product, named_product, named_tensors
from ..runtime.modules import set_module
from ..runtime.processes import processes
from ..tuner.layer import ReparamLayer, reparam_layer
from ..tuner.targets import Target

ADAPTER = "default"  # of the layers in students, which never leave this package


def targets_within(targets: Mapping[str, Target], block: str) -> dict[str, Target]:
    """The targets inside of a block, by their names relative to it."""
    prefix = f"{block}."
    return {name.removeprefix(prefix): target for name, target in targets.items() if name.startswith(prefix)}


def factorized_layer(target: Target, product: Product, module: nn.Module) -> ReparamLayer:
    """The layer of a product in place of a module, which gives its bias and its geometry."""
    layer = reparam_layer(copy.copy(module))  # whose weight is dropped, while the module keeps its own
    layer.base_layer._parameters = dict(module._parameters)
    layer.update_layer(ADAPTER, product.rank, product, target.storage, nested=product.feature_mean is not None)
    layer.drop_base_weight()
    return layer.requires_grad_(False).train(False)


def plain_modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules without children that have parameters, but for the inside of factorised layers."""
    inside = tuple(f"{name}." for name, module in block.named_modules() if isinstance(module, ReparamLayer))
    for name, module in block.named_modules():
        childless = not any(True for _ in module.children())
        if name and childless and not name.startswith(inside) and any(True for _ in module.parameters()):
            yield name, module


def beside(module: nn.Module, product: Product) -> Product:
    """A product on the device of the module that it is to replace."""
    moved: Product = send_to_device(product, stored_weight(module).device)
    return moved


def products_of(student: nn.Module) -> dict[str, Product]:
    """The products of a block's factorised layers."""
    products = {}
    for name, layer in student.named_modules():
        if isinstance(layer, ReparamLayer):
            module = layer.factorized(ADAPTER)
            factors = type(module.stored)(*(factor.detach() for factor in module.stored))
            bias = None if module.bias is None else module.bias.detach()
            products[name] = Product(factors, bias, module.feature_mean, module.rows, module.columns)
    return products


def changed_parameters(original: nn.Module, student: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Parameters beside the factors that differ from the original's, with the others of their modules."""
    changed = {}
    for name, module in plain_modules(student):
        values = {key: parameter.detach() for key, parameter in module.named_parameters()}
        before = dict(original.get_submodule(name).named_parameters())
        if any(not torch.equal(value, before[key]) for key, value in values.items()):
            changed[name] = values
    return changed


def state_of(original: nn.Module, student: nn.Module) -> dict[str, Tensor]:
    """A finished block: the tensors of its products and what else has changed."""
    products = named_tensors({f"product/{name}": product for name, product in products_of(student).items()})
    changed = changed_parameters(original, student)
    return products | {f"changed/{name}/{key}": value for name, values in changed.items() for key, value in values.items()}


def restore(student: nn.Module, targets: Mapping[str, Target], state: Mapping[str, Tensor]) -> None:
    """Make a copy of a block the finished one."""
    for name, target in targets.items():
        if target.rank is not None:
            module = student.get_submodule(name)
            product = beside(module, named_product(state, f"product/{name}", target.rank, target.storage))
            set_module(student, name, factorized_layer(target, product, module))
    for key, value in state.items():
        part, _, place = key.partition("/")
        name, _, parameter_name = place.rpartition("/")
        if part == "changed":
            parameter = student.get_submodule(name).get_parameter(parameter_name)
            parameter.data = value.to(parameter.device)


def share_block(block: nn.Module) -> None:
    """Give every process of a distributed run the block of the first."""
    if processes()[0] > 1:
        for tensor in chain(block.parameters(), block.buffers()):
            dist.broadcast(tensor.data, 0)
