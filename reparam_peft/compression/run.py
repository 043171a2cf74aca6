"""What `compress` and `plan` go through: defaults, statistics, metrics, ranks, and the product of each matrix."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration.gather import gather_statistics
from ..calibration.statistics import Batches, Moments, Statistics
from ..config.fields import CALIBRATED, CALIBRATED_METHODS
from ..config.reparam_config import ReparamConfig
from ..layers.kinds import layer_kind, stored_weight
from ..layers.product import Product, product_of, tensors_of
from ..numerics.autoencoder import train_autoencoder
from ..numerics.decompositions import Factors, check_matrix, direction_losses, factorize, random_factors
from ..numerics.metrics import diagonal, exact, shrink
from ..numerics.pivoting import PivotFactors, pivot
from ..numerics.storage import uniform_rank
from ..planning.plan import Plan, make_plan
from ..planning.ranks import allocate_ranks, check_budget, is_nested, smaller_ranks
from ..runtime.modules import naming
from ..runtime.processes import check_whole, fails_together, processes
from ..tuner.matrices import base_dtype, source_matrix
from ..tuner.model import select_targets
from ..tuner.targets import Target, resolve_rank
from .weighing import SENSITIVE, Metrics, input_shrinkage, mean_output, output_shrinkage


class Run:
    """One call of `compress` or `plan`: the targets, their statistics, ranks and products."""

    def __init__(
        self,
        model: nn.Module,
        config: ReparamConfig,
        batches: Batches,
        seed: int,
        progress: bool,
        max_memory: int | None,
        adapter_name: str,
        plan: Plan | None = None,
        blocks: Sequence[str] = (),
        moves_bias: bool = False,
    ) -> None:
        """Check everything that can be checked before the data are read.

        Args:
            blocks: names of blocks, in each of which the statistics of all targets are needed together.
            moves_bias: whether biases are stored with the products for another reason than the method.
            model, config, batches, seed, progress, max_memory, adapter_name, plan: as for `compress`.
        """
        if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise TypeError("`model` is wrapped by PEFT already; give the base model, or merge the adapter first.")
        if not isinstance(config, ReparamConfig):
            raise TypeError(f"`config` must be a ReparamConfig, got a {type(config).__name__}.")
        if not isinstance(plan, Plan | None):
            raise TypeError(f"`plan` must be a Plan, got a {type(plan).__name__}; read one with `Plan.load`.")
        self.model, self.seed, self.progress = model, seed, progress
        self.config = with_defaults(config, plan, moves_bias)
        self.targets = select_targets(model, self.config, adapter_name)
        self.modules = {name: target.module for name, target in self.targets.items()}
        for name, module in self.modules.items():
            with naming(name):
                check_matrix(source_matrix(module))
        self.calibrated = self.config.method in CALIBRATED_METHODS
        self.gradients = self.config.allocation == "loss" or (self.calibrated and self.config.output_metric != "none")
        self.passes = [list(self.modules)] if max_memory is None else _groups(self.targets, max_memory, blocks)
        check_whole(batches)
        several = len(self.passes) > 1 and not isinstance(batches, Statistics)
        self.batches = list(batches) if several else batches
        self._statistics: tuple[list[str], Statistics] | None = None
        self.tokens = self.predictions = 0
        self.storages = {name: target.storage for name, target in self.targets.items()}
        self.uniform = {name: target.rank for name, target in self.targets.items()}
        if plan is not None:
            self._check_plan(plan)
        elif self.config.allocation == "loss":  # raises, before minutes of work, where no ranks fit
            allocate_ranks(self.config, self.storages, {n: _length(t).zero_() for n, t in self.targets.items()}, self._given())
        elif self.config.r is None:
            check_budget(self.config.keep, self.uniform, self.storages)

    def plan(self) -> Plan:
        """The ranks that the config and the statistics lead to."""
        return self.plan_for(self.config.keep, self.losses())

    def losses(self) -> dict[str, Tensor]:
        """What each direction of each target is predicted to cost; empty where gradients are not asked for."""
        losses: dict[str, Tensor] = {}
        for group in self.passes if self.gradients else ():
            compute = partial(self._losses, statistics=self.statistics(group))
            found = self._shared_out(group, "Planning", compute, lambda name: [_length(self.targets[name])])
            losses.update({name: loss for name, (loss,) in found.items()})
        return losses

    def plan_for(self, keep: float, losses: Mapping[str, Tensor]) -> Plan:
        """The ranks for a `keep` in place of the config's.

        Raises:
            ValueError: the budget cannot be met.
        """
        config = copy.copy(self.config)
        config.keep = keep
        if config.allocation == "loss":
            ranks = allocate_ranks(config, self.storages, losses, self._fixed(config, losses))
        else:
            ranks = {name: resolve_rank(config, name, storage) for name, storage in self.storages.items()}
            if config.r is None:
                check_budget(keep, ranks, self.storages)
        provenance = {"calibration_tokens": self.tokens, "gradient_tokens": self.predictions, "seed": self.seed}
        return make_plan(config, self.storages, ranks, losses, **provenance)

    def ranked(self, plan: Plan) -> dict[str, Target]:
        """The targets with the ranks of a plan."""
        return {module.name: replace(self.targets[module.name], rank=module.rank) for module in plan.modules}

    def products(self, targets: Mapping[str, Target]) -> dict[str, Product]:
        """The products of those targets that do not stay dense, factorised one-shot."""
        products: dict[str, Product] = {}
        nested = is_nested(self.config)
        for group in self.passes:
            todo = {name: targets[name] for name in group if name in targets and targets[name].rank is not None}
            if not todo:
                continue
            compute = partial(self._product, targets=todo, statistics=self.statistics(group))
            found = self._shared_out(todo, "Factorising", compute, lambda name: _empty_product(todo[name], nested))  # noqa: B023
            products.update({name: product_of(tensors, todo[name].storage.form) for name, tensors in found.items()})
        return products

    def statistics_with(self, name: str) -> Statistics:
        """The statistics of the group that a module is in."""
        return self.statistics(next(group for group in self.passes if name in group))

    def resume(self, plan: Plan, finished: Container[str]) -> None:
        """Go on with a plan that this run made earlier; no statistics are gathered any more of modules that are finished."""
        self.tokens, self.predictions, self.seed = plan.calibration_tokens, plan.gradient_tokens, plan.seed
        self.passes = [left for group in self.passes if (left := [name for name in group if name not in finished])]

    def statistics(self, group: list[str]) -> Statistics:
        """The statistics of a group of modules; those of the last group are at hand."""
        if self._statistics is not None and self._statistics[0] == group:
            return self._statistics[1]
        self._statistics = None
        modules = {name: self.modules[name] for name in group}
        if isinstance(self.batches, Statistics):
            found = self.batches
        else:
            options = {"gradients": self.gradients, "seed": self.seed, "progress": self.progress}
            options["starts"] = self.modules.values()
            found = gather_statistics(self.model, modules, self.batches, **options)
        found.check(modules, self.gradients)
        self.tokens, self.predictions = max(self.tokens, found.tokens), max(self.predictions, found.gradient_tokens)
        self.seed = found.seed
        self._statistics = (group, found)
        return found

    def _check_plan(self, plan: Plan) -> None:
        """Raise `ValueError` unless a plan that was given is of these targets, and the config asks for nothing else."""
        shapes = {name: (storage.out_features, storage.in_features) for name, storage in self.storages.items()}
        given = {module.name: module.shape for module in plan.modules}
        for name in shapes.keys() ^ given.keys():
            raise ValueError(f"{name}: it is in the plan or among the targets, but not in both; the plan is of other targets.")
        for name, shape in shapes.items():
            if given[name] != shape:
                raise ValueError(f"{name}: the plan is for a shape of {given[name]}, and the weight is {shape}.")
        for name in ("form", "allocation", "keep", "ceiling"):
            if getattr(plan, name) != getattr(self.config, name):
                raise ValueError(
                    f"`plan` is for `{name}={getattr(plan, name)!r}`, and the config says {getattr(self.config, name)!r}; "
                    "leave it out of the config, or make a plan with it."
                )
        has_bias = any(getattr(module, "bias", None) is not None for module in self.modules.values())
        if has_bias and plan.moved_bias != self.config.moved_bias:
            raise ValueError(
                f"`plan` is for `method={plan.method!r}`, and the config says {self.config.method!r}, which stores other "
                "biases."
            )
        for name, rank in (self._given() if self.config.r is None else self.uniform).items():
            if plan.ranks.get(name) != rank:
                raise ValueError(
                    f"{name}: the config says rank {rank}, and the plan {plan.ranks.get(name)}; leave `r`, `rank_pattern` and "
                    "`dense_modules` out of the config, or make a plan with them."
                )

    def resolved(self, plan: Plan) -> ReparamConfig:
        """The config for the tuner: what was chosen, and where it came from."""
        config = copy.deepcopy(self.config)
        config.rank_pattern, config.dense_modules = plan.ranks, plan.dense_modules
        config.calibration_tokens, config.gradient_tokens, config.seed = self.tokens, self.predictions, self.seed
        config.predicted_loss = plan.predicted_loss
        smaller = smaller_ranks(self.config, self.storages, plan, self._given())
        config.smaller_keeps = config.smaller_ranks = None
        if smaller is not None:
            config.smaller_keeps = list(smaller)
            config.smaller_ranks = {name: [ranks[name] for ranks in smaller.values()] for name in plan.ranks}
        return config

    def _given(self) -> dict[str, int | None]:
        """Targets whose rank the config gives."""
        return {
            name: resolve_rank(self.config, name, target.storage)
            for name, target in self.targets.items()
            if name in (self.config.dense_modules or ()) or self.config.module_rank(name) is not None
        }

    def _fixed(self, config: ReparamConfig, losses: Mapping[str, Tensor]) -> dict[str, int | None]:
        """Those, and targets that no gradient reaches, which get a uniform rank."""
        fixed = self._given()
        for name, target in self.targets.items():
            if name not in fixed and not losses[name].any():
                warnings.warn(f"{name}: no gradient reaches its output, so that its rank is uniform.", stacklevel=5)
                fixed[name] = uniform_rank(config.keep, target.storage)
        return fixed

    def metrics(self, name: str, statistics: Statistics, inputs: Moments | None = None) -> Metrics:
        """What a module's factorisation weighs errors by; with `inputs`, those in place of the inputs that calibration saw."""
        config, target = self.config, self.targets[name]
        mean = statistics.mean(name)
        if inputs is None:
            inputs = statistics.moments(name, target.storage.bias)
        gram = inputs.gram
        if self.gradients and config.input_metric in (None, "gram") and config.output_metric in (None, "fisher"):
            weighted = statistics.weighted_gram(name, mean if target.storage.bias else None)
            if weighted is not None and weighted.trace() > 0:
                gram = (1 - SENSITIVE) * gram + SENSITIVE * (gram.trace() / weighted.trace()) * weighted
        gram = self.shrunk(replace(inputs, gram=gram))
        fisher = None
        if self.gradients:
            fisher = statistics.fisher(name)
            amount = config.output_shrinkage
            fisher = shrink(fisher, output_shrinkage(statistics.output_rows(name), len(fisher)) if amount is None else amount)
        input_metric = {"gram": gram, "diagonal": diagonal(gram).sqrt(), "none": None}[config.input_metric or "gram"]
        output_metric = None
        if config.output_metric != "none" and fisher is not None and fisher.any():
            output_metric = diagonal(fisher) if config.output_metric == "diagonal" else fisher
        if not self.calibrated:
            input_metric = output_metric = None
        scale = statistics.loss_scale(name) if self.gradients else 1.0
        return Metrics(input_metric, output_metric, gram, fisher, scale, inputs.mean)

    def shrunk(self, inputs: Moments) -> Tensor:
        """E[x xᵀ] for few rows."""
        amount = self.config.shrinkage
        return shrink(inputs.gram, input_shrinkage(inputs.rows, len(inputs.gram)) if amount is None else amount)

    def _losses(self, name: str, statistics: Statistics) -> list[Tensor]:
        metrics = self.metrics(name, statistics)
        W = source_matrix(self.modules[name])
        q = direction_losses(W, metrics.gram, metrics.fisher, metrics.input, metrics.output)
        return [q * metrics.loss_scale]

    def _product(self, name: str, targets: Mapping[str, Target], statistics: Statistics) -> list[Tensor]:
        target, metrics = targets[name], self.metrics(name, statistics)
        W = source_matrix(target.module)
        output_mean = mean_output(W, target.module.bias, metrics.mean) if target.storage.bias else None
        return tensors_of(self.product(target, metrics, W, output_mean))

    def product(self, target: Target, metrics: Metrics, W: Tensor, output_mean: Tensor | None) -> Product:
        """The product of a matrix.

        Args:
            target: with its rank and storage.
            metrics: from `metrics`.
            W: the matrix (out, in), in the dtype that the product is stored in or wider.
            output_mean: mean of the outputs (out,), float64, that the bias is to preserve; None where it is not moved.
        """
        dtype = base_dtype(target.module)
        wide = W.to(torch.promote_types(W.dtype, torch.float32))  # rounded once, at the end
        if self.config.method == "autoencoder":
            start = None if self.config.init_weights else random_factors(wide, target.rank)
            factors = train_autoencoder(wide, target.rank, metrics.input, metrics.output, start)
        elif not self.config.init_weights:
            factors = random_factors(wide, target.rank)
        else:
            factors = factorize(wide, target.rank, metrics.input, metrics.output)
        if target.storage.form == "pivot":
            factors = pivot(factors, metrics.input, dtype)
        else:
            factors = Factors(*(factor.to(dtype) for factor in factors))
        bias = feature_mean = None
        if output_mean is not None:
            A, B = map(exact, factors.factors() if isinstance(factors, PivotFactors) else factors)
            features = B @ metrics.mean.to(B.device)
            bias = (output_mean - A @ features).to(W.device, dtype)
            feature_mean = features.to(W.device, dtype) if is_nested(self.config) else None
        return Product(factors, bias, feature_mean)

    def _shared_out(
        self, names: Iterable[str], what: str, compute: Callable[[str], list[Tensor]], parts: Callable[[str], list[Tensor]]
    ) -> dict[str, list[Tensor]]:
        """`compute(name)` for each name, by one of the processes, in all of them; `parts` makes memory to receive it."""
        names = list(names)
        world, own = processes()
        results = {}
        bar = tqdm(names[own::world], desc=what, unit="matrix", delay=1, disable=None if self.progress and own == 0 else True)
        with fails_together(stored_weight(self.modules[names[0]]).device):
            for name in bar:
                with naming(name):
                    results[name] = compute(name)
        for index, name in enumerate(names if world > 1 else ()):
            device = stored_weight(self.modules[name]).device
            results[name] = [part.to(device) for part in results.get(name) or parts(name)]
            for tensor in results[name]:
                dist.broadcast(tensor, index % world)
        return {name: results[name] for name in names}


def with_defaults(config: ReparamConfig, plan: Plan | None, moves_bias: bool) -> ReparamConfig:
    """A copy with the choices of a plan, or of `compress`, where the config makes none; checked as one."""
    config = copy.deepcopy(config)
    if config.stored_parameters is not None:
        raise ValueError("`config` is that of a compressed model (its sizes are filled in); make a new one.")
    choices = {**CALIBRATED, **({"allocation": "uniform"} if config.r is not None else {})}
    if plan is not None:
        choices = {"method": plan.method, "allocation": plan.allocation, "form": plan.form}
        if config.keep == ReparamConfig.keep:
            config.keep = plan.keep
        if config.ceiling is None and config.r is None and config.allocation in (None, plan.allocation):
            config.ceiling = plan.ceiling
    for field, value in choices.items():
        setattr(config, field, getattr(config, field) or value)
    config.__post_init__()
    config.moved_bias = moves_bias or config.method in CALIBRATED_METHODS
    return config


def _groups(targets: Mapping[str, Target], max_memory: int, blocks: Sequence[str]) -> list[list[str]]:
    """Modules in order, in groups whose statistics take at most so many bytes even where they share no inputs."""
    units: dict[str, list[str]] = {}
    for name in targets:
        units.setdefault(next((block for block in blocks if name.startswith(f"{block}.")), name), []).append(name)
    passes: list[list[str]] = [[]]
    left = max_memory
    for names in units.values():
        needed = 0
        for name in names:
            size, one_hot = targets[name].storage.in_features, layer_kind(targets[name].module).one_hot
            needed += 8 * ((size if one_hot else 2 * size**2) + targets[name].storage.out_features ** 2)
        if needed > max_memory:
            which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            raise ValueError(f"{which}: its statistics take {needed:,} bytes, and `max_memory` is {max_memory:,}; raise it.")
        if needed > left:
            passes.append([])
            left = max_memory
        passes[-1] += names
        left -= needed
    return passes


def _length(target: Target) -> Tensor:
    return torch.empty(min(target.storage.out_features, target.storage.in_features), dtype=torch.float64)


def _empty_product(target: Target, nested: bool) -> list[Tensor]:
    """Memory for what `tensors_of` gives."""
    storage, rank, dtype = target.storage, target.rank, base_dtype(target.module)
    if storage.form == "pivot":
        shapes = [(rank, storage.in_features), (storage.out_features - rank, rank)]
        tensors = [*(torch.empty(shape, dtype=dtype) for shape in shapes), torch.empty(rank, dtype=torch.int64)]
    else:
        shapes = [(storage.out_features, rank), (rank, storage.in_features)]
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
    sizes = [storage.out_features, *([rank] if nested else [])] if storage.bias else []
    return [*tensors, *(torch.empty(size, dtype=dtype) for size in sizes)]
