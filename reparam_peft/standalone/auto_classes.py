"""Which of transformers' Auto classes make a model."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto


def auto_class(model: PreTrainedModel) -> str:
    """Name of transformers' Auto class that makes models of this one's class."""
    autos = [auto for auto, made in auto_classes(model).items() if made is type(model)]
    return min(autos, key=lambda auto: auto == "AutoModelForPreTraining", default=type(model).__name__)  # that only if no other


def auto_classes(model: PreTrainedModel) -> dict[str, type[PreTrainedModel]]:
    """Auto classes by name, with what they make of this architecture: the model's class, or its base."""
    wanted = {type(model), type(getattr(model, model.base_model_prefix, model))}
    autos = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    made = {name: auto._model_mapping.get(type(model.config), None) for name, auto in autos.items()}
    return {name: one for name, one in made.items() if one in wanted}
