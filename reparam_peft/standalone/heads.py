"""Heads of standalone models whose weight is the table of a factorised embedding."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..layers.factorized import FactorizedModule
from ..layers.tied_head import TiedHead
from ..runtime.modules import set_module
from .contents import DAMAGED


def check_tied(tied: Any, layers: Collection[str]) -> None:
    """Raise `ValueError` unless config.json says of heads that they share the tables of factorised layers."""
    is_mapping = isinstance(tied, Mapping) and all(isinstance(name, str) and name for name in tied)
    if not is_mapping or not all(isinstance(table, str) and table in layers for table in tied.values()):
        raise ValueError(
            f"`tied` in config.json must map names of heads to names of factorised layers, got {tied!r}; {DAMAGED}."
        )


def tied_in(model: nn.Module) -> dict[str, str]:
    """The heads of a standalone model that share a factorised table, each with the name of the embedding."""
    names = {id(module): name for name, module in model.named_modules()}
    heads = {name: module for name, module in model.named_modules() if isinstance(module, TiedHead)}
    return {name: names[id(head.table)] for name, head in heads.items()}


def tie(model: PreTrainedModel, tied: Mapping[str, str]) -> dict[str, str]:
    """Have heads share the tables of factorised embeddings, in place; returns those that the model has, by its own names.

    transformers is to tie nothing there: no head has a weight of its own any more.

    Raises:
        ValueError: a head is none, or what it is to share is no factorised embedding.
    """
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    for head, table in tied.items():
        here = next((name for name in (head, head.removeprefix(prefix), prefix + head) if name in modules), None)
        shared = next((name for name in (table, table.removeprefix(prefix), prefix + table) if name in modules), None)
        if here is None or shared is None:  # of another head, or of none
            continue
        layer, factors = modules[here], modules[shared]
        if not isinstance(layer, nn.Linear) or not isinstance(factors, FactorizedModule) or not hasattr(factors, "transposed"):
            raise ValueError(f"{head}: config.json says that it shares the table of {table}, which it cannot; {DAMAGED}.")
        set_module(model, here, TiedHead(layer, factors).train(layer.training))
    return forget_tied(model)


def forget_tied(model: PreTrainedModel) -> dict[str, str]:
    """Have transformers tie no head of a model that shares a factorised table, in place; returns those heads."""
    heads = tied_in(model)
    for name in heads:
        model.all_tied_weights_keys.pop(f"{name}.weight", None)
    return heads
