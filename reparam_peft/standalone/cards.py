"""The model card of standalone models: written with each checkpoint, and with what goes to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..config.model_card import BEGIN, write_standalone_card
from ..runtime.files import write_whole
from .auto_classes import auto_class
from .checkpoint import CheckpointConfig


def write_card(model: PreTrainedModel, folder: str | Path, self_contained: bool = False) -> None:
    """Write the README.md of a standalone model that has been saved; does nothing for any other model.

    A model that was loaded from a folder keeps the card of that folder. What others have written into a card stays.

    Args:
        model: as `to_standalone()` returns it, or as it was loaded.
        folder: of the checkpoint.
        self_contained: whether the code that it needs is in it.
    """
    described = getattr(model.config, "quantization_config", None)
    if not isinstance(described, CheckpointConfig):
        return
    earlier, path = Path(model.name_or_path or "") / "README.md", Path(folder) / "README.md"
    if described.made_with is None and not self_contained and not path.exists() and earlier.is_file():
        card = ModelCard.load(earlier)
        if BEGIN in card.text:
            write_whole(path, str(card))
            return
    write_standalone_card(folder, described.made_with, auto_class(model), len(described.layers), self_contained)


def uploading(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_upload_modified_files`, with the card of a standalone model in place of the one that was just made for the Hub."""

    def upload(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, PreTrainedModel):
            write_card(self, working_dir)
        return original(self, working_dir, *args, **kwargs)

    return upload
