"""The modules that an adapter replaces: which they are, at which rank, whether they can be, and their factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import CONFIG_NAME, AuxiliaryTrainingWrapper
from torch import nn

from ..arguments import ReparamWarning
from ..config.reparam_config import ReparamConfig
from ..layers.coded import ALL_AS_THE_MODEL, Widths
from ..layers.factorized import FactorizedModule
from ..layers.kinds import is_quantized
from ..layers.product import Product
from ..layers.quantized_bases import note_dtype
from ..numerics.storage import FEW_BITS, OF_THE_BASE, Storage
from ..planning.ranks import resolve_rank
from ..runtime.hosts import ExcludedModule
from ..runtime.modules import is_offloaded, kept_in_lists, naming, parameter_owners
from .attentions import is_taken_by_parts
from .layer import REMEDY, W_IS_GONE, ReparamLayer, reparam_layers
from .matrices import matrix_storage, unwrapped
from .refusals import WRITTEN, Refusal, joint_error, joint_warning, refused_by_kind, refused_by_place
from .target_modules import SAVED_BY_TASK
from .tying import shares_its_product
from .written import written_modules

# What PEFT's and our own modules add to the names in a state dict.
ADDED_NAMES = {"base_model", "model", "base_layer", "original_module", "modules_to_save", "reparam_factors"} | {
    *(
        "A",
        "B",
        "K",
        "Q",
        "weight",
        "weight_scale",
        "weight_absmax",
        "bias",
        "mask",
        "feature_mean",
        "kept_rows",
        "kept_columns",
    )
}


@dataclass(frozen=True)
class Target:
    """A module to factorise at `rank`, or to leave dense where `rank` is None; with its product once that exists.

    An adapter that starts as a copy of another has the copied factorised module in place of a product.
    """

    module: nn.Module
    rank: int | None
    storage: Storage
    product: Product | None = None
    copied: FactorizedModule | None = None

    @property
    def form(self) -> str:
        """How its product is stored at this rank: "factors", "pivot", "dense" or "corrected"; "dense" where it stays so."""
        return "dense" if self.rank is None else self.storage.form_at(self.rank)

    @property
    def widths(self) -> Widths:
        """The bits of those matrices of its product that are in few bits, by name."""
        return ALL_AS_THE_MODEL if self.rank is None else self.storage.widths(self.rank)

    @property
    def keeps_codes(self) -> bool:
        """Whether it arrived quantised, and stays so."""
        return self.rank is not None and self.storage.bits == OF_THE_BASE

    def is_nested(self, config: ReparamConfig) -> bool:
        """Whether its product keeps the mean of its features, by which the bias follows at lower ranks."""
        return self.storage.bias and config.smaller_keeps is not None and self.form != "dense"


def record_targets(config: ReparamConfig, targets: dict[str, Target]) -> None:
    """Write into a config, whose form is resolved, what each target has got, in place: rank, other form, bits, or nothing."""
    config.rank_pattern = {name: target.rank for name, target in targets.items() if target.rank is not None}
    config.dense_modules = sorted(name for name, target in targets.items() if target.rank is None)
    storages = {name: target.storage for name, target in targets.items() if target.rank is not None}
    config.form_pattern = {name: storage.form for name, storage in storages.items() if storage.form != config.form}
    config.bit_pattern = {name: storage.bits for name, storage in storages.items() if storage.bits in FEW_BITS}


def save_heads(config: ReparamConfig) -> None:
    """Name the heads that PEFT saves whole for the config's task in `modules_to_save`, in place, so that they are no targets.

    For some tasks PEFT adds them to the config that it was given only after the injection, when the tuner has its own copy.
    """
    heads = SAVED_BY_TASK.get(config.task_type, ())
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))


def is_target(config: ReparamConfig, name: str) -> object:
    """PEFT's matching, by endings of names: no more than the modules that were chosen, or that a checkpoint has."""
    if is_taken_by_parts(config, name) or (config.loading and not config.is_of_adapter(name)):
        return False
    matched = BaseTuner._check_target_module_exists(config, name)
    if isinstance(matched, ExcludedModule):
        return matched
    return (matched or config.is_of_parameters(name)) and config.is_among(name)


def find_targets(
    config: ReparamConfig, model: nn.Module, matches: Callable[[str], object], named: bool = True
) -> dict[str, Target]:
    """The modules whose names match, except inside of tuner layers, by name and with their ranks.

    Args:
        config: that says ranks and sizes.
        model: whose modules they are.
        matches: whether a name is one of a target.
        named: whether the user has named them; else those that cannot be factorised are left out, with one warning.

    Raises:
        TypeError, ValueError: modules that were named cannot be factorised, or none can; or a rank is out of range.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    # Dense targets whose weight has changed are saved whole, which PEFT takes for no targets at all.
    saved_whole = {*(config.dense_modules or ())} & {*(config.modules_to_save or ())}
    targets: dict[str, Target] = {}
    refused: dict[str, Refusal] = {}
    owners, in_lists = parameter_owners(model), kept_in_lists(model)
    written = set() if named else written_modules(model)
    note_dtype(model)
    for name, module in model.named_modules():
        if not name or name.startswith(inside) or not (matches(name) or name in saved_whole):
            continue
        module = unwrapped(module)
        reason = refused_by_kind(module)
        if reason is None:
            with naming(name):
                storage = matrix_storage(module, name, config)
                target = Target(module, resolve_rank(config, name, storage), storage)
            if not named or target.rank is not None:
                may_share = config.keep_base or shares_its_product(config, model, name)
                reason = refused_by_place(model, name, module, owners, in_lists, may_share)
        if reason is None and name in written:
            reason = WRITTEN
        if reason is None:
            targets[name] = target
        else:
            refused[name] = reason
    if refused and (named or not targets):
        raise joint_error(refused)
    if refused:
        warnings.warn(joint_warning(refused), ReparamWarning, stacklevel=2)
    unknown = sorted(set(config.dense_modules or []) - set(targets))
    if unknown:
        warnings.warn(f"`dense_modules` {unknown} are not targeted and were ignored.", RuntimeWarning, stacklevel=2)
    return targets


def check_targets(
    targets: dict[str, Target], config: ReparamConfig, model: nn.Module, adapter_name: str, loading: bool
) -> None:
    """Raise `ValueError` where the targets cannot be factorised in this model; warn where none would be."""
    if "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(
            f"`adapter_name` must hold no dot and not be the name of a method of torch modules, got {adapter_name!r}."
        )
    if adapter_name in _parts_of_names(model):
        raise ValueError(
            f"`adapter_name` must not be a part of the name of a module, got {adapter_name!r}: PEFT tells tensors of adapters "
            "by such parts, and would leave out those of other adapters when it saves. Choose another name."
        )
    if loading and config.stored_parameters is not None:
        missing = sorted(config.rank_pattern.keys() - targets.keys())
        if missing:
            raise ValueError(
                f"the adapter has factors for {len(missing)} modules that the model does not have, or that `target_modules` "
                f"of its {CONFIG_NAME} does not name, the first {missing[0]!r}. Load it onto the base model that it is of."
            )
    elif targets:  # else nothing matches, which is told in other words
        config.check_ranks_used(targets)
    factorized = {name: target.module for name, target in targets.items() if target.rank is not None}
    if targets and not factorized:
        warnings.warn(
            f"All {len(targets)} targets stay dense: at this size factors would be no smaller. Lower `r` or `keep`.",
            ReparamWarning,
            stacklevel=2,
        )
    owners, in_lists = parameter_owners(model), kept_in_lists(model)
    may_share = {name: config.keep_base or shares_its_product(config, model, name) for name in factorized}
    reasons = {n: refused_by_place(model, n, m, owners, in_lists, may_share[n]) for n, m in factorized.items()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if refused:
        raise joint_error(refused)
    for name, module in factorized.items():
        with naming(name):
            if isinstance(module, ReparamLayer):
                if module.base_weight_dropped and config.keep_base:
                    raise ValueError(f"`keep_base=True` cannot be honoured, {W_IS_GONE}. To keep it, {REMEDY}.")
            else:
                if is_quantized(module) and config.keep_base and not targets[name].keeps_codes:
                    raise ValueError(
                        "`keep_base=True` cannot be honoured, since the weight is quantised. Leave it out, or load the base "
                        "model in full precision."
                    )
                if not is_quantized(module):
                    _check_weight(module, name, loading)
    for name, layer in reparam_layers(model):
        if layer.base_weight_dropped and name not in factorized:
            raise ValueError(
                f"{name}: adapter {adapter_name!r} has no factors for this layer and {W_IS_GONE}, so that it could never be "
                f"active. Give all adapters the same factorised modules, or {REMEDY}."
            )


def _parts_of_names(model: nn.Module) -> set[str]:
    """What stands between the dots of names in a state dict, but for the names of adapters."""
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, wrappers))
    names = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    return {part for name in names for part in name.split(".")} | ADDED_NAMES


def _check_weight(module: nn.Module, name: str, loading: bool) -> None:
    """Raise `ValueError` where a module's weight cannot be read."""
    if is_offloaded(module):
        raise ValueError(
            "accelerate moves the weight of this layer to where it computes at each pass (it is offloaded), and would move one "
            "that is gone. Load the model without offloading; or take the hooks away first: "
            "`accelerate.hooks.remove_hook_from_submodules(model)`; or leave it in its files: `compress_checkpoint`."
        )
    if module.weight.device.type == "meta" and not loading:
        raise ValueError(
            "the weight is on the meta device (offloaded or not loaded) and holds no data; load the model without offloading "
            "before factorising it."
        )
    if module._forward_hooks or module._forward_pre_hooks:
        warnings.warn(
            f"The forward hooks of {name} do not run once it is factorised; register them again.",
            ReparamWarning,
            stacklevel=3,
        )
