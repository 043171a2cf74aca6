"""A few numbers of the base model, by which an adapter tells the base that it was made of from another one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..arguments import ReparamWarning
from ..config.reparam_config import ReparamConfig
from ..layers.kinds import is_quantized

PARAMETERS = 32  # of which a number each is kept
ELEMENTS = 64  # of a parameter, among which the number of largest magnitude is chosen
TOLERANCE = 0.01  # relative; rounding to bfloat16 changes a number by less than 0.4 %
SMALLEST = 1e-7  # absolute, for numbers that float16 can hardly hold


def sample_base(
    model: nn.Module, targets: Collection[str], modules_to_save: Iterable[str] | None
) -> dict[str, list[float]] | None:
    """Name of a parameter of the base model → index in the flattened parameter, and the number there.

    Taken are up to `PARAMETERS` parameters, evenly spread over those that the adapter leaves as they are, and of each the
    largest in magnitude of `ELEMENTS` numbers.

    Args:
        model: the base model, with or without adapters.
        targets: names of the adapter's targets, which are left out.
        modules_to_save: names, or endings of names, of what it saves whole, which is left out too.

    Returns:
        None where there is nothing to take.
    """
    saved = tuple(f".{name}." for name in modules_to_save or ())
    readable = [
        (name, tensor)
        for name, tensor in _base_parameters(model)
        if name.rpartition(".")[0] not in targets and not any(part in f".{name}" for part in saved)
    ]
    step = max(1, math.ceil(len(readable) / PARAMETERS))
    sample: dict[str, list[float]] = {}
    for name, tensor in readable[::step]:
        indices = torch.arange(0, tensor.numel(), math.ceil(tensor.numel() / ELEMENTS), device=tensor.device)
        numbers = tensor.detach().flatten()[indices].double()
        largest = int(numbers.abs().argmax())
        number = float(numbers[largest])
        if number != 0 and math.isfinite(number):  # biases of zeros tell nothing
            sample[name] = [int(indices[largest]), number]
    return sample or None


def check_base(model: nn.Module, config: ReparamConfig) -> None:
    """Warn where a base model differs from the one that an adapter was made of; what holds no data yet is not compared."""
    here = dict(_base_parameters(model)) if config.base_sample else {}
    for name, (index, number) in (config.base_sample or {}).items():
        if name not in here:
            continue
        tensor, position = here[name], int(index)
        value = float(tensor.detach().flatten()[position]) if position < tensor.numel() else None
        if value is None or not abs(value - number) <= max(TOLERANCE * abs(number), SMALLEST):
            made_of = config.base_model_name_or_path or "a model without a name"
            warnings.warn(
                f"The base model is not the one that the adapter was made of ({made_of}): number {position} of {name!r} is "
                f"{'missing' if value is None else format(value, '.6g')} here, and was {number:.6g}. The factors stand for "
                "weights of that model, so that the result is likely to be of no use; load the adapter onto that base.",
                ReparamWarning,
                stacklevel=2,
            )
            return


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of floating dtype that hold data, outside of what adapters add, under their names in the base model."""
    unread = {id(p) for module in model.modules() if is_quantized(module) for p in module.parameters(recurse=False)}
    added: list[str] = []
    for name, module in model.named_modules():
        is_wrapper = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for child, _ in module.named_children():
            if is_wrapper and child not in ("base_layer", "original_module"):
                added.append(f"{name}.{child}.")
    prefixes = tuple(added)
    for name, parameter in model.named_parameters():
        floating = parameter.is_floating_point() and parameter.dtype.itemsize > 1
        holds_data = not parameter.is_meta and parameter.numel() > 0
        if floating and holds_data and id(parameter) not in unread and not name.startswith(prefixes):
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter
