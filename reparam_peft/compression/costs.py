"""What the matrices of a model cost under a budget of multiply-adds, or of time, which is measured here."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from ..config.reparam_config import ReparamConfig
from ..evaluation.speed import flush_caches, synchronize
from ..layers.calling import call
from ..layers.factorized_kinds import FactorizedLinear
from ..layers.wrapper import kind_and_layer
from ..numerics.storage import Storage
from ..planning.costs import Costs, MultiplyAdds, Nanoseconds
from ..runtime.processes import fails_together, first_of
from ..tuner.matrices import base_dtype
from ..tuner.targets import Target

ROWS = 256  # of the module that sees most; others see their part of these
RANKS = 8  # that are measured, evenly spaced up to full rank
REPEATS = 7  # of which the median counts


def costs_of(config: ReparamConfig, targets: Mapping[str, Target], rows: Mapping[str, int]) -> Costs | None:
    """What matrices cost under the budget of a config; None where that is what they store.

    Args:
        config: with its `form` resolved.
        targets: by name.
        rows: of its input that calibration saw, by module.

    Raises:
        ValueError: the time of a layer is asked for that is not a linear one.
    """
    if config.budget not in ("flops", "latency"):
        return None
    kinds = {name: kind_and_layer(target.module)[0] for name, target in targets.items()}
    if config.budget == "flops":
        return MultiplyAdds(dict(rows), {name for name, kind in kinds.items() if kind.one_hot})
    others = [name for name, kind in kinds.items() if not kind.linear]
    if others:
        raise ValueError(
            f"{others[0]}: `budget='latency'` measures linear layers, and {len(others)} targets are others; leave them out "
            "with `exclude_modules`, or use `budget='flops'`."
        )
    most = max(rows.values(), default=0)
    dense, products = {}, {}
    for name, target in targets.items():
        part = rows.get(name, most) / most if most else 1.0
        count = 2 ** round(math.log2(max(1.0, ROWS * part)))  # few different ones, where experts see each another number
        device = target.module.weight.device if target.module.weight is not None else torch.device("cpu")
        with fails_together():
            of_whole, by_rank = _times(
                target.storage.out_features,
                target.storage.in_features,
                config.form or "factors",
                count,
                base_dtype(target.module),
                device,
            )
        # Each process has measured other times, and all are to choose the same ranks.
        dense[name] = round(first_of(of_whole))
        products[name] = {rank: round(first_of(time)) for rank, time in by_rank.items()}
    return Nanoseconds(dense, products)


@cache
def _times(
    out_features: int, in_features: int, form: str, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, dict[int, int]]:
    """Nanoseconds of a linear layer, and of its products by rank, with weights that are not in the caches."""
    x = torch.randn(1, rows, in_features, device=device, dtype=dtype)
    full = Storage(out_features, in_features).full_rank
    ranks = sorted({1, *range(max(1, full // RANKS), full + 1, max(1, full // RANKS)), full})
    dense = _median(nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype), x)
    made = {rank: FactorizedLinear(in_features, out_features, rank, form, device=device, dtype=dtype) for rank in ranks}
    return dense, {rank: _median(layer, x) for rank, layer in made.items()}


@torch.inference_mode()
def _median(layer: nn.Module, x: Tensor) -> int:
    for parameter in layer.parameters():
        parameter.normal_()
    call(layer, x)  # the first call makes what later ones find
    return round(statistics.median(_once(lambda: call(layer, x), x.device) for _ in range(REPEATS)))


def _once(run: Callable[[], Tensor], device: torch.device) -> int:
    flush_caches(device)
    start = time.perf_counter_ns()
    run()
    synchronize(device)
    return time.perf_counter_ns() - start
