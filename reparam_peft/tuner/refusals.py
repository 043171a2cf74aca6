"""Modules that cannot be factorised, and why: by what they compute, and by where they stand in a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from typing import TypeAlias

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers.kinds import is_quantized, layer_kind
from ..runtime.modules import abridged

Refusal: TypeAlias = TypeError | ValueError  # whose message is the reason and the remedy
WRITTEN = ValueError(
    "the model writes to its weight as it runs, which a product cannot follow. Name it in `target_modules` where the model is "
    "never run in a mode that does."
)


def refused_by_kind(module: nn.Module) -> Refusal | None:
    """Why a module cannot be factorised, whatever the model; None: it can, or an adapter is around it."""
    if isinstance(module, BaseTunerLayer):
        return None
    if hasattr(module._parameters.get("weight"), "placements"):
        return ValueError(
            "its weight is split among processes (a DTensor of tensor parallelism or FSDP), so that no process has the matrix. "
            "Load the base model whole, without `tp_plan` and `distributed_config`, and split it after this."
        )
    try:
        layer_kind(module)
    except (TypeError, ValueError) as error:
        return error
    return None


def refused_by_place(
    model: nn.Module,
    name: str,
    module: nn.Module,
    owners: Mapping[int, Sequence[str]],
    in_lists: Container[int],
    may_share: bool,
) -> Refusal | None:
    """Why a module of a known kind cannot be factorised in its model; None: it can.

    Args:
        model: that it is in.
        name: of the module.
        module: itself.
        owners: names of each parameter of the model, by its id.
        in_lists: ids of modules that are kept in lists of Python, too.
        may_share: whether others may have its weight, too: it stays, or they get the product.
    """
    if isinstance(module, BaseTunerLayer):
        return None
    if id(module) in in_lists:
        return ValueError(
            "the model keeps it in a list of Python, too, by which it would go on to call the original; leave it out with "
            "`exclude_modules`."
        )
    if is_quantized(module) or may_share:
        return None
    weight = module.get_parameter("weight")
    names = owners[id(weight)]
    if weight.is_meta:  # of a hollow model, in which a loader has yet to tie what its class says
        pairs = getattr(model, "all_tied_weights_keys", None) or {}
        names = next(([*pair] for pair in pairs.items() if f"{name}.weight" in pair), names)
    if len(names) > 1:
        return ValueError(
            f"the weight is shared ({', '.join(names)}) and cannot be dropped in one place. Leave it out with "
            "`exclude_modules`, or untie it first: set `config.tie_word_embeddings = False` and give one of the modules a "
            "copy, `module.weight = nn.Parameter(module.weight.clone())`. One product for an embedding and its heads is made "
            "with `ensure_weight_tying=True`."
        )
    return None


def joint_error(refused: Mapping[str, Refusal]) -> Refusal:
    """One error for all modules that were asked for and cannot be factorised, with all names and reasons."""
    error_class = TypeError if all(isinstance(error, TypeError) for error in refused.values()) else ValueError
    if len(refused) == 1:
        ((name, error),) = refused.items()
        return error_class(f"{name}: {error}")
    reasons = "".join(f"\n- {', '.join(names)}: {reason}" for reason, names in _by_reason(refused).items())
    return error_class(f"{len(refused)} of the targets cannot be factorised.{reasons}")


def joint_warning(refused: Mapping[str, Refusal]) -> str:
    """What is said of all modules that stay dense because they cannot be factorised."""
    reasons = "".join(f"\n- {', '.join(abridged(names))}: {reason}" for reason, names in _by_reason(refused).items())
    return f"Modules that cannot be factorised stay dense ({len(refused)}):{reasons}"


def _by_reason(refused: Mapping[str, Refusal]) -> dict[str, list[str]]:
    names = defaultdict(list)
    for name, error in refused.items():
        names[str(error)].append(name)
    return names
