"""A LoRA on the factors of a compressed model, which is trained in their place and merged into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from ..layers.coded import CodedLinear
from ..layers.factorized import weight_of
from ..runtime.restoring import unchanged_on_error
from ..tuner.layer import reparam_layers
from .checks import IN_FEW_BITS

LORA = "healing"  # name of the adapter within the factors
HONOURED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "task_type", "inference_mode"}


@contextmanager
def adapted(model: PeftModel, config: LoraConfig) -> Iterator[None]:
    """Within this block a LoRA on the linear layers of the factors is trained; afterwards it is merged into them."""
    with unchanged_on_error(model):
        for parent, child, linear in _inner(model, nn.Linear):
            layer = LoraLinear(linear.requires_grad_(False), LORA, config, r=config.r, lora_alpha=config.lora_alpha)
            setattr(parent, child, layer.train(linear.training))
    try:
        yield
    finally:
        with unchanged_on_error(model):
            _merge(_inner(model, LoraLinear))


@contextmanager
def merged(model: PeftModel) -> Iterator[None]:
    """Within this block the factors are as they would be with the LoRA merged; afterwards they are as they were, to the bit."""
    inner = _inner(model, LoraLinear)
    before = [layer.get_base_layer().weight.data for _, _, layer in inner]
    try:
        _merge(inner)
        yield
    finally:
        for (parent, child, layer), weight in zip(inner, before, strict=True):
            layer.get_base_layer().weight.data = weight
            setattr(parent, child, layer)


def _merge(inner: list[tuple[nn.Module, str, Any]]) -> None:
    """Put the linear layers beneath LoRAs in their place, changed to compute what both compute: W + ΔW, in new tensors.

    All of these are computed before the first is put in place.
    """
    weights = [merged_weight(layer).data for _, _, layer in inner]
    for (parent, child, layer), weight in zip(inner, weights, strict=True):
        base = layer.get_base_layer()
        base.weight.data = weight
        setattr(parent, child, base)


def merged_weight(layer: LoraLinear) -> Tensor:
    """W + ΔW (out, in), what a linear layer and the LoRA on it compute together, in the dtype of W."""
    weight = weight_of(layer.get_base_layer())
    return weight + layer.get_delta_weight(LORA).to(weight.dtype)


def _inner(model: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Modules of a kind within the factors of the active adapter, with parent and name."""
    return [
        (parent, name, child)
        for _, layer in reparam_layers(model)
        for adapter in layer.active_adapters
        for parent in layer.reparam_factors[adapter].modules()
        for name, child in parent.named_children()
        if isinstance(child, kind) and not isinstance(parent, LoraLinear)
    ]


def check_lora(model: PeftModel, lora: Any) -> None:
    """Raise where a LoRA could not be trained in place of the factors, or not as its config says."""
    if lora is None:
        return
    if not isinstance(lora, LoraConfig):
        raise TypeError(f"`lora` must be a LoraConfig, got a {type(lora).__name__}.")
    if lora.target_modules or lora.modules_to_save:
        raise ValueError("`lora` must name no modules: its targets are the factors.")
    fields, defaults = lora.to_dict(), LoraConfig().to_dict()
    ignored = [name for name in sorted(fields) if name not in HONOURED and fields[name] != defaults[name]]
    if lora.init_lora_weights not in (True, "gaussian"):
        ignored.append("init_lora_weights")
    if ignored:
        raise ValueError(f"`lora` must be a plain LoRA, in which `{ignored[0]}` has no effect; leave it out.")
    if not _inner(model, nn.Linear):
        if _inner(model, CodedLinear):
            raise ValueError(f"`lora` is merged into factors when it is trained, and {IN_FEW_BITS}.")
        raise ValueError("`lora` needs factors that are linear layers, and the model has none; train the factors themselves.")
