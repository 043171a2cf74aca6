"""Standalone checkpoints: plain transformers models with factorised layers, through transformers' registry of quantizers.

The format is described in docs/checkpoints.md.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..arguments import ReparamWarning
from ..config.fields import Fields
from ..layers.attention import open_attentions_of
from ..layers.coded import CodedLinear
from ..layers.factorized import MARKER, FactorizedModule
from ..layers.parameters import Reading
from ..layers.schemes import SCHEMES, check_scheme
from ..runtime.modules import is_offloaded, set_module
from .contents import DAMAGED, check_files
from .heads import check_tied, tie, tied_in
from .opened import candidates, check_readings, expect_marks, mark_opened, open_named, opened_names
from .parallel import check_unsplit
from .quantization import finish, prepare, state_dict
from .specification import BITS, check_specification, module_of
from .tables import TABLES, check_tables, finish_tables, prepare_tables, tables_state

METHOD = "reparam"
FORMAT_VERSION = 2
HOSTS_NAMES = 1  # the version before: with the names, and in the layout, that transformers gives tensors in its own files
ALIGNMENT = 64  # bytes; of PyTorch's allocator for CPUs
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointConfig(QuantizationConfigMixin):
    """What config.json says, under `quantization_config`, of the factorised layers of a standalone checkpoint.

    Args:
        layers: name of a module → what is stored of it, as `specification.specification_of` gives it.
        format_version: of the checkpoint.
        quant_method: "reparam", by which transformers finds this class.
        quantization: how the matrices of the factors are stored, one of `quantization.SCHEMES`; None: in the model's dtype.
        parameters: name of a parameter of which layers were made → how its dimensions make matrices, a pattern of `Reading`.
        tables: name of an embedding, or of the head → "int8", how its table is stored; None: all in the model's dtype.
        tied: name of a head → name of the factorised embedding whose table is its weight, too.

    Attributes:
        being_loaded: whether `from_pretrained` is making the model, in which it will place the factorised layers itself.
        made_with: the resolved config of the adapter that it was made of, for the model card; None: not known.

    Raises:
        ValueError: another version, or anything that is not as described.
    """

    quantization: str | None = None
    parameters: Mapping[str, str] | None = None
    tables: dict[str, str] | None = None
    tied: dict[str, str] | None = None
    being_loaded = False
    made_with: Fields | None = None

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        quantization: str | None = None,
        parameters: Mapping[str, str] | None = None,
        tables: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        if format_version not in (HOSTS_NAMES, FORMAT_VERSION):
            raise ValueError(
                f"`format_version` of the checkpoint is {format_version!r}, and this version of reparam_peft reads "
                f"{HOSTS_NAMES} and {FORMAT_VERSION}. Upgrade it: pip install --upgrade reparam_peft."
            )
        if unknown or quant_method != METHOD:
            raise ValueError(f"`quantization_config` of config.json holds unknown fields {sorted(unknown)}; {DAMAGED}.")
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError(f"`layers` in config.json must name the factorised layers, got {layers!r}; {DAMAGED}.")
        for name, layer in layers.items():
            check_specification(name, layer)
        self.layers = {name: dict(layer) for name, layer in layers.items()}
        self.format_version = format_version
        self.quant_method = quant_method  # type: ignore[assignment]  # an enum, which no other library can add to
        if parameters:  # else config.json says nothing of it
            _check_parameters(parameters)
            self.parameters = dict(parameters)
        if quantization is not None:  # likewise
            if quantization not in SCHEMES:
                raise ValueError(
                    f"`quantization` in config.json must be one of {list(SCHEMES)}, got {quantization!r}; {DAMAGED}."
                )
            self.quantization = quantization
        if tables is not None:
            if not isinstance(tables, Mapping) or not tables or any(scheme != TABLES for scheme in tables.values()):
                raise ValueError(f"`tables` in config.json must name tables that are {TABLES!r}, got {tables!r}; {DAMAGED}.")
            self.tables = dict(tables)
        if tied:
            check_tied(tied, layers)
            self.tied = dict(tied)

    @property
    def is_quantized(self) -> bool:
        """Whether factors or tables were quantised as a whole."""
        return self.quantization is not None or self.tables is not None

    @property
    def is_in_few_bits(self) -> bool:
        """Whether anything is stored in few bits."""
        return self.is_quantized or any(BITS in layer for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """What config.json says."""
        return {key: value for key, value in super().to_dict().items() if key not in ("being_loaded", "made_with")}


def _check_parameters(parameters: Any) -> None:
    if not isinstance(parameters, Mapping) or not all(isinstance(name, str) and name for name in parameters):
        raise ValueError(f"`parameters` in config.json must map names to patterns, got {parameters!r}; {DAMAGED}.")
    for name, pattern in parameters.items():
        try:
            Reading.parse(pattern)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: `parameters` in config.json: {error} {DAMAGED[0].upper()}{DAMAGED[1:]}.") from error


class CheckpointLoader(HfQuantizer):
    """Builds the factorised layers on meta, before transformers fills in what the checkpoint holds: no dense weight exists."""

    is_trainable = is_compileable = True

    @property
    def described(self) -> CheckpointConfig:
        """What config.json says of the factorised layers."""
        return cast(CheckpointConfig, self.quantization_config)

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the factors themselves can be trained: else a LoRA on them."""
        return not self.described.is_quantized

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.quantization_config, CheckpointConfig):
            self.quantization_config.being_loaded = True  # what follows makes the model

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        self.described.being_loaded = False
        layers, scheme = self.described.layers, self.described.quantization
        check_scheme(scheme)
        open_named(model, layers, self.described.parameters or {})
        expect_marks(model)
        layers_here = place_factorized(model, layers)
        if self.described.tied:
            self.described.tied = tie(model, self.described.tied) or None
        if scheme is not None:
            for name in layers_here:
                prepare(cast(FactorizedModule, model.get_submodule(name)), scheme)
        tables = self.described.tables
        if tables is not None:
            check_tables(TABLES)
            tables = {here: TABLES for name in tables if (here := _name_in(model, name)) is not None}
            self.dtype_of_tables = prepare_tables(model, tables)
            self.described.tables = tables or None  # another head may lack them
        if checkpoint_files is not None:
            check_files(checkpoint_files, model, self._conversions(get_model_conversion_mapping(model)), tables or ())
        self.described.layers = layers_here  # under this model's names, for when it is saved

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """What transformers is to make of names and tensors in the files: nothing, but for those of earlier versions."""
        return self._conversions(weight_conversions)

    def _conversions(self, of_host: list[Any]) -> list[Any]:
        return of_host if self.described.format_version == HOSTS_NAMES else []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        check_unsplit(model, getattr(model, "_tp_size", None))
        keep_names(model)
        self.described.format_version = FORMAT_VERSION
        _align(model)
        _warn_of_broken(model)
        scheme = self.described.quantization
        for name, module in list(model.named_modules()):
            if isinstance(module, FactorizedModule):
                _check_content(name, module)
                marker = module.weight.zero_()  # `_init_weights` of some models fills it
                if scheme is not None:
                    finish(name, module, scheme, marker.dtype)
                if not (marker.is_meta or is_offloaded(module)):  # accelerate would look for it in the files again
                    module.unmark()
        if self.described.tables:
            finish_tables(model, self.described.tables, self.dtype_of_tables)
        mark_opened(model)
        check_readings(model)
        if not self.described.is_quantized:
            mark_unquantized(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        for name, module in model.named_modules():
            for key, tensor in module.state_dict().items() if isinstance(module, FactorizedModule) else ():
                if tensor.numel() == 0:
                    raise ValueError(
                        f"{name}.{key}: the tensor is empty, as of a model that is sharded. Gather the model first."
                    )
        scheme, tables = self.described.quantization, self.described.tables
        if not self.described.is_quantized:
            return None, {}
        state = model.state_dict() if scheme is None else state_dict(model, scheme)
        for key in model.all_tied_weights_keys if tables else ():
            state.pop(key, None)
        return state | tables_state(model, tables or ()), {}


def register_checkpoints() -> None:
    """Make `from_pretrained` know standalone checkpoints. Idempotent."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(CheckpointConfig)
        register_quantizer(METHOD)(CheckpointLoader)


def place_factorized(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Put factorised modules without memory in the places of layers, and return the layers under this model's names.

    Args:
        model: may be the base of the model that was saved, or have another head.
        layers: name of a module → {"rank", "form", "bias", …}, as in config.json.

    Raises:
        ValueError: the model has none of them, one of its base is missing, or one cannot be factorised so.
    """
    names_here = {name: _name_in(model, name) for name in layers}
    layers_here = {here: dict(layers[name]) for name, here in names_here.items() if here is not None}
    if not layers_here:
        raise ValueError(f"a {type(model).__name__} has none of the factorised layers {list(layers)[:3]} …; {DAMAGED}.")
    for name, specification in layers_here.items():
        set_module(model, name, module_of(name, model.get_submodule(name), specification))
    return layers_here


def with_layers_in_config(model: PreTrainedModel, described: CheckpointConfig) -> PreTrainedModel:
    """The same model with a config of its own that names the factorised layers, but not this package's loader."""
    plain = copy.copy(model)  # its own attributes only
    plain.config = copy.deepcopy(model.config)
    del plain.config.quantization_config
    plain.config.reparam_layers = described.layers
    return plain


def keep_names(model: PreTrainedModel) -> None:
    """Have a model saved under the names of its own tensors, as they are.

    For some architectures transformers renames, splits or joins what it writes, by patterns of names. They also catch factors,
    and tear apart what is factorised in part: one of three matrices that share a tensor in the files, say.
    """
    vars(model)["_weight_conversions"] = []


def check_closed(model: PreTrainedModel, form: str) -> None:
    """Raise `ValueError` where a model has opened parameters, which a form of checkpoint cannot hold."""
    opened = [*opened_names(model), *open_attentions_of(model), *tied_in(model)]
    if opened:
        raise ValueError(
            f"{opened[0]}: {form} knows factorised layers only, and this was made into layers. Save a standalone "
            "checkpoint, or leave it out: of `target_parameters` (`--no-experts`), or with `exclude_modules`."
        )


def mark_unquantized(model: PreTrainedModel) -> None:
    """Take away what tells transformers that a model cannot be trained or cast."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
    for name in ("quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        vars(model).pop(name, None)
    vars(model)["is_quantized"] = False


def _name_in(model: PreTrainedModel, name: str) -> str | None:
    """What a layer of the model that was saved is called in this one, which may be its base, or have another head; or None.

    Raises:
        ValueError: it belongs to the base model, which has no such layer.
    """
    for candidate in candidates(model, name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    if name.startswith(f"{model.base_model_prefix}."):
        raise ValueError(f"{name}: config.json says that this layer is factorised, but there is none; {DAMAGED}.")
    return None


def _align(model: PreTrainedModel) -> None:
    """Move matrices to memory as PyTorch aligns it: from within a file's pages, products of them would round differently."""
    coded = (buffer for module in model.modules() if isinstance(module, CodedLinear) for buffer in module.tensors.values())
    for parameter in chain(model.parameters(), coded):
        if parameter.device.type == "cpu" and parameter.ndim > 1 and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def _warn_of_broken(model: PreTrainedModel) -> None:
    """Warn of NaN and inf beside the factors: they may come from the base model, of which nothing else reads a row, say."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FactorizedModule))
    broken = [name for name, value in model.state_dict().items() if not (name.startswith(inside) or _is_finite(value))]
    if broken:
        warnings.warn(
            f"{model.name_or_path}: tensors of the checkpoint hold NaN or infinite values, and so may what the model computes: "
            f"{', '.join(broken[:3])}{' …' if len(broken) > 3 else ''}. Unless the base model has them, too, {DAMAGED}.",
            ReparamWarning,
            stacklevel=2,
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor inf in a tensor; of one that is elsewhere, sharded or of few bits, yes."""
    if type(tensor) is not Tensor or tensor.is_meta or tensor.dtype not in FLOATS or not tensor.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())  # without copies, unlike `isfinite().all()`


def _check_content(name: str, module: FactorizedModule) -> None:
    """Raise `ValueError` where factors were not loaded, or hold NaN or inf, or a mask does not fit the rank."""
    for key, tensor in module.state_dict(keep_vars=True).items():
        if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)):  # which loaders of transformers set
            raise ValueError(f"{name}.{key}: the tensor was not loaded from the checkpoint; {DAMAGED}.")
    for key, tensor in module.state_dict(keep_vars=True).items():
        if key != MARKER and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{name}.{key}: the tensor in the checkpoint holds NaN or infinite values; {DAMAGED}.")
    try:
        module.refresh()
    except ValueError as error:
        raise ValueError(f"{name}: {error} {DAMAGED[0].upper()}{DAMAGED[1:]}.") from error
