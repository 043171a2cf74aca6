"""The libraries around us: their private names that the package relies on, and what differs between their versions.

They have no places to plug in for all that a compressed model needs, so that methods of theirs are extended or replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce, wraps
from importlib import import_module
from types import ModuleType
from typing import Any

import peft.functional
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTuner
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear_layers
from peft.utils.other import _set_trainable as set_trainable
from torch import Tensor

__all__ = [
    "ExcludedModule",
    "extend",
    "include_all_linear_layers",
    "is_untried",
    "names_that_went",
    "serve_state_dicts",
    "set_trainable",
]
EXTENDED = "__extended_by_reparam__"
NEWEST_TRIED = {"transformers": "5.24", "peft": "0.21"}


@dataclass(frozen=True)
class PrivateName:
    """A private name of another library that the package uses, extends or replaces.

    Attributes:
        owner: "module" or "module:Class" that has it.
        name: the attribute, or what the module's code gives its objects.
        reason: what it is needed for, since there is no public way.
        since: the version of the library that brought it, where the package serves earlier ones without it.
    """

    owner: str
    name: str
    reason: str
    since: str | None = None

    @property
    def library(self) -> str:
        """The library's name."""
        return self.owner.partition(".")[0].partition(":")[0]

    def is_there(self) -> bool:
        """Whether the library that is installed has the name; True, too, where it is older than the name."""
        if self.since is not None and _version(self.library) < Version(self.since):
            return True
        module_name, _, class_name = self.owner.partition(":")
        try:
            module = import_module(module_name)
            owner = reduce(getattr, class_name.split("."), module) if class_name else module
        except (ImportError, AttributeError):
            return False
        return hasattr(owner, self.name) or self.name in inspect.getsource(module)


def _names(owner: str, since: str | None = None, **reasons: str) -> tuple[PrivateName, ...]:
    return tuple(PrivateName(owner, name, reason, since) for name, reason in reasons.items())


PRIVATE_NAMES = (
    *_names(
        "peft.tuners.tuners_utils",
        _ExcludedModule="tells names that `exclude_modules` takes from those that match nothing",
        _maybe_include_all_linear_layers="what PEFT takes for 'all-linear'",
    ),
    *_names("peft.utils.other", _set_trainable="norms and routers that are trained are saved by `modules_to_save`"),
    *_names(
        "peft.tuners.tuners_utils:BaseTuner",
        _cast_adapter_dtype="the last step of loading, after which W is dropped; and factors are cast for training only",
        _check_target_module_exists="which modules a config takes",
        _check_tied_modules="one product may serve both ends of a tied table",
        _get_module_names_tied_with_embedding="one product may serve both ends of a tied table",
        _get_tied_target_modules="one product may serve both ends of a tied table",
        _create_and_replace="PEFT's own place for a tuner to put in its layers",
        _inject_parameters="parameters are opened into layers, which PEFT would wrap",
        _prepare_adapter_config="targets by default depend on the model, not on its config alone",
        _prepare_model="PEFT's own place for what is done before the first layer is replaced",
        _replace_module="a layer brings its own weights, on its own device",
        _unload_and_optionally_merge="merging is checked before the first layer is merged",
    ),
    *_names(
        "peft.tuners.tuners_utils:BaseTuner",
        since="0.21",
        _get_adapter_state_dict="PEFT's own place for what an adapter saves",
        _remap_adapter_state_dict_for_load="PEFT's own place for what an adapter loads",
        _remove_adapter_name_from_key="PEFT's own place for the names of tensors in files",
    ),
    *_names(
        "peft.tuners.tuners_utils:BaseTunerLayer",
        _cast_input_dtype="inputs come in the base model's dtype, factors train in float32",
        _get_base_layer_device_and_dtype="the base layer may have dropped its weight",
    ),
    *_names("peft.tuners.lora:LoraModel", _prepare_model="aims a LoRA at the factors of a standalone model"),
    *_names("peft:PeftModel", _enable_peft_forward_hooks="batches of several adapters are refused before the forward pass"),
    *_names("peft:PeftModel", _upload_modified_files="`push_to_hub` puts the repository's card over ours at the end"),
    *_names(
        "transformers:PreTrainedModel",
        _from_config="`from_config` of a standalone checkpoint makes factorised layers",
        _keys_to_ignore_on_load_missing="tensors that a whole checkpoint may lack",
        _keys_to_ignore_on_save="tensors that a whole checkpoint may lack",
        _no_split_modules="names the blocks of a model",
        _tp_size="a plan of dense layers would split factorised ones among so many processes",
    ),
    *_names(
        "transformers.modeling_utils",
        _is_hf_initialized="keeps loading from initialising what it has no names for; tells what a file brought",
        _is_quantized="loading marks a model by it as one that cannot be trained or cast",
    ),
    *_names(
        "transformers.core_model_loading",
        _weight_conversions="saving would rename, split and join tensors of some architectures, factors too",
    ),
    *_names("transformers.integrations.peft", _hf_peft_config_loaded="a model that transformers put adapters on itself"),
    *_names(
        "transformers.configuration_utils",
        _commit_hash="is not what a model computes, for its fingerprint",
        _experts_implementation="whether experts of a layer are computed one by one or together",
        _name_or_path="is not what a model computes, for its fingerprint",
    ),
    *_names(
        "transformers.quantizers.base:HfQuantizer",
        _process_model_after_weight_loading="transformers' own place for a quantizer's checks of what has arrived",
        _process_model_before_weight_loading="transformers' own place for a quantizer to put in its layers",
    ),
    *_names("transformers.integrations.moe", _apply_gate="what fused experts do between their two matrices"),
    *_names(
        "transformers:Trainer",
        _get_num_items_in_batch="the loss is a mean over all batches of a step",
        _get_output_dir="where a checkpoint goes",
        _load_best_model="checkpoints of healing hold what is trained",
        _load_from_checkpoint="checkpoints of healing hold what is trained",
        _prepare_inputs="evaluation without labels",
        _save_checkpoint="a checkpoint is noted as whole",
        _save_optimizer_and_scheduler="an error in one process ends all",
        _save_rng_state="an error in one process ends all",
        _save_scaler="an error in one process ends all",
    ),
    *_names("transformers.models.auto.auto_factory", _model_mapping="which Auto class makes a model of this class"),
    *_names(
        "accelerate.hooks",
        _hf_hook="layers that accelerate moves between devices",
        _old_forward="what such a layer computes",
    ),
    *_names(
        "torch.nn.modules.module:Module",
        _backward_hooks="layers with hooks of others",
        _backward_pre_hooks="layers with hooks of others",
        _buffers="tensors are put in without a copy, and under names that hold dots",
        _compiled_call_impl="a compiled model is run as it is while hooks are set",
        _forward_hooks="layers with hooks of others",
        _forward_pre_hooks="layers with hooks of others",
        _load_from_state_dict="PyTorch's own place for how a module loads",
        _modules="an opened parameter and its layers have one name",
        _parameters="tensors are put in without a copy, also while parameters begin on the meta device",
        _save_to_state_dict="PyTorch's own place for how a module saves",
    ),
    *_names(
        "torch.nn.modules.module",
        _global_backward_hooks="hooks on all modules, which are to see each call",
        _global_backward_pre_hooks="hooks on all modules, which are to see each call",
        _global_forward_hooks="hooks on all modules, which are to see each call",
        _global_forward_pre_hooks="hooks on all modules, which are to see each call",
    ),
    *_names(
        "torch.nn.modules.conv:Conv2d",
        _conv_forward="a layer of another class that convolves as PyTorch does",
        _reversed_padding_repeated_twice="padding that is not of zeros",
    ),
    *_names(
        "torch:Tensor",
        _is_view="a change in place of a view takes its place in the graph, and with it that of its hooks",
        _version="whether a tensor was written to since",
    ),
    *_names("torch:ops.aten", _unsafe_view="the same memory as a tensor that is no view"),
    *_names("torch._dynamo.eval_frame:OptimizedModule", _orig_mod="the model in a compiled one"),
    *_names(
        "torch:ops.mkldnn",
        _is_mkldnn_bf16_supported="which products of bfloat16 a CPU computes fast",
        _linear_pointwise="the operator that PyTorch's compiler emits for linear layers on a CPU, for single rows",
    ),
    *_names("torch", _C="what a computed weight tells of itself without being computed"),
    *_names("torch._ops:OpOverload", _schema="which operators write to their arguments"),
    *_names("torch.utils", _python_dispatch="tensors made of others, for fingerprints", _pytree="nested arguments of modules"),
    *_names("torch", _dynamo="the class of compiled models"),
)


def names_that_went() -> list[str]:
    """A sentence for each private name that the installed libraries have no more."""
    return [
        f"{private.library} {_version(private.library)} has no `{private.name}` in {private.owner.replace(':', '.')} any more, "
        f"which the package needs: {private.reason}."
        for private in PRIVATE_NAMES
        if not private.is_there()
    ]


def is_untried() -> bool:
    """Whether transformers or PEFT is newer than the newest that the package was tried with."""
    return any(_version(name).release[:2] > Version(version).release for name, version in NEWEST_TRIED.items())


def _version(library: str) -> Version:
    return Version(import_module(library).__version__)


def extend(owner: type | ModuleType, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of a class by what `make` returns of it; does nothing where that was done before.

    Args:
        owner: whose own method it is, or class method; or a module, with a function.
        name: of the method.
        make: takes the method as a function of `self` (or of the class), and returns one of the same arguments.
    """
    defined = vars(owner)[name]
    is_class_method = isinstance(defined, classmethod)
    original = defined.__func__ if is_class_method else defined
    if getattr(original, EXTENDED, False):
        return
    extended = wraps(original)(make(original))
    setattr(extended, EXTENDED, True)
    setattr(owner, name, classmethod(extended) if is_class_method else extended)


def serve_state_dicts(tuner: Any, peft_type: str) -> None:
    """Have a PEFT before 0.21 ask a tuner what its adapters save and load. Idempotent.

    Later versions ask each tuner; until then two functions had a branch for each method. They are replaced wherever PEFT and
    transformers look them up.

    Args:
        tuner: class with `_get_adapter_state_dict`, `_remap_adapter_state_dict_for_load` and `_remove_adapter_name_from_key`,
            as of PEFT 0.21.
        peft_type: whose adapters are meant.
    """
    if hasattr(BaseTuner, "_get_adapter_state_dict"):
        return
    for module in (peft, peft.functional, peft.peft_model, peft.utils, peft.utils.save_and_load):
        extend(module, "get_peft_model_state_dict", partial(_saving, tuner, peft_type))
        extend(module, "set_peft_model_state_dict", partial(_loading, tuner, peft_type))


def _saving(tuner: Any, peft_type: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def get_peft_model_state_dict(
        model: Any,
        state_dict: dict[str, Tensor] | None = None,
        adapter_name: str = "default",
        unwrap_compiled: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
        config = model.peft_config[adapter_name]
        if config.peft_type != peft_type:
            return original(model, state_dict, adapter_name, False, *args, **kwargs)
        state = dict(model.state_dict() if state_dict is None else state_dict)
        others = [name for name in model.peft_config if name != adapter_name]
        of_tuner = tuner._get_adapter_state_dict(model, config, adapter_name, state, others)
        rest = {key: tensor for key, tensor in state.items() if key not in of_tuner}
        stored = {tuner._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in of_tuner.items()}
        return stored | original(model, rest, adapter_name, False, *args, **kwargs)

    return get_peft_model_state_dict


def _loading(tuner: Any, peft_type: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        config, state = model.peft_config[adapter_name], dict(peft_model_state_dict)
        if config.peft_type == peft_type:
            # What fits, under the names that it has in files: PEFT's own function puts in the adapter's name.
            fitting = tuner._remap_adapter_state_dict_for_load(model, config, adapter_name, state)
            state = {tuner._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in fitting.items()}
        return original(model, state, adapter_name, *args, **kwargs)

    return set_peft_model_state_dict
