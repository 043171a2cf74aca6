"""Factorising without data, and installing what was computed elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import ReparamWarning
from ..config.fields import OF_ALLOCATION, OF_METRICS
from ..config.reparam_config import ReparamConfig
from ..defaults import DATA_FREE
from ..layers.nearest import nearest_product
from ..layers.product import Product
from ..numerics.decompositions import Factors, random_factors
from ..numerics.methods import method_of, names_of_methods
from ..runtime.modules import naming
from .layer import REMEDY, W_IS_GONE, ReparamLayer
from .matrices import own_bias, source_matrix
from .targets import Target

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


def is_installing() -> bool:
    """Whether products that are computed already are being installed."""
    return _computed.get() is not None


def check_data_free(config: ReparamConfig) -> None:
    """Raise `ValueError` where a config asks for what `get_peft_model`, which gets no data, cannot do."""
    needing = {"method": names_of_methods(needs_data=True), "allocation": ("loss",), "budget": ("bytes", "flops", "latency")}
    for name, values in needing.items():
        if getattr(config, name) in values:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` needs calibration data, which `get_peft_model` has no way to pass; use "
                "`reparam_peft.compress(model, config, batches)`."
            )
    for name in (*OF_METRICS, *OF_ALLOCATION, "unreached", *(("neurons",) if config.neurons else ())):
        if getattr(config, name) is not None:
            raise ValueError(
                f"`{name}` has an effect with calibration data only; leave it out, or use `reparam_peft.compress`."
            )
    if config.sizes:
        raise ValueError(
            f"`sizes` says that modules have lost neurons, {next(iter(config.sizes))!r} first, and not which; leave it out."
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
    sources: set[str] = set()
    done = dict(targets)
    todo = [(name, target) for name, target in targets.items() if target.rank is not None]
    hidden = None if progress and computed is None else True
    for name, target in tqdm(todo, desc="Factorising", unit="matrix", delay=1, disable=hidden):
        if computed is not None:
            done[name] = replace(target, product=computed[name])
            continue
        layer = target.module
        if isinstance(layer, ReparamLayer) and layer.source is not None:
            sources.add(layer.source)
        bias = None
        if target.storage.bias:
            bias = layer.source_bias() if isinstance(layer, ReparamLayer) else own_bias(layer)
            bias = None if bias is None else bias.detach()
        with naming(name):
            product = data_free_product(source_matrix(layer), target, config)
        done[name] = replace(target, product=product._replace(bias=bias))
    if sources:
        warnings.warn(
            f"The new adapter factorises the product of adapter {', '.join(map(repr, sorted(sources)))}, because {W_IS_GONE}. "
            f"To factorise the original, {REMEDY}.",
            ReparamWarning,
            stacklevel=2,
        )
    return done


def data_free_product(matrix: Tensor, target: Target, config: ReparamConfig) -> Product:
    """The product of a target's matrix (out, in), without a bias: by the config's method, or random.

    Raises:
        ValueError: the target stays dense.
    """
    if target.rank is None:
        raise ValueError("a target that stays dense has no factors.")
    method = method_of(config.method or DATA_FREE["method"])

    def factors(W: Tensor, rank: int) -> Factors:
        return method.function(W, rank, None, None, None if config.init_weights else random_factors(W, rank))

    return nearest_product(matrix, target.rank, target.form, target.widths, factors)
