"""How much of a model a config reaches, and what it leaves out."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..arguments import ReparamWarning
from ..config.fields import ALL_EXPERTS
from ..config.reparam_config import ReparamConfig
from .opening import experts_of

LEAST = 0.5  # of the parameters in matrices outside of embeddings, below which is told what is left out
MOST_NAMED = 3


def warn_of_reach(model: nn.Module, targets: Collection[str], config: ReparamConfig, takes_all: bool) -> None:
    """Warn where targets are less than half of a model's matrices outside of embeddings, with what is left out.

    Where a config names its modules one by one, that is what was asked for, unless the model has fused experts, which no name
    of a module reaches.

    Args:
        model: that holds the targets, none of them replaced yet.
        targets: names of modules.
        config: that chose them.
        takes_all: whether it left that to the package.
    """
    experts = experts_of(model)
    if any(name in (config.target_parameters or ()) for name in experts):
        experts = []
    has_adapters = any(isinstance(module, BaseTunerLayer) for module in model.modules())  # which were told of
    if has_adapters or not (takes_all or experts):
        return
    left_out: Counter[str] = Counter()
    total = 0
    tables = {id(table) for table in _embeddings(model)}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in tables:
            continue
        total += parameter.numel()
        owner = name.rpartition(".")[0].removesuffix(".base_layer")
        if owner not in targets:
            left_out[re.sub(r"\.\d+(?=\.|$)", ".*", name)] += parameter.numel()
    missed = sum(left_out.values())
    if not total or missed <= (1 - LEAST) * total:
        return
    remedy = f"To compress its experts too, set `target_parameters={ALL_EXPERTS!r}`. " if experts else ""
    largest = ", ".join(f"{name} ({size:,})" for name, size in left_out.most_common(MOST_NAMED))
    warnings.warn(
        f"The config reaches {(total - missed) / total:.0%} of the parameters in matrices outside of embeddings. Left out are "
        f"{largest}{' and more' if len(left_out) > MOST_NAMED else ''}. {remedy}`keep={config.keep:g}` is of what it reaches.",
        ReparamWarning,
        stacklevel=3,
    )


def _embeddings(model: nn.Module) -> list[nn.Parameter]:
    """The tables of a model, and the head that predicts tokens."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [p for module in [*modules, *([head] if isinstance(head, nn.Module) else [])] for p in module.parameters()]
