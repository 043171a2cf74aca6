"""All sizes of one model by one method."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..calibration.statistics import Statistics
from ..compression.job import Job
from ..compression.options import Options
from ..compression.weighing import mean_output
from ..config.reparam_config import ReparamConfig
from ..evaluation.measures import Measure
from ..layers.kinds import is_quantized, layer_kind
from ..layers.product import Product, whole_bias, whole_matrix
from ..numerics.decompositions import Factors
from ..numerics.metrics import exact
from ..planning.plan import Plan
from ..planning.ranks import RankChooser
from ..runtime.modules import naming
from ..runtime.processes import fails_together
from ..tuner.matrices import base_dtype, source_matrix
from .result import Trial


class Family:
    """All sizes of one model by one method: each matrix decomposed once, at full rank, unless neurons are left out."""

    def __init__(self, model: nn.Module, config: ReparamConfig, statistics: Statistics, seed: int) -> None:
        self.model = model
        self.job = Job.of_model(model, config, statistics, Options(seed, progress=False))
        for name, module in self.job.modules.items():
            if is_quantized(module):
                raise ValueError(
                    f"{name}: a search changes weights for each trial, and this one is quantised; load it in full."
                )
        self.method = cast(str, self.job.config.method)  # None was replaced by the default
        self.losses = self.job.losses()
        self.dense_parameters = sum(storage.dense for storage in self.job.storages.values())
        self._factors: dict[str, tuple[Factors, Tensor | None]] = {}

    def plan(self, keep: float) -> Plan:
        """The ranks for a size.

        Raises:
            ValueError: the budget cannot be met.
        """
        return self.job.plan_with(RankChooser.of(self.job.config, self.job.storages, keep), self.losses)

    def trial(self, keep: float, measure: Measure, limit: float) -> Trial | None:
        """Measure one size; None where the budget cannot be met."""
        start = time.perf_counter()
        try:
            plan = self.plan(keep)
        except ValueError:
            return None
        narrow = self.narrow_products(plan)  # by all processes together
        with ExitStack() as stack:
            with fails_together():
                stack.enter_context(self.truncated(plan, narrow))
            value = measure.of(self.model)
        within = measure.within(value, limit)
        seconds = round(time.perf_counter() - start, 2)
        return Trial(self.method, keep, plan.stored_parameters, value, within, plan.predicted_loss, seconds)

    def narrow_products(self, plan: Plan) -> dict[str, Product]:
        """The products of those matrices that lose neurons, by module; they are not parts of decompositions of the whole."""
        targets = {name: target for name, target in self.job.ranked(plan).items() if target.storage.is_narrow}
        return self.job.products(targets) if targets else {}

    @contextmanager
    def truncated(self, plan: Plan, narrow: Mapping[str, Product]) -> Iterator[None]:
        """Within this block weights are the products of a plan; afterwards they are the very same as before.

        Args:
            plan: of a size.
            narrow: the products of those matrices that lose neurons, from `narrow_products`.
        """
        before: list[tuple[Tensor, Tensor]] = []
        try:
            for name, product in narrow.items():
                module, storage = self.job.modules[name], self.job.storages[name]
                weight, matrix = cast(Tensor, module.weight), whole_matrix(product, storage.whole_shape)
                before.append((weight, weight.data))
                weight.data = layer_kind(module).weight(matrix.to(weight.device, weight.dtype), weight.shape)
                moved = whole_bias(product, len(matrix))
                if moved is not None:
                    bias = cast(Tensor, module.bias)
                    before.append((bias, bias.data))
                    bias.data = moved.to(bias.device, bias.dtype)
            for name, rank in plan.ranks.items():
                module = self.job.modules[name]
                if name in narrow:
                    continue
                if rank == min(self.job.storages[name].out_features, self.job.storages[name].in_features):
                    continue  # the product is W
                with naming(name):
                    factors, mean = self._decomposed(name)
                weight, A, B = cast(Tensor, module.weight), factors.A[:, :rank], factors.B[:rank]
                matrix = (A.float() @ B.float()).to(weight.device, weight.dtype)
                before.append((weight, weight.data))
                if mean is not None:
                    # Of the mean input the product computes A B μ in place of W μ: the bias takes over the difference, as
                    # `compress` does it. That needs W, so that the weight is replaced afterwards.
                    bias = cast(Tensor, module.bias)
                    moved = mean_output(source_matrix(module), bias, mean) - exact(A) @ (exact(B) @ mean.to(B.device))
                    before.append((bias, bias.data))
                    bias.data = moved.to(bias.device, bias.dtype)
                weight.data = layer_kind(module).weight(matrix, weight.shape)
            yield
        finally:
            for parameter, value in before:
                parameter.data = value

    def _decomposed(self, name: str) -> tuple[Factors, Tensor | None]:
        """Factors of which the first r columns and rows are those of rank r, and the mean input where a bias is moved."""
        if name not in self._factors:
            target, weighing = self.job.targets[name], self.job.weighing(name)
            W = source_matrix(target.module)
            wide = W.to(torch.promote_types(W.dtype, torch.float32))
            # One rank below full: at full rank a method returns W itself and puts directions in no order.
            compute = self.job.factorizer.method.function
            factors = compute(wide, max(1, min(W.shape) - 1), weighing.input, weighing.output, None)
            dtype = base_dtype(target.module)
            mean = weighing.mean if target.storage.bias else None
            self._factors[name] = Factors(factors.A.to(dtype), factors.B.to(dtype)), mean
        return self._factors[name]
