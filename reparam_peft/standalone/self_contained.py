"""Standalone checkpoints with the code that they need."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers.schemes import SCHEME_OF, SCHEMES, SMALLEST_SCALE
from ..runtime.files import write_whole
from .auto_classes import auto_classes
from .cards import write_card
from .checkpoint import CheckpointConfig, check_closed, with_layers_in_config
from .quantization import state_dict
from .specification import BITS, CORRECTION_BITS

MODULE = "modeling_reparam"


def save_self_contained(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a standalone model with the code that it needs, for `from_pretrained(…, trust_remote_code=True)`.

    Args:
        model: what `to_standalone()` returns.
        folder: with `modeling_reparam.py`, a reader that imports torch and transformers only, and a README.md.

    Raises:
        ValueError: the model has no factorised layers, or such of parameters; or its tables are quantised.
    """
    described = getattr(model.config, "quantization_config", None)
    if not isinstance(described, CheckpointConfig):
        raise ValueError("only a standalone model can be saved with its code; call `to_standalone` first.")
    if described.tables is not None:
        raise ValueError(
            "the code of self-contained checkpoints does not read tables in few bits; save a standalone checkpoint, or leave "
            "out `quantize_tables`."
        )
    check_closed(model, "the code of self-contained checkpoints")
    plain = with_layers_in_config(model, described)
    del plain.hf_quantizer
    scheme, state = described.quantization, None
    if described.is_in_few_bits:
        state = {name: _as_bits(name, tensor) for name, tensor in _state(model, scheme).items()}
    if scheme is not None:
        plain.config.reparam_layers = {name: _in_bits(layer, scheme) for name, layer in described.layers.items()}
    classes = {auto: made.__name__ for auto, made in auto_classes(model).items()}
    plain.config.auto_map = {auto: f"{MODULE}.Reparam{name}" for auto, name in classes.items()}
    plain.save_pretrained(folder, state_dict=state)
    plain.config.architectures = [f"Reparam{type(model).__name__}"]  # by which vLLM and SGLang choose the class
    plain.config.save_pretrained(folder)
    text = resources.files(__package__).joinpath(f"{MODULE}.py").read_text(encoding="utf-8")
    for name in sorted(set(classes.values())):
        text += f"\n\nclass Reparam{name}(WithFactors, transformers.{name}):\n    pass\n"
    write_whole(Path(folder) / f"{MODULE}.py", text)
    write_card(model, folder, self_contained=True)


def _state(model: PreTrainedModel, scheme: str | None) -> dict[str, Tensor]:
    """What a file holds of a model in few bits; of tables that are shared once."""
    state = model.state_dict() if scheme is None else state_dict(model, scheme)
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}


def _as_bits(name: str, tensor: Tensor) -> Tensor:
    """Scales as whole numbers of the same bits, as the reader holds them."""
    is_scale = name.rpartition(".")[2] in {scheme.scale for scheme in SCHEMES.values()}
    return tensor.clamp(min=SMALLEST_SCALE).view(torch.int32) if is_scale else tensor


def _in_bits(layer: dict[str, Any], scheme: str) -> dict[str, Any]:
    """What the reader is told of a layer whose matrices in the model's dtype were quantised."""
    bits = next(bits for bits, known in SCHEME_OF.items() if known is SCHEMES[scheme])
    if BITS not in layer:
        return {**layer, BITS: bits}
    return {CORRECTION_BITS: bits, **layer} if layer["form"] == "corrected" else layer
