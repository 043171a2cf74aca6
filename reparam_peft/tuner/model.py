"""The PEFT tuner: finds the targets, factorises them, replaces them, and only then drops their weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.statistics import Statistics
from ..config.model_card import upload_with_section
from ..config.reparam_config import ReparamConfig
from ..defaults import DATA_FREE
from ..layers.schemes import SchemeName
from ..runtime.modules import naming
from ..runtime.restoring import Snapshot, unchanged_on_error
from ..standalone.tables import TableScheme
from .adapter_state import cast_to_base, check_whole, fit_to_model, names_in_model
from .arrivals import parameters_start_on_meta
from .awaited import factorize_awaited
from .base_sample import check_base, sample_base
from .conversion import standalone_model
from .copies import adapter_to_copy, copied, copy_saved_modules
from .data_free import factorize_targets, is_installing
from .host_checks import AdapterConfigs, changed_along, has_embeddings
from .layer import ReparamLayer, reparam_layer, reparam_layers
from .merging import check_base_weights, check_mergeable
from .opening import close_parameters, own_memory
from .reach import warn_of_reach
from .selection import names_targets, take_targets
from .sizes import SizeReport, size_report
from .targets import Target, check_targets, find_targets, is_target, record_targets, save_heads
from .tying import tie_heads


class ReparamModel(BaseTuner):
    """PEFT's tuner for `ReparamConfig`. Use it through `get_peft_model`, which returns a `PeftModel` around it.

    Nothing of the model is changed before every target is checked and every factor exists; an error leaves it as it was.
    """

    prefix = "reparam_"
    tuner_layer_cls = ReparamLayer
    # Of the injection under way: adapter, whether a loader is to bring factors, PEFT's state dict, the adapter that is copied.
    _injection: tuple[str, bool, dict[str, Tensor] | None, str | None]
    _targets: dict[str, Target]
    _awaits_factors = False  # whether a loader may have brought none, which the next forward pass finds out
    _is_cast_next = True  # whether PEFT calls `_cast_adapter_dtype` right after an injection
    _arriving = ""  # the adapter whose factors PEFT was handed, checked
    _before_injection: Snapshot | None = None  # which an error undoes, until the new adapter is cast

    def __init__(
        self,
        model: nn.Module,
        peft_config: ReparamConfig | dict[str, ReparamConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        # `PeftModel` gives a dict and casts the factors next; `inject_adapter_in_model` gives one config and does not.
        vars(self)["_is_cast_next"] = isinstance(peft_config, dict)
        with unchanged_on_error(model):
            super().__init__(model, cast(Any, peft_config), adapter_name, low_cpu_mem_usage, state_dict)
        self._is_cast_next = True  # after `add_adapter`

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's injection, with the factors computed before it and the original weights dropped after it.

        Raises:
            TypeError: a target is of a kind that cannot be factorised.
            ValueError: a weight is tied, holds no data, or holds NaN or inf; a rank is out of range; or the adapter cannot
                stand beside the ones that are there.
        """
        with self._undoing(adapter_name):
            self._before_injection = Snapshot(self, changed_along(self, self.peft_config))
            config = self._config(adapter_name)
            factors_follow = low_cpu_mem_usage or parameters_start_on_meta()
            source = None if factors_follow else adapter_to_copy(model, self._configs, adapter_name)
            loading = factors_follow or (source is None and config.loading)
            if not loading:
                # What is resolved below belongs to this model, not to a config that may be used for another one too.
                config = self.peft_config[adapter_name] = copy.deepcopy(config)
                save_heads(config)
            self._injection = (adapter_name, loading, state_dict, source)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            del self._injection
            self._awaits_factors |= loading
            self.record_resolved(adapter_name, vars(self).pop("_targets", {}))
            if source is not None:
                copy_saved_modules(model, source, adapter_name)
            if not isinstance(self.peft_config, AdapterConfigs):
                self.peft_config = AdapterConfigs(self.peft_config)
            self._drop_base_weights(model)
            if not self._is_cast_next:
                self._before_injection = None

    @contextmanager
    def _undoing(self, adapter_name: str) -> Iterator[None]:
        """Within this block an error takes a new adapter out of the model again."""
        with ExitStack() as on_error:
            on_error.callback(self._undo, adapter_name)
            yield
            on_error.pop_all()

    def _undo(self, adapter_name: str) -> None:
        """Take an adapter that is being added out of the model again."""
        before, self._before_injection = self._before_injection, None
        if before is not None:
            before.restore()
        if len(self.peft_config) > 1:  # transformers' models keep the dict from one adapter to the next
            self.peft_config.pop(adapter_name, None)

    def _unchanged_on_error(self) -> AbstractContextManager[None]:
        return unchanged_on_error(self, changed_along(self, self.peft_config))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # whose default targets depend on the model itself

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return super()._get_module_names_tied_with_embedding() if has_embeddings(self.model) else []

    # PEFT's own tuners narrow the type of the config, too.
    def _prepare_model(self, peft_config: ReparamConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Check and factorise all targets; PEFT calls this before it replaces the first."""
        adapter_name, loading, state_dict, source = self._injection
        takes_all = not names_targets(peft_config)
        if not loading and source is None:
            # A further adapter that starts from a product takes the bias that goes with it.
            peft_config.moved_bias |= any(layer.source_has_bias for _, layer in reparam_layers(model))
        if state_dict is None:
            targets = take_targets(peft_config, model, partial(is_target, peft_config))
        else:  # PEFT replaces what the state dict has keys of, and refuses `target_parameters` beside it
            names = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
            targets = find_targets(peft_config, model, names.__contains__)
        check_targets(targets, peft_config, model, adapter_name, loading)
        copies = None if source is None else copied(targets, source)
        if copies is not None:
            self._targets = copies
        elif loading:
            check_base(model, peft_config)
            self._targets = targets
        else:
            peft_config.base_sample = sample_base(model, targets, peft_config.modules_to_save)
            if not is_installing():  # else it was told before anything was computed
                warn_of_reach(model, targets, peft_config, takes_all)
            self._targets = factorize_targets(targets, peft_config)
        peft_config.rank_pattern, peft_config.form_pattern, peft_config.bit_pattern = (
            {},
            {},
            {},
        )  # until `record_resolved`: PEFT would try names in it as regular expressions

    def _inject_parameters(self, peft_config: ReparamConfig, **_: Any) -> list[str]:  # type: ignore[override]
        """The parameters that were opened; their layers are injected as modules."""
        names = list(peft_config.target_parameters or ())
        self.targeted_parameter_names += [name for name in names if name not in self.targeted_parameter_names]  # PEFT 0.20
        return names

    def _check_tied_modules(self, model: nn.Module, peft_config: ReparamConfig) -> None:
        if not peft_config.ensure_weight_tying:  # else `take_tables` sees to it
            super()._check_tied_modules(model, peft_config)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # a table that is merged is tied as before, or else refused

    @staticmethod
    def _check_target_module_exists(peft_config: ReparamConfig, key: str) -> Any:  # type: ignore[override]
        return is_target(peft_config, key)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: ReparamConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        planned = self._targets[current_key]
        if planned.rank is None:
            return
        layer = target if isinstance(target, ReparamLayer) else reparam_layer(target, planned.keeps_codes)
        self._targets[current_key] = replace(planned, product=None, copied=None)  # the layer is its only owner now
        layer.update_layer(
            adapter_name,
            planned.rank,
            planned.product if planned.copied is None else planned.copied,
            planned.storage,
            peft_config.inference_mode,
            planned.is_nested(peft_config),
        )
        if layer is not target:
            layer.name = current_key
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
            tie_heads(peft_config, self.model, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Both directions: the layers are built on the right device, and an unloaded base layer is already whole.
        setattr(parent, child_name, new_module.train(child.training))

    def _drop_base_weights(self, model: nn.Module) -> None:
        """Drop W where every adapter of the model has factors and none asks to keep it."""
        configs = self._configs
        if any(config.keep_base for config in configs.values()):
            return
        for _, layer in reparam_layers(model):
            if set(layer.reparam_factors) == set(configs):
                layer.drop_base_weight()
        own_memory(model)

    @property
    def _configs(self) -> dict[str, ReparamConfig]:
        """The configs of this method's adapters; a model of transformers may hold adapters of other methods too."""
        return {name: config for name, config in self.peft_config.items() if isinstance(config, ReparamConfig)}

    def _config(self, adapter_name: str) -> ReparamConfig:
        return cast(ReparamConfig, self.peft_config[adapter_name])  # PEFT injects adapters of this class's method only

    def record_resolved(self, adapter_name: str, targets: dict[str, Target]) -> None:
        """Write what was resolved into an adapter's config, so that a checkpoint loads without computing anything.

        Args:
            adapter_name: the adapter.
            targets: each with the rank that it has got, or None where it stays dense.
        """
        config = self._config(adapter_name)
        for field, value in DATA_FREE.items():
            setattr(config, field, getattr(config, field) or value)
        record_targets(config, targets)
        for field, size in size_report(self.model, config).to_dict()["targets"].items():
            setattr(config, field, size)

    def size_report(self, adapter_name: str | None = None) -> SizeReport:
        """Parameters and bytes of the targets and of the whole model, before and after.

        Bytes are those of a checkpoint: factors count in the base model's dtype, whatever dtype they train in.

        Args:
            adapter_name: which adapter; None: the active one.

        Raises:
            ValueError: there is no such adapter.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        if adapter_name not in self._configs:
            raise ValueError(f"`adapter_name` must be one of {list(self._configs)}, got {adapter_name!r}.")
        return size_report(self.model, self._configs[adapter_name])

    def to_standalone(
        self,
        quantize: SchemeName | None = None,
        quantize_tables: TableScheme | None = None,
        statistics: Statistics | None = None,
    ) -> PreTrainedModel:
        """A plain transformers model of the same class with factorised layers, that computes as this one does.

        `save_pretrained` makes a checkpoint that `AutoModel…` loads after `import reparam_peft`. This model stays as it is;
        both share their tensors, so that training either changes both. All parameters of the new model are trainable.

        Args:
            quantize: "int8" (torchao) or "int4" (bitsandbytes' NF4): the factors, then trained by a LoRA only; None: as is.
            quantize_tables: "int8" (torchao): tables of embeddings, tied ones too, that are not factorised; None: as above.
            statistics: of `calibrate`, with which `quantize` rounds so that outputs stay near (GPTQ, arXiv:2210.17323); in 4
                bits it is worth the passes. None: each number to the nearest.

        Raises:
            ImportError: the library of `quantize` is not installed.
            TypeError: the base model is none of transformers', or it holds modules of other PEFT methods.
            ValueError: the adapter is merged, disabled or was never loaded, or several are active.
        """
        return standalone_model(self.model, quantize, quantize_tables, statistics, self.peft_config)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name, layer in reparam_layers(self.model):
            with naming(name):
                layer.check_active(names)
        with self._unchanged_on_error():
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    def disable_adapter_layers(self) -> None:
        check_base_weights(self.model, "adapters cannot be disabled")
        with self._unchanged_on_error():
            super().disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        if list(self.peft_config) == [adapter_name]:
            check_base_weights(self.model, f"adapter {adapter_name!r} is the last one and cannot be deleted")
        with self._unchanged_on_error():
            super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """The base model without adapters: its own matrices and norms, and the active adapter's heads, as PEFT has it.

        Raises:
            ValueError: W was dropped; `merge_and_unload` gives a dense model of the products.
        """
        check_base_weights(
            self.model, "the base model cannot be restored (`merge_and_unload` gives a dense model of the products)"
        )
        with self._unchanged_on_error():
            for _, layer in reparam_layers(self.model):
                if layer.merged:
                    layer.unmerge()
            dense = {name for config in self.peft_config.values() for name in getattr(config, "dense_modules", None) or ()}
            for name, module in self.model.named_modules():
                if isinstance(module, ModulesToSaveWrapper):
                    vectors = all(parameter.ndim <= 1 for parameter in module.original_module.parameters())
                    if vectors or name in dense:
                        module.set_adapter([])
            return super().unload()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        check_mergeable(self.model, adapter_names, safe_merge)
        with self._unchanged_on_error():
            super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        with self._unchanged_on_error():
            super().unmerge_adapter()

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT says None, and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            check_mergeable(self.model, adapter_names, safe_merge)
        with self._unchanged_on_error():
            plain: nn.Module = super()._unload_and_optionally_merge(  # type: ignore[assignment]
                merge, progressbar, safe_merge, adapter_names
            )
            close_parameters(plain)
            return plain

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names` cannot mix adapters within a batch: each adapter replaces the weights. Use `set_adapter`."
            )
        if self._awaits_factors:
            factorize_awaited(self.model)
            self._awaits_factors = False
        self._before_injection = None
        yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Upcast half-precision factors to float32 for training only: for inference it would double the stored bytes."""
        trains = not self.peft_config[adapter_name].inference_mode
        with self._unchanged_on_error() if self._before_injection is None else self._undoing(adapter_name):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype and trains)
            if adapter_name == self._arriving:  # what was checked as a whole need not be looked for in every layer
                for _, layer in reparam_layers(self.model):
                    layer.arrivals.stop_waiting(adapter_name)
            self._arriving = ""
            # What a loader has yet to fill in is cast once more when that is done; until then an error takes it out again.
            if not any(adapter_name in layer.arrivals.awaited for _, layer in reparam_layers(self.model)):
                self._before_injection = None

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: ReparamConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors, factors in the base model's dtype: what a checkpoint holds.

        Raises:
            RuntimeError: the factors were never loaded.
            TypeError: the config holds what could not be loaded again.
            ValueError: the state dict lacks some, holds them empty or sharded, or one is not finite in that dtype.
        """
        config.check_saved()
        if state_dict:  # of processes that save nothing it may be empty
            check_whole(model, adapter_name, state_dict)
        # By names of tensors: those of modules are others where activations are checkpointed.
        factors = f".reparam_factors.{adapter_name}."
        selected = {key: tensor for key, tensor in state_dict.items() if factors in f".{key}"}
        for name, layer in reparam_layers(model):
            cast_to_base(name, layer, adapter_name, selected)
            # PEFT adds the base weight of targeted embeddings, which the factors stand in for.
            state_dict.pop(f"{name}.base_layer.weight", None)
        if isinstance(model, PeftModel):
            # `push_to_hub` saves, then puts the repository's own card over the saved one, then calls this.
            model._upload_modified_files = partial(upload_with_section, model)  # type: ignore[method-assign]
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"(\breparam_factors)\.{re.escape(adapter_name)}(?=\.)", r"\1", key, count=1)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: ReparamConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors under the model's names, after a check that every factor is there and fits, before any is loaded.

        Raises:
            ValueError: the checkpoint lacks factors, holds NaN or inf, or their shapes are not those of the config.
        """
        tuner = model.base_model if isinstance(model, PeftModel) else None
        is_new = isinstance(tuner, ReparamModel) and tuner._before_injection is not None
        with cast(ReparamModel, tuner)._undoing(adapter_name) if is_new else nullcontext():
            in_model = names_in_model(
                model, adapter_name, partial(cls._remove_adapter_name_from_key, adapter_name=adapter_name)
            )
            remapped = {in_model.get(key, key): tensor for key, tensor in state_dict.items()}
            fitting = fit_to_model(model, config, adapter_name, remapped)
        if isinstance(tuner, ReparamModel):
            tuner._arriving = adapter_name  # PEFT loads them now, and then casts them: W stays until it has
        return fitting


def config_of(model: PeftModel, adapter_name: str) -> ReparamConfig:
    """The config of an adapter, the very object that the model has.

    Raises:
        TypeError: the adapter is of another method.
    """
    config = model.peft_config[adapter_name]
    if not isinstance(config, ReparamConfig):
        raise TypeError(f"adapter {adapter_name!r} must be one of a ReparamConfig, got a {type(config).__name__}.")
    return config
