"""Input and output embeddings that share a table: one product serves both, where a config asks for it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import nn

from ..arguments import ReparamWarning
from ..config.reparam_config import ReparamConfig
from ..layers.tied_head import TiedHead
from ..runtime.modules import parameter_owners, set_module
from .layer import ReparamLayer


def tied_heads(model: nn.Module) -> dict[str, str]:
    """The linear layers of a model whose weight is the table of its one embedding, or a product of it: name → name of that.

    A table that anything else shares, such as a second embedding, is none of them.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    heads = {name: names[id(m.table)] for name, m in modules.items() if isinstance(m, TiedHead) and id(m.table) in names}
    for owners in parameter_owners(model).values():
        sharing = [name.removesuffix(".weight") for name in owners]
        embeddings = [name for name in sharing if isinstance(modules.get(name), nn.Embedding)]
        linear = [name for name in sharing if type(modules.get(name)) is nn.Linear]
        if len(embeddings) == 1 and linear and len(linear) + 1 == len(sharing):
            heads |= dict.fromkeys(linear, embeddings[0])
    return heads


def shares_its_product(config: ReparamConfig, model: nn.Module, name: str) -> bool:
    """Whether a target's table serves heads, too, for which a config has its product serve."""
    return config.ensure_weight_tying and name in _tables(config, model).values()


def take_tables(config: ReparamConfig, model: nn.Module) -> None:
    """Have a config take tables in place of the heads that they are tied to, in place, where one of either is named."""
    if not config.ensure_weight_tying:
        return
    tables = _tables(config, model)
    taken = {table for head, table in tables.items() if _matches(config, head) or _matches(config, table)}
    if not taken:
        warnings.warn(
            "`ensure_weight_tying=True`, and `target_modules` names no embedding that shares its table with a head; leave it "
            "out, or name one.",
            ReparamWarning,
            stacklevel=2,
        )
        return
    if isinstance(config.target_modules, str):
        exact = (re.escape(table) for table in sorted(taken))
        config.target_modules = "|".join([f"(?:{config.target_modules})", *exact])
    else:
        names: set[str] = {*(config.target_modules or ()), *taken}
        config.target_modules = names  # type: ignore[assignment]  # PEFT makes sets of lists, too
    config.choose(name for name, _ in model.named_modules() if name not in tables and config.is_among(name))


def heads_of(config: ReparamConfig, model: nn.Module, names: Iterable[str]) -> dict[str, list[nn.Module]]:
    """The heads that the products of some targets are to serve, too, by the name of the target."""
    tables = _tables(config, model) if config.ensure_weight_tying else {}
    heads: dict[str, list[nn.Module]] = {name: [] for name in names if name in tables.values()}
    for head, table in tables.items():
        if table in heads:
            heads[table].append(model.get_submodule(head))
    return heads


def tie_heads(config: ReparamConfig, model: nn.Module, table: ReparamLayer) -> None:
    """Where a config asks for it, have heads whose weight is an embedding's compute with what has its place; in place."""
    if config.ensure_weight_tying and isinstance(table.base_layer, nn.Embedding):
        for name, head in list(model.named_modules()):
            if type(head) is nn.Linear and head.weight is table.base_layer.weight:
                set_module(model, name, TiedHead(head, table).train(head.training))


def untie_heads(model: nn.Module) -> None:
    """Give heads their linear layers back whose embedding has its table again; in place."""
    present = {id(module) for module in model.modules()}
    for name, head in list(model.named_modules()):
        if isinstance(head, TiedHead):
            table = head.table if id(head.table) in present else getattr(head.table, "base_layer", head.table)
            if isinstance(table, nn.Embedding):
                set_module(model, name, head.untied(table.get_parameter("weight")))


def _tables(config: ReparamConfig, model: nn.Module) -> dict[str, str]:
    """The tied heads of a model that a config does not exclude."""
    return {
        head: table
        for head, table in tied_heads(model).items()
        if not isinstance(BaseTuner._check_target_module_exists(config, head), _ExcludedModule)
    }


def _matches(config: ReparamConfig, name: str) -> bool:
    matched = BaseTuner._check_target_module_exists(config, name)
    return bool(matched) and not isinstance(matched, _ExcludedModule)
