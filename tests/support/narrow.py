"""Adapters of tiny models whose MLPs have lost neurons, with products that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from reparam_peft import ReparamConfig
from reparam_peft.layers.kinds import layer_kind
from reparam_peft.layers.product import Product
from reparam_peft.numerics.decompositions import Factors, Whole, factorize
from reparam_peft.numerics.pivoting import pivot
from reparam_peft.tuner.data_free import installing

LEFT = 0.6  # of the neurons
Groups = Sequence[tuple[Sequence[str], str]]  # producers and the consumer of each MLP

GROUPS: dict[str, Groups] = {
    "LlamaForCausalLM": [
        ([f"model.layers.{i}.mlp.gate_proj", f"model.layers.{i}.mlp.up_proj"], f"model.layers.{i}.mlp.down_proj")
        for i in range(2)
    ],
    "GPT2LMHeadModel": [([f"transformer.h.{i}.mlp.c_fc"], f"transformer.h.{i}.mlp.c_proj") for i in range(2)],
    "BertForSequenceClassification": [
        ([f"bert.encoder.layer.{i}.intermediate.dense"], f"bert.encoder.layer.{i}.output.dense") for i in range(2)
    ],
}


def kept_neurons(total: int, seed: int) -> Tensor:
    """Indices of the neurons that stay, ascending."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator, device="cpu")[: int(LEFT * total)].sort().values


def as_one(position: int, producers: int, group: int) -> bool:
    """Which matrix of a group is stored as it is: up, or in turn the producer and the consumer."""
    return position == (1 if producers > 1 else group % 2)


def narrow_products(model: nn.Module, groups: Groups, form: str = "pivot", keep: float = 0.5) -> dict[str, Product]:
    """Products of what is left, one matrix of each group as it is; biases, where there are, differ from those of the model.

    Args:
        model: that has the matrices.
        groups: its MLPs.
        form: of the products.
        keep: their ranks as a fraction of the full ones; 1: all matrices are stored as they are.
    """
    products = {}
    for number, (producers, consumer) in enumerate(groups):
        total = layer_kind(model.get_submodule(consumer)).shape(model.get_submodule(consumer))[1]
        kept = kept_neurons(total, number)
        for position, name in enumerate([*producers, consumer]):
            module = model.get_submodule(name)
            matrix, bias, is_producer = layer_kind(module).own_matrix(module), getattr(module, "bias", None), name != consumer
            left = matrix[kept] if is_producer else matrix[:, kept]
            if bias is not None:
                bias = (bias.detach()[kept] if is_producer else bias.detach()) + 0.01
            rank = int(keep * min(left.shape))
            if as_one(position, len(producers), number) or rank == min(left.shape):
                factors = Whole(left.contiguous())
            else:
                factors = factorize(left, rank)
                factors = pivot(factors) if form == "pivot" else factors
            rows, columns = (kept, None) if is_producer else (None, kept)
            products[name] = Product(factors, bias, rows=rows, columns=columns)
    return products


def narrow_config(products: dict[str, Product], form: str = "pivot", **options: Any) -> ReparamConfig:
    """The config of an adapter with these products."""
    sizes = {}
    for name, product in products.items():
        A, B = product.factors if isinstance(product.factors, Factors) else product.factors.factors()
        sizes[name] = [len(A), B.shape[1]]
    ranks = {name: product.rank for name, product in products.items()}
    moved = any(product.bias is not None for product in products.values())
    config = ReparamConfig(target_modules=list(products), form=form, rank_pattern=ranks, sizes=sizes, **options)
    config.moved_bias = moved
    return config


def narrowed(
    model: nn.Module, groups: Groups | None = None, form: str = "pivot", keep: float = 0.5, **options: Any
) -> PeftModel:
    """A model whose MLPs have lost two fifths of their neurons."""
    products = narrow_products(model, GROUPS[type(model).__name__] if groups is None else groups, form, keep)
    with installing(products):
        return get_peft_model(model, narrow_config(products, form, **options)).eval()
