"""What transformers and PEFT would do to a model with factorised layers without asking: saved, resized, a LoRA put on it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from typing import Any

from peft import LoraConfig, LoraModel, PeftConfig, PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from ..config.reparam_config import ReparamConfig
from ..layers.factorized import FactorizedModule
from ..runtime.hosts import extend
from ..runtime.restoring import unchanged_on_error
from ..standalone.cards import uploading, write_card
from .layer import ReparamLayer, reparam_layers

EMBEDDINGS_POSITION = 3  # of `save_embedding_layers` among the arguments of `save_pretrained`, after the folder
LORA_ON_ADAPTER = (
    "PEFT cannot put another adapter around it. Make a standalone model, `model.to_standalone()`, and put the LoRA on that; or "
    "train one with `HealingTrainer(..., lora=LoraConfig(...))`"
)


def register_host_checks() -> None:
    """Put the checks of this file before the methods of PEFT and transformers that need them. Idempotent."""
    extend(PreTrainedModel, "save_pretrained", _saving)
    extend(PushToHubMixin, "_upload_modified_files", uploading)
    extend(PreTrainedModel, "resize_token_embeddings", _resizing)
    extend(PeftModel, "load_adapter", _loading)
    extend(PeftModel, "save_pretrained", _saving_adapter)
    extend(LoraModel, "_prepare_model", _aimed)


class AdapterConfigs(dict[str, PeftConfig]):
    """The configs of a model's adapters. One of another PEFT method cannot take the place of one of ours.

    PEFT keeps one dict for all tuners around a model: a LoRA of the same name would take our config's place in it unasked.
    """

    def __setitem__(self, adapter_name: str, config: PeftConfig) -> None:
        self._check(adapter_name, config)
        super().__setitem__(adapter_name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        added = dict(*args, **kwargs)
        for adapter_name, config in added.items():
            self._check(adapter_name, config)
        super().update(added)

    def _check(self, adapter_name: str, config: PeftConfig) -> None:
        if isinstance(self.get(adapter_name), ReparamConfig) and not isinstance(config, ReparamConfig):
            raise ValueError(
                f"adapter {adapter_name!r} of the model is one of a ReparamConfig, which a {type(config).__name__} cannot take "
                f"the place of; {LORA_ON_ADAPTER}."
            )


def changed_along(model: nn.Module, configs: Mapping[str, PeftConfig]) -> list[object]:
    """What changes along with a model, for a snapshot of it: the configs of its adapters, and what its layers wait for."""
    return [*configs.values(), *(layer.arrivals for _, layer in reparam_layers(model))]


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        is_new = adapter_name not in self.peft_config  # else `from_pretrained` has added it, and the tuner takes it away
        has_ours = any(isinstance(config, ReparamConfig) for config in self.peft_config.values())
        if is_new and has_ours and kwargs.get("keep") is not None:
            raise ValueError("`load_adapter` takes no `keep`; load another size with `PeftModel.from_pretrained(…, keep=…)`.")
        along = changed_along(self, self.peft_config)
        with unchanged_on_error(self, along) if is_new and has_ours else nullcontext():
            return original(self, model_id, adapter_name, *args, **kwargs)

    return load_adapter


def _saving_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        # PEFT asks for embeddings where a head is among the targets, and some models of audio know none.
        if all(isinstance(config, ReparamConfig) for config in self.peft_config.values()) and not has_embeddings(
            self.get_base_model()
        ):
            kwargs = {"save_embedding_layers": False, **kwargs} if len(args) < EMBEDDINGS_POSITION else kwargs
        return original(self, save_directory, *args, **kwargs)

    return save_pretrained


def has_embeddings(model: Any) -> bool:
    """Whether a model knows its input embeddings, for which PEFT asks; some models of audio and images raise there."""
    try:
        return hasattr(model, "get_input_embeddings") and model.get_input_embeddings() is not None
    except NotImplementedError:
        return False


def _saving(original: Callable[..., None]) -> Callable[..., None]:
    def save_pretrained(
        self: PreTrainedModel, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        check_saving(self)
        original(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_card(self, save_directory)

    return save_pretrained


def check_saving(model: PreTrainedModel) -> None:
    """Raise `ValueError` where `save_pretrained` of a base model would write a checkpoint of layers that nobody can load.

    transformers would load random layers from it, with no more than a warning.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # saves the adapter alone
        return
    name = next((name for name, _ in reparam_layers(model)), None)
    if name is not None:
        raise ValueError(
            f"the base model of an adapter cannot be saved as an ordinary one: {name} has factors in place of its weight, and "
            "transformers would load random weights. Call `save_pretrained` of the PeftModel for the adapter, "
            "`model.to_standalone().save_pretrained(…)` for a compressed model without PEFT, or "
            "`model.merge_and_unload().save_pretrained(…)` for a dense one."
        )


def _resizing(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def resize_token_embeddings(
        self: PreTrainedModel,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> nn.Module:
        fixed = _fixed_table(self)
        if fixed is None:
            return original(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        size, multiple = self.config.get_text_config().vocab_size, pad_to_multiple_of or 1
        if math.ceil((new_num_tokens or size) / multiple) * multiple != size:
            raise ValueError(
                f"the {fixed}, so that they cannot be resized; nothing was changed. Resize the base model before it is "
                "compressed, or the dense model that `merge_and_unload()` gives."
            )
        return self.get_input_embeddings()

    return resize_token_embeddings


def _fixed_table(model: PreTrainedModel) -> str | None:
    """Which embeddings transformers cannot resize, so that it would stop half way; None: it can."""
    if not any(isinstance(module, (ReparamLayer, FactorizedModule)) for module in model.modules()):
        return None
    for kind, module in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if isinstance(module, (ReparamLayer, FactorizedModule)):
            return f"{kind} embeddings are factorised"
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{kind} embeddings are saved whole by the adapter"
    return None


def _aimed(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(self: LoraModel, peft_config: LoraConfig, model: nn.Module) -> None:
        try:
            _check_lora(self, peft_config, model)
        except ValueError:
            for name in [name for name, config in self.peft_config.items() if config is peft_config]:
                if len(self.peft_config) > 1:
                    del self.peft_config[name]
            raise
        original(self, peft_config, model)
        aim_at_factors(self, peft_config, model)

    return prepare


def _check_lora(tuner: LoraModel, config: LoraConfig, model: nn.Module) -> None:
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    for name, layer in reparam_layers(model):
        is_linear = everything and isinstance(layer.base_layer, nn.Linear)
        if is_linear or tuner._check_target_module_exists(config, name):
            raise ValueError(f"{name}: the layer is factorised in an adapter, and {LORA_ON_ADAPTER}.")


def aim_at_factors(tuner: LoraModel, config: LoraConfig, model: nn.Module) -> None:
    """Where a LoRA's targets are factorised layers of a standalone model, make their factors the targets, in its config.

    Each of the linear layers that a factorised one consists of gets a LoRA, so that merging keeps its rank and its size.
    `rank_pattern` and `alpha_pattern` of a layer hold for both of its factors.

    Raises:
        ValueError: the LoRA comes from a checkpoint, in which targets are named as they are here.
    """
    if not config.target_modules or not any(isinstance(module, FactorizedModule) for module in model.modules()):
        return
    matched = {name: m for name, m in model.named_modules() if name and tuner._check_target_module_exists(config, name)}
    factorized = {name: module for name, module in matched.items() if isinstance(module, FactorizedModule)}
    if not factorized:
        return
    if config.inference_mode:
        raise ValueError(
            f"{next(iter(factorized))}: the layer is factorised, and the LoRA that is loaded was trained on a dense one. Merge "
            "it into the dense model before that is compressed."
        )
    pieces = {
        name: [f"{name}.{piece}" for piece in module.pieces if piece not in module.coded] for name, module in factorized.items()
    }
    config.target_modules = sorted((matched.keys() - factorized.keys()).union(*pieces.values()))
    config.rank_pattern = _of_pieces(config.rank_pattern or {}, pieces, matched.keys() - factorized.keys())
    config.alpha_pattern = _of_pieces(config.alpha_pattern or {}, pieces, matched.keys() - factorized.keys())


def _of_pieces(patterns: dict[str, int], pieces: Mapping[str, list[str]], plain: AbstractSet[str]) -> dict[str, int]:
    """Patterns that say of the pieces of layers what they said of the layers; `plain`: names of the other targets."""
    keys = list(patterns)
    of_layer = {name: key for name in pieces if (key := get_pattern_key(keys, name)) in patterns}
    of_plain = {get_pattern_key(keys, name) for name in plain}
    kept = {key: value for key, value in patterns.items() if key in of_plain or key not in of_layer.values()}
    return kept | {re.escape(piece): patterns[key] for name, key in of_layer.items() for piece in pieces[name]}
