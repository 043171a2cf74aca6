"""Compression while loading: `from_pretrained(dense, quantization_config=ReparamConfig(…))`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from ..config.few_bits import check_one_shot
from ..config.reparam_config import ReparamConfig
from ..layers.factorized import FactorizedModule
from ..layers.kinds import layer_kind
from ..runtime.modules import naming, set_module
from ..standalone.checkpoint import CheckpointConfig, CheckpointLoader
from ..standalone.specification import mark, specification_of
from ..tuner.data_free import check_data_free, check_standalone, data_free_product
from ..tuner.selection import select_targets
from ..tuner.targets import Target


class CompressingLoader(CheckpointLoader):
    """Factorises each target as its weight arrives, so that memory holds one dense target at a time.

    The model is a standalone one then, as `get_peft_model` and `to_standalone` make it.
    """

    def __init__(self, quantization_config: ReparamConfig, **kwargs: Any) -> None:
        check_standalone(quantization_config)
        check_one_shot(quantization_config, "compression while loading")
        check_data_free(quantization_config)
        super().__init__(quantization_config, **kwargs)  # type: ignore[arg-type]  # it reads no more than `quant_method`
        self.config = quantization_config
        self.targets: dict[str, Target] = {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("`device_map` puts modules on disk; compress with `reparam_peft.compress_checkpoint` instead.")
        if self.config.target_parameters:
            raise ValueError(
                "`target_parameters` cannot be compressed while loading, since transformers puts the experts of a checkpoint "
                "together as they arrive; load the model first, then call `get_peft_model`."
            )
        if self.config.ensure_weight_tying:
            raise ValueError(
                "`ensure_weight_tying=True` cannot be compressed while loading, since tables are tied after it; load the model "
                "first, then call `get_peft_model`."
            )
        chosen = select_targets(model, self.config, "default", loading=True)
        self.targets = {name: target for name, target in chosen.items() if target.rank is not None}
        tied = {key for pair in model.all_tied_weights_keys.items() for key in pair}
        for name in self.targets:
            if f"{name}.weight" in tied:
                raise ValueError(f"{name}: the weight is shared with another module; leave it out with `exclude_modules`.")

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        return weight_conversions  # the files are those of a dense model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name.endswith(".weight") and param_name.removesuffix(".weight") in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Factorize(self)

    def factorize(self, model: PreTrainedModel, name: str, weight: Tensor) -> FactorizedModule:
        """Put the factors of a weight in place of a layer.

        Raises:
            ValueError: the weight is a part of one that is sharded, or holds NaN or inf.
        """
        layer, target = model.get_submodule(name), self.targets[name]
        expected = tuple(layer.get_parameter("weight").shape)
        with naming(name):
            if tuple(weight.shape) != expected:
                raise ValueError(f"the weight arrives with shape {tuple(weight.shape)}, not {expected}.")
            kind = layer_kind(layer)
            product = data_free_product(kind.matrix(weight), target, self.config)
        bias = getattr(layer, "bias", None)
        module = kind.factorized(
            layer,
            product.rank,
            target.storage.form,
            bias is not None,
            device=torch.device("meta"),
            dtype=weight.dtype,
        )
        module.set_factors(product.factors)
        if bias is not None:
            module.bias = bias  # loaded already, or still on meta and about to be
        mark(module, name, kind, weight.shape)
        for tensor in module.state_dict(keep_vars=True).values():
            vars(tensor)["_is_hf_initialized"] = not tensor.is_meta
        set_module(model, name, module.train(layer.training))
        return module

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        layers = {n: specification_of(m) for n, m in model.named_modules() if isinstance(m, FactorizedModule)}
        if not layers:  # all targets stay dense
            self.remove_quantization_config(model)
            return
        self.quantization_config = model.config.quantization_config = CheckpointConfig(layers)
        made_with = self.quantization_config.made_with = copy.copy(self.config)
        made_with.rank_pattern = {name: layer["rank"] for name, layer in layers.items()}
        made_with.base_model_name_or_path = model.name_or_path
        super()._process_model_after_weight_loading(model, **kwargs)


class _Factorize(ConversionOps):
    """What transformers calls with the weight of a target."""

    def __init__(self, loader: CompressingLoader) -> None:
        self.loader = loader

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        model = kwargs["model"]
        arrived = {}
        for key, value in input_dict.items():
            arrived[key] = value[0] if isinstance(value, list) else value
            if self.loader.param_needs_quantization(model, key):
                arrived[key] = self.loader.factorize(model, key.removesuffix(".weight"), arrived[key]).weight
        return arrived


def register_loading() -> None:
    """Make `from_pretrained` take a `ReparamConfig` as `quantization_config`. Idempotent."""
    if ReparamConfig.quant_method not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(ReparamConfig.quant_method)(CompressingLoader)
