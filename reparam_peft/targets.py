"""The modules that an adapter replaces: which they are, at which rank, whether they can be, and their factors."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from .allocation import Storage, uniform_rank
from .config import CALIBRATED_METHODS, DATA_FREE, ReparamConfig
from .decompositions import Factors, check_rank, factorize, random_factors
from .evaluation import MatrixSize
from .factorized import is_quantized, layer_kind, note_dtype
from .layer import REMEDY, W_IS_GONE, Product, ReparamLayer
from .pivoting import PivotFactors, pivot


@dataclass(frozen=True)
class Target:
    """A module to factorise at `rank`, or to leave dense where `rank` is None; with its product once that exists."""

    module: nn.Module
    rank: int | None
    storage: Storage
    product: Product | None = None


# Products that `compress` has computed and the tuner is about to install, by the name of the module.
_computed: ContextVar[Mapping[str, Product] | None] = ContextVar("computed", default=None)


@contextmanager
def installing(products: Mapping[str, Product]) -> Iterator[None]:
    """Within this block `get_peft_model` installs these products and factorises nothing."""
    token = _computed.set(products)
    try:
        yield
    finally:
        _computed.reset(token)


def find_targets(config: ReparamConfig, model: nn.Module, matches: Callable[[str], object]) -> dict[str, Target]:
    """The modules whose names match, except inside of tuner layers, by name and with their ranks.

    Raises:
        TypeError, ValueError: a module cannot be factorised, or its rank is out of range.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    # Dense targets whose weight has changed are saved whole, which PEFT takes for no targets at all.
    saved_whole = {*(config.dense_modules or ())} & {*(config.modules_to_save or ())}
    targets = {}
    note_dtype(model)
    for name, module in model.named_modules():
        if name and not name.startswith(inside) and (matches(name) or name in saved_whole):
            with naming(name):
                module = unwrapped(module)
                storage = matrix_storage(module, config)
                targets[name] = Target(module, resolve_rank(config, name, storage), storage)
    unknown = sorted(set(config.dense_modules or []) - set(targets))
    if unknown:
        warnings.warn(f"`dense_modules` {unknown} are not targeted and were ignored.", RuntimeWarning, stacklevel=2)
    return targets


def resolve_rank(config: ReparamConfig, name: str, storage: Storage) -> int | None:
    """The rank of a module's matrix, or None where it stays dense.

    `dense_modules` comes first, then `rank_pattern`, `r`, and `keep`.

    Raises:
        ValueError: `rank_pattern` holds a rank above min(out, in).
    """
    if name in (config.dense_modules or ()):
        return None
    rank = config.module_rank(name)
    if rank is not None:
        check_rank(rank, (storage.out_features, storage.in_features))
        return rank
    if config.r is None:
        return uniform_rank(config.keep, storage)
    largest = min(storage.out_features, storage.in_features)
    if config.r == "full":
        return largest
    return config.r if config.r <= largest and storage.saves(config.r) else None


def check_targets(
    targets: dict[str, Target], config: ReparamConfig, model: nn.Module, adapter_name: str, loading: bool
) -> None:
    """Raise `ValueError` where the targets cannot be factorised in this model; warn where none would be."""
    if "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(
            f"`adapter_name` must hold no dot and not be the name of a method of torch modules, got {adapter_name!r}."
        )
    factorized = {name: target.module for name, target in targets.items() if target.rank is not None}
    if targets and not factorized:
        warnings.warn(
            f"All {len(targets)} targets stay dense: at this size factors would be no smaller. Lower `r` or `keep`.",
            stacklevel=2,
        )
    owners = parameter_owners(model)
    for name, module in factorized.items():
        with naming(name):
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
                raise ValueError(
                    "nn.TransformerEncoderLayer reads the weights of its layers itself; leave it out with `exclude_modules`."
                )
            if isinstance(module, ReparamLayer):
                if module.base_weight_dropped and config.keep_base:
                    raise ValueError(f"`keep_base=True` cannot be honoured, {W_IS_GONE}. To keep it, {REMEDY}.")
            else:
                if is_quantized(module) and config.keep_base:
                    raise ValueError(
                        "`keep_base=True` cannot be honoured, since the weight is quantised. Leave it out, or load the base "
                        "model in full precision."
                    )
                if not is_quantized(module):
                    _check_weight(module, owners[id(module.weight)], config.keep_base, loading)
    for name, layer in reparam_layers(model):
        if layer.base_weight_dropped and name not in factorized:
            raise ValueError(
                f"{name}: adapter {adapter_name!r} has no factors for this layer and {W_IS_GONE}, so that it could never be "
                f"active. Give all adapters the same factorised modules, or {REMEDY}."
            )


def check_data_free(config: ReparamConfig) -> None:
    """Raise `ValueError` where a config asks for what `get_peft_model`, which gets no data, cannot do."""
    for name, values in (("method", CALIBRATED_METHODS), ("allocation", ("loss",))):
        if getattr(config, name) in values:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` needs calibration data, which `get_peft_model` has no way to pass; use "
                "`reparam_peft.compress(model, config, batches)`."
            )
    given = ("input_metric", "output_metric", "shrinkage", "output_shrinkage", "rank_multiple", "floor", "ceiling")
    for name in given:
        if getattr(config, name) is not None:
            raise ValueError(
                f"`{name}` has an effect with calibration data only; leave it out, or use `reparam_peft.compress`."
            )


def check_standalone(config: ReparamConfig) -> None:
    """Raise `ValueError` where a config asks for what a standalone model does not have: a base model beside the factors."""
    for name in ("keep_base", "modules_to_save"):
        if getattr(config, name):
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` has an effect on adapters only, and this makes a standalone model; leave "
                "it out, or use `get_peft_model`."
            )


def factorize_targets(targets: dict[str, Target], config: ReparamConfig, progress: bool = True) -> dict[str, Target]:
    """The targets with their products; changes nothing in the model.

    Raises:
        TypeError, ValueError, torch.linalg.LinAlgError: a weight cannot be factorised.
    """
    computed = _computed.get()
    if computed is None:
        check_data_free(config)
    sources = set()
    done = dict(targets)
    todo = [(name, target) for name, target in targets.items() if target.rank is not None]
    hidden = None if progress and computed is None else True
    for name, target in tqdm(todo, desc="Factorising", unit="matrix", delay=1, disable=hidden):
        if computed is not None:
            done[name] = replace(target, product=computed[name])
            continue
        layer = target.module
        sources |= {layer.source} - {None} if isinstance(layer, ReparamLayer) else set()
        bias = None
        if target.storage.bias:
            bias = layer.source_bias() if isinstance(layer, ReparamLayer) else layer.bias.detach()
        with naming(name):
            factors = data_free_factors(source_matrix(layer), target, config)
        done[name] = replace(target, product=Product(factors, bias))
    if sources:
        warnings.warn(
            f"The new adapter factorises the product of adapter {', '.join(map(repr, sorted(sources)))}, because {W_IS_GONE}. "
            f"To factorise the original, {REMEDY}.",
            stacklevel=2,
        )
    return done


def data_free_factors(matrix: Tensor, target: Target, config: ReparamConfig) -> Factors | PivotFactors:
    """The product of a target's matrix (out, in) in the form of a config: its truncated SVD, or random."""
    compute = factorize if config.init_weights else random_factors
    if target.storage.form != "pivot":
        return compute(matrix, target.rank)
    # Rounded once, after the conversion.
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return pivot(compute(exact, target.rank), dtype=matrix.dtype)


def source_matrix(module: nn.Module) -> Tensor:
    """The matrix (out, in) that a target is factorised from, wrapped or not."""
    if isinstance(module, ReparamLayer):
        return module.source_matrix()
    return layer_kind(module).own_matrix(module)


def unwrapped(module: nn.Module) -> nn.Module:
    """The base model's own module, of one that adapters save whole."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def base_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a target's weight, wrapped or not, and of its factors in a checkpoint."""
    if isinstance(module, ReparamLayer):
        return module.base_dtype
    return layer_kind(module).dtype(module) if is_quantized(module) else module.weight.dtype


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a target, wrapped or not."""
    if isinstance(module, ReparamLayer):
        return module.out_features, module.in_features
    if isinstance(module, BaseTunerLayer):
        raise TypeError(
            f"the module is wrapped by another PEFT method already ({type(module).__module__}); merge or unload that one first."
        )
    return layer_kind(module).shape(module)


def matrix_storage(module: nn.Module, config: ReparamConfig) -> Storage:
    """What a target's product takes in the form of a config."""
    shape = matrix_shape(module)
    layer = module.base_layer if isinstance(module, ReparamLayer) else module
    bias = config.moved_bias and getattr(layer, "bias", None) is not None
    return Storage(*shape, form=config.form or DATA_FREE["form"], bias=bias)


def matrix_size(name: str, module: nn.Module, rank: int | None, config: ReparamConfig) -> MatrixSize:
    """The size of a target, wrapped or not, at a rank."""
    storage = matrix_storage(module, config)
    shape = (storage.out_features, storage.in_features)
    return MatrixSize(name, shape, rank, storage.stored(rank), base_dtype(module).itemsize, 0 if rank is None else storage.mask)


def reparam_layers(model: nn.Module) -> Iterator[tuple[str, ReparamLayer]]:
    """The tuner layers by name; names as in a state dict, also under FSDP."""
    for name, module in model.named_modules():
        if isinstance(module, ReparamLayer):
            yield name.replace("_fsdp_wrapped_module.", ""), module


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its id: more than one for a weight that is shared."""
    owners = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the module's name before the message of an error."""
    try:
        yield
    except (TypeError, ValueError, torch.linalg.LinAlgError) as error:
        raise type(error)(f"{name}: {error}") from error


def _check_weight(module: nn.Module, owners: list[str], keep_base: bool, loading: bool) -> None:
    """Raise `ValueError` where a module's weight cannot be read, or cannot be dropped because it has other owners."""
    if module.weight.device.type == "meta" and not loading:
        raise ValueError(
            "the weight is on the meta device (offloaded or not loaded) and holds no data; load the model without offloading "
            "before factorising it."
        )
    if module._forward_hooks or module._forward_pre_hooks:
        warnings.warn(
            f"The forward hooks of {owners[0].removesuffix('.weight')} do not run once it is factorised; register them again.",
            stacklevel=3,
        )
    if len(owners) > 1 and not keep_base:
        raise ValueError(
            f"the weight is shared ({', '.join(owners)}) and cannot be dropped in one place. Leave it out with "
            "`exclude_modules`, or untie it first: set `config.tie_word_embeddings = False` and give one of the modules a "
            "copy, `module.weight = nn.Parameter(module.weight.clone())`."
        )
