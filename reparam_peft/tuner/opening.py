"""Parameters that are no layer's weight, such as fused experts: which a config takes, opened into layers, closed again."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..arguments import ReparamWarning, listed
from ..config.fields import ALL_EXPERTS
from ..config.reparam_config import ReparamConfig
from ..layers.attention import close_attentions, open_attentions, open_attentions_of, projections_of
from ..layers.experts import ViewLinear, close_experts, fused_parameters, is_open, open_experts
from ..layers.kinds import layer_kind
from ..layers.parameters import OpenedParameter, Reading, close_parameter, open_parameter, opened_parameters, readings_of
from ..layers.wrapper import Wrapper
from ..runtime.hosts import ExcludedModule
from ..runtime.modules import is_offloaded, naming, parameter_owners
from .attentions import outputs_of_attentions, parts_of_attentions
from .tying import untie_heads

MOST_NAMED = 6  # in a message


def open_parameters(config: ReparamConfig, model: nn.Module, opens_attentions: bool = True) -> None:
    """Open the parameters that a config takes, in place, and write the names of all that it takes into the config.

    Those of an `nn.MultiheadAttention` that it takes as a module are among them.

    How a parameter's dimensions make a matrix is what the config says, or what is seen when the model runs on the example that
    models of transformers have (`dummy_inputs`).

    Raises:
        ValueError: `target_parameters` matches nothing; a parameter cannot be opened, or its pattern is not that of the model.
    """
    fused = fused_parameters(model)
    alone = config.takes_parameters_alone()
    parts = parts_of_attentions(config, model) if opens_attentions and not alone else []
    taken = dict.fromkeys(parts, "") | _taken(config, model, fused)
    patterns = {name: pattern for name, pattern in taken.items() if not _is_excluded(config, name)}
    owners = parameter_owners(model)
    for name in patterns:
        prefix, _, key = name.rpartition(".")
        owner = model.get_submodule(prefix)
        with naming(name):
            check_openable(owner, key, owners.get(id(owner._parameters.get(key)), []))
    open_attentions(model, [*patterns, *(outputs_of_attentions(config, model) if opens_attentions else ())])
    opened = opened_parameters(model)
    raw = {name: patterns[name] for name in patterns if name not in fused and not _is_weight_of_layer(model, name)}
    resolved = _readings(model, {name: pattern for name, pattern in raw.items() if name not in opened})
    for name in patterns:
        key = name.rpartition(".")[2]
        if name in resolved:
            open_parameter(model, name, resolved[name])
        elif name in fused and not is_open(fused[name], key):
            open_experts(fused[name], key)
    if raw:
        present = opened_parameters(model)
        described = {name: present[name].reading.pattern() for name in raw}
        config.target_parameters = {name: described.get(name, "") for name in patterns}
    elif config.target_parameters:
        config.target_parameters = list(patterns)


def close_parameters(model: nn.Module) -> None:
    """Close all opened parameters whose layers are linear ones again, and give heads their tables back, in place."""
    for name, experts in fused_parameters(model).items():
        key = name.rpartition(".")[2]
        if is_open(experts, key) and _are_plain(experts.get_submodule(key).children()):
            close_experts(experts, key)
    for name, opened in opened_parameters(model).items():
        if _are_plain(opened.layers):
            close_parameter(model, name)
    close_attentions(model)
    untie_heads(model)


def own_memory(model: nn.Module) -> None:
    """Give matrices that stay dense memory of their own, where others of their parameter have dropped theirs; in place."""
    opened = [list(module.children()) for module in model.modules() if isinstance(module, (nn.ModuleList, OpenedParameter))]
    for layers in opened:
        views = [layer for layer in layers if isinstance(layer, ViewLinear)]
        if len(views) == len(layers):
            continue
        for layer in views:
            if layer.weight.untyped_storage().nbytes() > layer.weight.nbytes and not layer.weight.is_meta:
                layer.weight.data = layer.weight.data.clone()


def _are_plain(layers: Iterable[nn.Module]) -> bool:
    return all(isinstance(layer, ViewLinear) for layer in layers)


def _taken(config: ReparamConfig, model: nn.Module, fused: Mapping[str, nn.Module]) -> dict[str, str]:
    """The names of the parameters that `target_parameters` takes, in order, with the patterns that it gives them, or ""."""
    asked = config.target_parameters
    if not asked:
        return {}
    opened = opened_parameters(model)
    open_ones = {*fused, *opened}
    # By the names that they had before the layers were factorised, whose own are then gone, or those of a part.
    weights = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Wrapper)]
    own = [name for name in [*(name for name, _ in model.named_parameters()), *weights] if not _is_inside(name, open_ones)]
    names = [*own, *fused, *opened]
    if asked == ALL_EXPERTS:
        taken = dict.fromkeys(experts_of(model), "")
        if not taken:
            raise ValueError(
                f"`target_parameters={ALL_EXPERTS!r}`, and the model has no fused experts that can be opened; leave it out."
            )
        return taken
    is_regex = isinstance(asked, str)
    by_ending = {asked: ""} if isinstance(asked, str) else dict(asked) if isinstance(asked, dict) else dict.fromkeys(asked, "")
    found = {ending: [name for name in names if _takes(ending, name, is_regex)] for ending in by_ending}
    unused = sorted(ending for ending, matched in found.items() if not matched)
    if unused:
        message = (
            f"`target_parameters` {unused} match no parameter of the model; "
            f"{f'its fused experts are {listed(list(fused)[:MOST_NAMED])}' if fused else 'it has no fused experts'}."
        )
        if not (any(found.values()) or config.target_modules):
            raise ValueError(message)
        warnings.warn(message, ReparamWarning, stacklevel=2)  # as PEFT does, which takes what is there
    return {name: by_ending[ending] for ending, matched in found.items() for name in matched}


def _is_excluded(config: ReparamConfig, name: str) -> bool:
    """Whether a config leaves out a whole parameter, by its name or one of a module that is saved whole, as PEFT matches."""
    config = copy.copy(config)
    config.target_modules = []  # PEFT asks for the others first, and for none where there are parameters only
    return isinstance(BaseTuner._check_target_module_exists(config, name), ExcludedModule)


def _is_inside(name: str, modules: Container[str]) -> bool:
    """Whether a parameter is one of these modules or parameters, or in one of them."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts) + 1))


def _takes(pattern: str, name: str, is_regex: bool) -> bool:
    """Whether an ending of a name, or a regular expression for the whole of it, takes a parameter; as for modules in PEFT."""
    return bool(re.fullmatch(pattern, name)) if is_regex else name == pattern or name.endswith(f".{pattern}")


def experts_of(model: nn.Module) -> list[str]:
    """The parameters of a model that hold the matrices of experts, open or not.

    Those that are behind no interface have three dimensions, and are told by what they or their owners are called.
    """
    names = list(fused_parameters(model))
    tensors: list[tuple[str, Any]] = [*model.named_parameters(), *opened_parameters(model).items()]
    for name, tensor in tensors:
        prefix, _, key = name.rpartition(".")
        owner = model.get_submodule(prefix)
        is_own = key in owner._parameters or isinstance(owner._modules.get(key), OpenedParameter)
        if is_own and len(tensor.shape) == 3 and "expert" in f"{type(owner).__name__}.{name}".lower() and name not in names:
            names.append(name)
    return names


def _is_weight_of_layer(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a layer that can be factorised as it is."""
    owner, _, key = name.rpartition(".")
    with suppress(TypeError, ValueError):
        module: Any = model.get_submodule(owner)
        if key == "weight" and isinstance(module, Wrapper):
            return True
        return key == "weight" and layer_kind(getattr(module, "base_layer", module)) is not None
    return False


def check_openable(owner: nn.Module, key: str, names: list[str]) -> None:
    """Raise `ValueError` where a parameter cannot be opened.

    Args:
        owner: the module that it is in.
        key: its name there.
        names: all its names in the model.
    """
    if isinstance(owner, ParametrizationList):
        raise ValueError(
            "a parametrisation computes a weight of this parameter. Leave it out, or call "
            "`torch.nn.utils.parametrize.remove_parametrizations` first and name the layer."
        )
    parameter = owner._parameters.get(key)
    held = (value for values in vars(owner).values() if isinstance(values, (list, tuple)) for value in values)
    if parameter is not None and any(value is parameter for value in held):
        raise ValueError(
            f"a {type(owner).__name__} keeps it in a Python list, too, by which it would go on to compute with the original. "
            "Leave it out."
        )
    if len(names) > 1 and not names[0].endswith(".weight"):
        raise ValueError(f"the parameter is shared ({', '.join(names)}) and cannot be made into layers in one place.")
    if is_offloaded(owner):
        raise ValueError(
            "accelerate moves the parameter to where it computes at each pass (it is offloaded), and could not move an opened "
            "one. Load the model without offloading."
        )


def _readings(model: nn.Module, patterns: Mapping[str, str]) -> dict[str, Reading]:
    """How each of some parameters makes matrices."""
    parameters = {name: model.get_parameter(name) for name in patterns}
    for name, parameter in parameters.items():
        with naming(name):
            if parameter.ndim < 2 or not parameter.is_floating_point():
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} and dtype {parameter.dtype} makes no matrix; leave it out "
                    "of `target_parameters`."
                )
    of_attentions = {
        name: reading
        for owner in open_attentions_of(model)
        for key, reading in projections_of(model.get_submodule(owner)).items()
        if (name := f"{owner}.{key}".lstrip(".")) in patterns
    }
    given = of_attentions | {name: Reading.parse(pattern) for name, pattern in patterns.items() if pattern}
    seen = readings_of(model, {name: parameter for name, parameter in parameters.items() if name not in of_attentions})
    resolved = {}
    for name, parameter in parameters.items():
        with naming(name):
            reading = given.get(name) or seen.get(name) or _default(parameter)
            reading.check(parameter.shape)
            if name in given and name in seen:
                if not reading.agrees(seen[name]):
                    raise ValueError(
                        f"`target_parameters` says {patterns[name]!r}, and the model reads it as {seen[name].pattern()!r}; "
                        "leave the pattern out, or, if it is of a file, load that again: it was changed."
                    )
                reading = seen[name]
            resolved[name] = reading
    return resolved


def _default(parameter: nn.Parameter) -> Reading:
    """How a parameter makes matrices of which nothing is known: as in `nn.Linear`, and one for each first index of more."""
    return Reading(0, 1, 1, False) if parameter.ndim == 2 else Reading(1, 1, parameter.ndim - 2)
