"""Fewer ranks for an adapter that is there: after training, from what its factors have become."""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration.statistics import Batches, Statistics
from ..layers.factorized import FactorizedModule
from ..layers.product import Product, tensors_of
from ..numerics.decompositions import direction_losses, truncate
from ..numerics.metrics import exact
from ..planning.plan import Plan
from ..planning.ranks import allocate_ranks, check_budget, parameter_budget
from ..runtime.modules import naming
from ..tuner.layer import ReparamLayer, reparam_layers
from ..tuner.matrices import matrix_storage, unwrapped
from ..tuner.model import ReparamModel
from ..tuner.targets import Target
from .run import Run
from .weighing import mean_output

NOT_DENSE = math.nextafter(1.0, 0.0)  # the `ceiling` that keeps a matrix from becoming dense again
# What a config holds with data only.
CALIBRATED_FIELDS = (
    *("input_metric", "output_metric", "shrinkage", "output_shrinkage", "rank_multiple", "floor", "ceiling"),
    *("calibration_tokens", "gradient_tokens", "seed", "predicted_loss"),
)


def retruncate(
    model: PeftModel,
    keep: float,
    batches: Batches | None = None,
    *,
    adapter_name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PeftModel:
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
        batches: keyword batches for the model as it is now, read once; or `Statistics` of it. None: data-free.
        adapter_name: which adapter; None: the active one. Data need it to be the active one.
        seed: of the labels sampled for gradients; given `Statistics` have their own.
        progress: whether to show progress bars.

    Returns:
        `model`. The adapter's config says how the present factors were made; its `evaluation` is emptied.

    Raises:
        TypeError: `model` is no `PeftModel` of a `ReparamConfig`, or `keep` is no number.
        ValueError: `keep` is out of range, above what is stored now, or cannot be met; layers are merged, wait for their
            factors, or hold other modules than plain factors; factors are NaN or infinite; or batches as for `compress`.

    >>> from peft import get_peft_model
    >>> from reparam_peft import ReparamConfig
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> small = get_peft_model(net, ReparamConfig(target_modules=["0"], keep=0.8))
    >>> retruncate(small, 0.5).peft_config["default"].rank_pattern
    {'0': 8}
    """
    adapter_name = _check_model(model, keep, adapter_name, batches is not None)
    layers, targets = _present(model, adapter_name)
    ranks = _same_fraction(targets, _check_keep(targets, keep))
    if ranks == {name: target.rank for name, target in targets.items()}:
        return model
    if batches is None:
        products = _truncated(layers, ranks, adapter_name, progress)
        how = {"method": "svd", "allocation": "uniform", **dict.fromkeys(CALIBRATED_FIELDS)}
    else:
        run = _Truncation(model, adapter_name, keep, layers, targets, batches, seed, progress)
        plan = run.plan()
        ranked = run.ranked(plan)
        ranks = {name: target.rank for name, target in ranked.items()}
        check_budget(keep, ranks, run.storages)
        products = run.products({name: target for name, target in ranked.items() if target.rank != targets[name].rank})
        how = {"method": run.config.method, "allocation": run.config.allocation, "seed": run.seed}
        how |= {"calibration_tokens": run.tokens, "gradient_tokens": run.predictions}
        how["predicted_loss"] = sum(module.predicted_loss or 0.0 for module in plan.modules)
    modules = {}
    for name, product in products.items():
        with naming(name):
            modules[name] = _module(layers[name], adapter_name, ranks[name], product)
    for name, module in modules.items():
        layers[name].reparam_factors[adapter_name] = module
        layers[name].r[adapter_name] = ranks[name]
    for layer in layers.values():
        layer.reparam_factors[adapter_name].feature_mean = None  # the sizes that it is for are forgotten
    emptied = dict.fromkeys(("r", "evaluation", "smaller_keeps", "smaller_ranks"))
    for field, value in {"keep": keep, **emptied, **how}.items():
        setattr(model.peft_config[adapter_name], field, value)
    model.base_model.record_resolved(
        adapter_name, {name: replace(target, rank=ranks[name]) for name, target in targets.items()}
    )
    return model


def _truncated(
    layers: Mapping[str, ReparamLayer], ranks: Mapping[str, int | None], adapter_name: str, progress: bool
) -> dict[str, Product]:
    """The truncated products of the layers whose rank falls, with their own biases as they are."""
    lower = [name for name, layer in layers.items() if ranks[name] < layer.r[adapter_name]]
    products = {}
    for name in tqdm(lower, desc="Truncating", unit="matrix", delay=1, disable=None if progress else True):
        with naming(name):
            factors = layers[name].reparam_factors[adapter_name]
            products[name] = Product(truncate(factors.factors, ranks[name]), factors.bias)
    return products


class _Truncation(Run):
    """A run of `compress` on the products of an adapter in place of weights."""

    def __init__(
        self,
        model: PeftModel,
        adapter_name: str,
        keep: float,
        layers: Mapping[str, ReparamLayer],
        targets: dict[str, Target],
        batches: Batches,
        seed: int,
        progress: bool,
    ) -> None:
        self.model, self.batches, self.seed, self.progress = model.get_base_model(), batches, seed, progress
        self.config = copy.deepcopy(model.peft_config[adapter_name])
        self.config.keep, self.config.r, self.config.rank_pattern = keep, None, {}
        self.config.method, self.config.allocation, self.config.init_weights = "whitened", "loss", True
        self.config.ceiling = min(NOT_DENSE, 1.0 if self.config.ceiling is None else self.config.ceiling)
        self.targets = targets
        self.factors = {name: layer.reparam_factors[adapter_name] for name, layer in layers.items()}
        self.modules = {name: layers.get(name, target.module) for name, target in targets.items()}
        self.passes = [list(layers)]
        self.calibrated = self.gradients = True
        self._statistics = None
        self.tokens = self.predictions = 0
        self.storages = {name: target.storage for name, target in targets.items()}
        lengths = {name: min(storage.out_features, storage.in_features) for name, storage in self.storages.items()}
        zeros = {name: torch.zeros(length, dtype=torch.float64) for name, length in lengths.items()}
        allocate_ranks(self.config, self.storages, zeros, self._given())  # raises before the data are read

    def ranked(self, plan: Plan) -> dict[str, Target]:
        # Directions beyond the present rank cost nothing: a higher rank is a larger price for the product as it is.
        return {
            name: replace(target, rank=self.targets[name].rank and min(target.rank or math.inf, self.targets[name].rank))
            for name, target in super().ranked(plan).items()
        }

    def _losses(self, name: str, statistics: Statistics) -> list[Tensor]:
        metrics = self.metrics(name, statistics)
        q = direction_losses(self._matrix(name), metrics.gram, metrics.fisher, metrics.input, metrics.output)
        return [q * metrics.loss_scale]

    def _product(self, name: str, targets: Mapping[str, Target], statistics: Statistics) -> list[Tensor]:
        metrics, W = self.metrics(name, statistics), self._matrix(name)
        bias = self.factors[name].bias
        output_mean = None if bias is None else mean_output(W, bias, metrics.mean)
        return tensors_of(self.product(targets[name], metrics, W, output_mean))

    def _matrix(self, name: str) -> Tensor:
        """A B in float64."""
        A, B = self.factors[name].factors
        return exact(A) @ exact(B)


def _check_model(model: PeftModel, keep: float, adapter_name: str | None, with_data: bool) -> str:
    """The name of the adapter; raises where it cannot be truncated."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ReparamModel):
        raise TypeError(
            f"`model` must be a PeftModel of a ReparamConfig, got a {type(model).__name__}; make one with `get_peft_model` or "
            "`compress`, or load one with `PeftModel.from_pretrained`."
        )
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"`keep` must be a number in (0, 1], got {keep!r}.")
    if not 0 < keep <= 1:
        raise ValueError(f"`keep` must be in (0, 1], the fraction of the parameters that is stored; got {keep!r}.")
    active = list(model.active_adapters)
    if adapter_name is None and len(active) != 1:
        raise ValueError(f"`adapter_name` must be given where several adapters are active, here {active}.")
    adapter_name = adapter_name or active[0]
    if adapter_name not in model.peft_config:
        raise ValueError(f"`adapter_name` must be one of {list(model.peft_config)}, got {adapter_name!r}.")
    for name, layer in reparam_layers(model.get_base_model()):
        if layer.merged:
            raise ValueError(f"{name}: adapters {layer.merged_adapters} are merged; call `model.unmerge_adapter()` first.")
        layer.arrivals.accept_arrived()
        if layer.arrivals.awaited:
            raise ValueError(
                f"{name}: the factors of adapter {min(layer.arrivals.awaited)!r} were never loaded; load them with "
                "`PeftModel.from_pretrained` or `load_adapter`."
            )
        if with_data and (active != [adapter_name] or layer.disable_adapters):
            raise ValueError(
                f"`batches` are of use for the one active adapter, and active are {[] if layer.disable_adapters else active}; "
                f"call `model.set_adapter({adapter_name!r})` outside of `disable_adapter()` first, or leave `batches` out."
            )
    return adapter_name


def _present(model: PeftModel, adapter_name: str) -> tuple[dict[str, ReparamLayer], dict[str, Target]]:
    """The factorised layers of an adapter, and all its targets with their ranks; of the former, the module is their B.

    Raises:
        TypeError, ValueError: a module is not as our tuner made it.
    """
    config, base = model.peft_config[adapter_name], model.get_base_model()
    all_layers, layers, targets = dict(reparam_layers(base)), {}, {}
    for name, rank in config.rank_pattern.items():
        with naming(name):
            layer = all_layers.get(name)
            if layer is None or layer.r.get(adapter_name) != rank:
                raise ValueError(f"it has no factors of rank {rank} of adapter {adapter_name!r}; unwrap or reload the model.")
            module = layer.reparam_factors[adapter_name]
            _check_plain(module, _like(layer, adapter_name, rank))
            layers[name], targets[name] = layer, Target(module.B, rank, matrix_storage(layer, config))
    for name in config.dense_modules or ():
        with naming(name):
            module = base.get_submodule(name)
            targets[name] = Target(module, None, matrix_storage(unwrapped(module), config))
    return layers, targets


def _like(layer: ReparamLayer, adapter_name: str, rank: int) -> FactorizedModule:
    """A module as the adapter has here, at a rank, on meta."""
    present = layer.reparam_factors[adapter_name]
    has_bias = present.bias is not None
    like = layer.kind.factorized(layer.base_layer, rank, present.form, has_bias, device="meta", dtype=layer.base_dtype)
    return like.to(present.dtype)


def _check_plain(module: FactorizedModule, like: FactorizedModule) -> None:
    """Raise `ValueError` where a module differs from one that our tuner makes."""

    def classes(m: nn.Module) -> list[tuple[str, type]]:
        return [(name, type(child)) for name, child in m.named_modules()]

    def shapes(m: nn.Module) -> list[tuple[str, torch.Size, type]]:
        return [(name, parameter.shape, type(parameter)) for name, parameter in m.named_parameters()]

    if classes(module) != classes(like) or shapes(module) != shapes(like):
        raise ValueError(
            "its factors are wrapped, quantised or sharded by something else (LoRA on the factors, say), which new factors "
            "would lose; merge, dequantise or unwrap them first."
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError("its factors are on the meta device (offloaded); load the model without offloading.")
    if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in module.modules()):
        raise ValueError("its factors have hooks, which new factors would lose; remove them first.")


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
    ranks = {name: None if target.rank is None else 1 for name, target in targets.items()}
    left = budget - sum(target.storage.stored(ranks[name]) for name, target in targets.items())

    def step(name: str) -> list[tuple[float, str]]:
        storage, present = targets[name].storage, targets[name].rank
        return [(storage.stored(ranks[name] + 1) / storage.stored(present), name)] if ranks[name] < present else []

    queue = [entry for name, target in targets.items() if target.rank is not None for entry in step(name)]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        storage, rank = targets[name].storage, ranks[name]
        price = storage.stored(rank + 1) - storage.stored(rank)
        if price <= left:
            left, ranks[name] = left - price, rank + 1
            for entry in step(name):
                heapq.heappush(queue, entry)
    return ranks


def _module(layer: ReparamLayer, adapter_name: str, rank: int, product: Product) -> FactorizedModule:
    """The module of a product, in dtype, device, mode and `requires_grad` as the adapter's present one."""
    present = layer.reparam_factors[adapter_name]
    module = _like(layer, adapter_name, rank)
    module.set_factors(product.factors)
    if product.bias is not None:
        module.set_bias(product.bias.clone())  # an old optimizer may still step the old one
    module = module.to(present.B.weight.device).train(present.training)
    trains = {name: parameter.requires_grad for name, parameter in present.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trains.get(name, present.B.weight.requires_grad))  # at rank `out` there is no K
        if not torch.isfinite(parameter).all():
            raise ValueError(f"the factors overflow {parameter.dtype}; use a wider dtype.")
    return module
