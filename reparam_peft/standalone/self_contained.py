"""Standalone checkpoints with the code that they need."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from transformers import PreTrainedModel

from ..runtime.files import write_whole
from .auto_classes import auto_classes
from .cards import write_card
from .checkpoint import CheckpointConfig, check_closed, with_layers_in_config

MODULE = "modeling_reparam"


def save_self_contained(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a standalone model with the code that it needs, for `from_pretrained(…, trust_remote_code=True)`.

    Args:
        model: what `to_standalone()` returns.
        folder: with `modeling_reparam.py`, a reader that imports torch and transformers only, and a README.md.

    Raises:
        ValueError: the model has no factorised layers, or such of parameters; or it is quantised.
    """
    described = getattr(model.config, "quantization_config", None)
    if not isinstance(described, CheckpointConfig):
        raise ValueError("only a standalone model can be saved with its code; call `to_standalone` first.")
    if described.is_in_few_bits:
        raise ValueError(
            "the code of self-contained checkpoints does not read factors, matrices or tables in few bits; save a standalone "
            "checkpoint, or keep all numbers in the model's dtype."
        )
    check_closed(model, "the code of self-contained checkpoints")
    plain = with_layers_in_config(model, described)
    del plain.hf_quantizer
    classes = {auto: made.__name__ for auto, made in auto_classes(model).items()}
    plain.config.auto_map = {auto: f"{MODULE}.Reparam{name}" for auto, name in classes.items()}
    plain.save_pretrained(folder)
    plain.config.architectures = [f"Reparam{type(model).__name__}"]  # by which vLLM and SGLang choose the class
    plain.config.save_pretrained(folder)
    text = resources.files(__package__).joinpath(f"{MODULE}.py").read_text(encoding="utf-8")
    for name in sorted(set(classes.values())):
        text += f"\n\nclass Reparam{name}(WithFactors, transformers.{name}):\n    pass\n"
    write_whole(Path(folder) / f"{MODULE}.py", text)
    write_card(model, folder, self_contained=True)
