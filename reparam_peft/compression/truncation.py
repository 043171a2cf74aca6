"""Fewer ranks for an adapter that is there: after training, from what its factors have become."""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from ..calibration.self_written import batches_or_self_written
from ..calibration.statistics import Batches
from ..config.fields import OF_ALLOCATION, OF_METRICS
from ..defaults import CALIBRATED, DATA_FREE
from ..layers.factorized import FactorizedModule
from ..layers.product import Product
from ..numerics.decompositions import truncate
from ..numerics.methods import MethodName
from ..numerics.metrics import exact
from ..numerics.storage import Storage
from ..planning.ranks import RankChooser, parameter_budget
from ..runtime.modules import naming
from ..runtime.processes import tells_of_errors
from ..runtime.restoring import unchanged_on_error
from ..tuner.compressed_model import CompressedModel
from ..tuner.layer import ReparamLayer
from ..tuner.model import ReparamModel, config_of
from ..tuner.targets import Target
from .job import Job
from .options import Options
from .present import check_model, present_targets

NOT_DENSE = math.nextafter(1.0, 0.0)  # the `ceiling` that keeps a matrix from becoming dense again


def retruncate(
    model: PeftModel,
    keep: float,
    batches: Batches | str | None = None,
    *,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CompressedModel:
    """Lower the ranks of an adapter to those that fit `keep`: changes the model in place.

    The new factors are those of the truncated product A B, not of the original weight, so that training is not lost: prune,
    train, prune again. Without data it is the truncated SVD, and each factorised matrix keeps the same fraction of what it
    stores now. With data it is what `compress` does: ranks by predicted loss, factors in the metrics of inputs and gradients,
    moved biases, with the metrics and shrinkages of the adapter's config. Targets that are dense stay dense, no rank rises,
    and a matrix whose rank stays keeps its factors to the bit. Form, dtype, device and `requires_grad` stay too.

    Everything is computed before the first layer is changed: an error leaves the model as it was.

    An optimizer or `Trainer` made before holds the old parameters: make a new one.

    Args:
        model: a `PeftModel` of a `ReparamConfig`, not merged.
        keep: fraction of the targeted parameters that is stored, as in the config; at most `model.size_report().keep`, where
            nothing changes.
        batches: keyword batches for the model as it is now, read once; `Statistics` of it; or "self", for text that it writes
            itself, as by `self_written`. None: data-free.
        tokenizer: of the model, for "self".
        adapter_name: which adapter; None: the active one. Data need it to be the active one.
        seed: of the labels sampled for gradients, and of the text for "self"; given `Statistics` have their own.
        progress: whether to show progress bars.

    Returns:
        `model`. The adapter's config says how the present factors were made; its `evaluation` is emptied.

    Raises:
        TypeError: `model` is no `PeftModel` of a `ReparamConfig`, or `keep` is no number.
        ValueError: `keep` is out of range, above what is stored now, or cannot be met; layers are merged, wait for their
            factors, or hold other modules than plain factors; factors are NaN or infinite; or batches as for `compress`.

    >>> from peft import get_peft_model
    >>> from torch import nn
    >>> from reparam_peft import ReparamConfig
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> small = get_peft_model(net, ReparamConfig(target_modules=["0"], keep=0.8))
    >>> retruncate(small, 0.5).peft_config["default"].rank_pattern
    {'0': 8}
    """
    tuner, adapter_name = check_model(model, keep, adapter_name, batches is not None)
    options = Options(seed=seed, progress=progress)
    data = batches_or_self_written(batches, model, tokenizer, seed=seed, progress=progress)
    # Without data each process does everything, even where it alone is asked.
    with unchanged_on_error(model, model.peft_config.values()), nullcontext() if data is None else tells_of_errors():
        return _lowered(model, tuner, keep, data, adapter_name, options)


def _lowered(
    model: PeftModel, tuner: ReparamModel, keep: float, batches: Batches | None, adapter_name: str, options: Options
) -> CompressedModel:
    """The model with lower ranks, changed in place."""
    config = config_of(model, adapter_name)
    layers, targets = present_targets(model, adapter_name, config)
    ranks = _same_fraction(targets, _check_keep(targets, keep))
    if ranks == {name: target.rank for name, target in targets.items()}:
        return cast(CompressedModel, model)
    if batches is None:
        products = _truncated(layers, ranks, adapter_name, options.progress)
        made_by = _MadeBy(method=DATA_FREE["method"], allocation="uniform")
    else:
        job = _job(model, adapter_name, keep, layers, targets, batches, options)
        plan = job.plan()
        # Directions beyond the present rank cost nothing: a higher rank is a larger price for the product as it is.
        ranked = {name: _at_most(target, targets[name].rank) for name, target in job.ranked(plan).items()}
        ranks = {name: target.rank for name, target in ranked.items()}
        job.chooser.check_budget(ranks)
        # Of what is left of a matrix that has lost neurons; which they are does not change.
        lower = {name: target for name, target in ranked.items() if target.rank != targets[name].rank}
        products = job.products({n: replace(t, storage=replace(t.storage, whole=None)) for n, t in lower.items()})
        made_by = _MadeBy(
            method=job.config.method,
            allocation=job.config.allocation,
            seed=job.seed,
            calibration_tokens=job.calibration_tokens,
            gradient_tokens=job.gradient_tokens,
            predicted_loss=sum(module.predicted_loss or 0.0 for module in plan.modules),
        )
    modules = {}
    for name, product in products.items():
        with naming(name):
            modules[name] = _module(layers[name], adapter_name, product, targets[name].storage)
    for name, module in modules.items():
        layers[name].reparam_factors[adapter_name] = module
        layers[name].r[adapter_name] = module.rank
    for layer in layers.values():
        layer.factorized(adapter_name).feature_mean = None  # the sizes that it is for are forgotten
    config.keep = keep
    config.r = config.budget = config.evaluation = config.smaller_keeps = config.smaller_ranks = None
    if batches is None:
        for name in (*OF_METRICS, *OF_ALLOCATION, "neurons"):
            setattr(config, name, None)
    for name, value in asdict(made_by).items():
        setattr(config, name, value)
    lowered = {name: replace(target, rank=ranks[name]) for name, target in targets.items()}
    tuner.record_resolved(adapter_name, lowered)
    return cast(CompressedModel, model)


@dataclass(frozen=True)
class _MadeBy:
    """What a config says of how the present factors were made."""

    method: str | None
    allocation: str | None
    seed: int | None = None
    calibration_tokens: int | None = None
    gradient_tokens: int | None = None
    predicted_loss: float | None = None


def _at_most(target: Target, rank: int | None) -> Target:
    """A target with a rank that is no higher than the present one; dense where that is None."""
    return replace(target, rank=None if rank is None else min(rank if target.rank is None else target.rank, rank))


def _truncated(
    layers: Mapping[str, ReparamLayer], ranks: Mapping[str, int | None], adapter_name: str, progress: bool
) -> dict[str, Product]:
    """The truncated products of the layers whose rank falls, with their own biases as they are."""
    lower = {name: rank for name, rank in ranks.items() if rank is not None and rank < layers[name].r[adapter_name]}
    products = {}
    for name in tqdm(lower, desc="Truncating", unit="matrix", delay=1, disable=None if progress else True):
        with naming(name):
            module = layers[name].factorized(adapter_name)
            products[name] = Product(truncate(module.factors, lower[name]), module.bias)
    return products


def _job(
    model: PeftModel,
    adapter_name: str,
    keep: float,
    layers: Mapping[str, ReparamLayer],
    targets: Mapping[str, Target],
    batches: Batches,
    options: Options,
) -> Job:
    """A job on the products of an adapter in place of weights, whose ranks fit the budget.

    Raises:
        ValueError: the budget cannot be met.
    """
    config = copy.deepcopy(config_of(model, adapter_name))
    config.method, config.allocation, config.init_weights = cast(MethodName, CALIBRATED["method"]), "loss", True
    config.ceiling = min(NOT_DENSE, 1.0 if config.ceiling is None else config.ceiling)
    config.budget = None  # `keep` is of the parameters
    chooser = RankChooser(
        storages={name: target.storage for name, target in targets.items()},
        keep=keep,
        prescribed={name: None for name, target in targets.items() if target.rank is None},
        rank_multiple=config.rank_multiple,
        floor=config.floor or 0.0,
        ceiling=config.ceiling,
    )
    chooser.check()
    modules = {name: layer.factorized(adapter_name) for name, layer in layers.items()}

    def matrix_of(name: str) -> Tensor:
        """A B in float64."""
        A, B = modules[name].factors
        return exact(A) @ exact(B)

    return Job(
        model=model.get_base_model(),
        config=config,
        targets=targets,
        batches=batches,
        options=options,
        chooser=chooser,
        matrix_of=matrix_of,
        bias_of=lambda name: modules[name].bias,
        passes=[list(layers)],
        modules={name: layers.get(name, target.module) for name, target in targets.items()},
    )


def _check_keep(targets: Mapping[str, Target], keep: float) -> int:
    """The numbers that may be stored; raises `ValueError` where that is more than now, or less than can be."""
    budget = parameter_budget(keep, {name: target.storage for name, target in targets.items()})
    stored = sum(target.storage.stored(target.rank) for target in targets.values())
    if budget > stored:
        total = sum(target.storage.dense for target in targets.values())
        raise ValueError(
            f"`keep` must be at most what is stored now, {stored / total:.6g} ({stored:,} of {total:,} parameters), got {keep}."
        )
    dense = [name for name, target in targets.items() if target.rank is None]
    held = sum(targets[name].storage.dense for name in dense)
    least = held + sum(target.storage.stored(1) for target in targets.values() if target.rank is not None)
    if least > budget:
        raise ValueError(
            f"`keep={keep}` allows {budget:,} parameters, and the least that can be stored is {least:,}: rank 1, and {held:,} "
            f"in targets that are dense and stay so, {', '.join(dense) or 'none'}. Raise `keep`."
        )
    return budget


def _same_fraction(targets: Mapping[str, Target], budget: int) -> dict[str, int | None]:
    """Ranks at which each factorised target stores the same fraction of what it stores now, as near as single ranks allow.

    From rank 1 up, the next rank goes to the target that it brings the least far, as long as it fits the budget.
    """
    present = {name: target.rank for name, target in targets.items() if target.rank is not None}
    ranks = dict.fromkeys(present, 1)
    left = budget - sum(target.storage.stored(ranks.get(name)) for name, target in targets.items())

    def stored(name: str, rank: int) -> int:
        return targets[name].storage.stored(rank)

    def following(name: str) -> int:
        """The next rank; where that would take more than a matrix that is stored as it is, the full one."""
        rank = ranks[name] + 1
        return rank if targets[name].form != "dense" or targets[name].storage.saves(rank) else present[name]

    def step(name: str) -> list[tuple[float, str]]:
        if ranks[name] == present[name]:
            return []
        return [(stored(name, following(name)) / stored(name, present[name]), name)]

    queue = [entry for name in present for entry in step(name)]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        rank = following(name)
        price = stored(name, rank) - stored(name, ranks[name])
        if price <= left:
            left, ranks[name] = left - price, rank
            for entry in step(name):
                heapq.heappush(queue, entry)
    return {name: ranks.get(name) for name in targets}


def _module(layer: ReparamLayer, adapter_name: str, product: Product, storage: Storage) -> FactorizedModule:
    """The module of a product, in dtype, device, mode and `requires_grad` as the adapter's present one."""
    present = layer.factorized(adapter_name)
    module = layer.like(adapter_name, product.rank, storage.form_at(product.rank)).to(present.dtype)
    module.set_factors(product.factors)
    module.set_kept(present.rows, present.columns)
    if product.bias is not None:
        module.set_bias(product.bias.clone())  # an old optimizer may still step the old one
    weight = present.B.get_parameter("weight")
    module = module.to(weight.device).train(present.training)
    trains = {name: parameter.requires_grad for name, parameter in present.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trains.get(name, weight.requires_grad))  # at rank `out` there is no K
        if not torch.isfinite(parameter).all():
            raise ValueError(f"the factors overflow {parameter.dtype}; use a wider dtype.")
    return module
