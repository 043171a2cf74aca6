"""Factors that compute with the numbers that they will be stored as in few bits, while what is trained stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import Trainer

from ..calibration.statistics import Statistics
from ..layers.factorized import FactorizedModule, weight_of
from ..layers.schemes import SCHEMES, Scheme, check_scheme
from ..planning.ranks import is_nested
from ..runtime.restoring import unchanged_on_error
from ..standalone.quantization import linears_of
from ..tuner.layer import reparam_layers
from ..tuner.model import config_of
from ..tuner.rounding import CalibratedRounding
from .inner_lora import merged_weight

NUMBERS = "numbers_in_few_bits"  # attribute of a linear layer that computes with them


class StraightThrough(torch.autograd.Function):
    """The numbers in few bits of a matrix, whose gradients are taken for those of the matrix itself.

    Source: Bengio et al. 2013, arXiv:1308.3432.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, numbers: Tensor) -> Tensor:
        return numbers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def stored_numbers(matrix: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The numbers that a checkpoint in few bits holds of a matrix: each the nearest one.

    Args:
        matrix: shape (out, in), any floating dtype, which is that of the result.
        scheme: how it is stored.
        dtype: of the model, in which it is rounded.
    """
    tensors = scheme.quantize(matrix.detach().to(dtype))
    # A number is a level times a scale in float32, as the libraries multiply them, and then in the dtype of the model.
    return scheme.numbers(tensors, matrix.shape).float().to(dtype).to(matrix.dtype)


@contextmanager
def computing_in_few_bits(model: PeftModel, quantize: str | None) -> Iterator[None]:
    """Within this block the factors of a model compute as those of `to_standalone(quantize=…)` will; gradients flow to them.

    They are rounded once, when the block is entered. The parameters stay what and where they are.

    Args:
        model: with an active reparam adapter. Linear layers change their class for as long as the block lasts.
        quantize: "int8" or "int4"; None: nothing is rounded.
    """
    with ExitStack() as stack:
        if quantize is not None:
            for layer, dtype in _rounded_layers(model):
                matrix = merged_weight(layer) if isinstance(layer, LoraLinear) else weight_of(layer)
                numbers = stored_numbers(matrix, SCHEMES[quantize], dtype)
                own: Any = type(layer)
                stack.callback(_put_back, layer, own)
                vars(layer)[NUMBERS] = StraightThrough.apply(matrix, numbers)
                layer.__class__ = _class_in_few_bits(own)
        yield


def round_factors(model: PeftModel, quantize: str, statistics: Statistics) -> None:
    """Round the factors of a model with the statistics of its calibration, in place; they stay floats.

    From such a start training is left with the error that rounding cannot make up for. In the form "factors" the inner basis
    is another one afterwards.

    Args:
        model: with an active reparam adapter.
        quantize: "int8" or "int4".
        statistics: that `check_quantize` takes.
    """
    rounding = CalibratedRounding(statistics)
    with unchanged_on_error(model):
        for name, module, _ in _modules(model):
            rounding(name, module, SCHEMES[quantize])


def note_quantize(model: PeftModel, quantize: str | None) -> None:
    """Note in the config of the active adapter for which numbers its factors are trained."""
    config_of(model, model.active_adapter).healed_for = quantize


def check_quantize(model: PeftModel, quantize: Any, statistics: Statistics | None, lora: Any) -> None:
    """Raise unless factors can be trained to be stored in few bits.

    Raises:
        ValueError: there is no such scheme, it would round nothing, or a LoRA has dropout; or statistics are of another model,
            have no effect, or would leave nothing of the smaller sizes of an adapter.
        ImportError: its library is missing.
    """
    check_scheme(quantize)
    if quantize is None:
        if statistics is not None:
            raise ValueError("`statistics` have an effect with `quantize` only; give both or neither.")
        return
    if not any(True for _ in _rounded_layers(model)):
        raise ValueError(
            f"`quantize={quantize!r}` rounds linear layers, and the model has no factors that are some; leave it out."
        )
    if lora is not None and lora.lora_dropout:
        raise ValueError("`lora` is rounded together with the factors, without its dropout; leave out `lora_dropout`.")
    if statistics is None:
        return
    if is_nested(config_of(model, model.active_adapter)):
        raise ValueError("`statistics` round in another basis, in which the adapter has no smaller sizes; leave them out.")
    for name, module, _ in _modules(model):
        CalibratedRounding(statistics).check_module(name, module)


def check_whole(trainer: Trainer, quantize: str | None) -> None:
    """Raise `ValueError` where a trainer would split matrices, or put copies of them on several devices."""
    if quantize is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.args.n_gpu > 1):
        raise ValueError(
            "`quantize` needs a process for each device, in which matrices are whole: leave out FSDP and DeepSpeed, and start "
            "with `accelerate launch` where there are several GPUs."
        )


class _InFewBits:
    """What is mixed into the class of a linear layer that computes with other numbers than its parameter has."""

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, vars(self)[NUMBERS])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@cache
def _class_in_few_bits(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"{base.__name__}InFewBits", (_InFewBits, base), {})


def _put_back(layer: nn.Module, own: type[nn.Module]) -> None:
    """Have a layer compute with its parameter again."""
    layer.__class__ = own
    vars(layer).pop(NUMBERS, None)


def _modules(model: PeftModel) -> Iterator[tuple[str, FactorizedModule, torch.dtype]]:
    """The products of the active adapter, with their names in the base model and the dtype that they are stored in."""
    for name, layer in reparam_layers(model.get_base_model()):
        for adapter in layer.active_adapters:
            yield name, layer.factorized(adapter), layer.base_dtype


def _rounded_layers(model: PeftModel) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """The layers of the active adapter whose matrices are stored in few bits, a LoRA included; and in which dtype they are."""
    for _, module, dtype in _modules(model):
        rounded = {linear for _, linear in linears_of(module)}
        for piece in module.pieces.values():
            if (piece.get_base_layer() if isinstance(piece, LoraLinear) else piece) in rounded:
                yield piece, dtype
