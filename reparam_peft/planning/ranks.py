"""Ranks under a budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config.reparam_config import ReparamConfig
from ..numerics.storage import Storage
from .allocation import RANK_MULTIPLE, Point, allocate, points
from .plan import Plan


def allocate_ranks(
    config: ReparamConfig, storages: Mapping[str, Storage], losses: Mapping[str, Tensor], fixed: Mapping[str, int | None]
) -> dict[str, int | None]:
    """Ranks by predicted loss under the config's budget; None: dense. Uniform ranks are a candidate too.

    Args:
        config: `keep`, `rank_multiple`, `floor` and `ceiling`.
        storages: what each target's product takes.
        losses: what each direction of each target costs.
        fixed: targets whose rank is given.

    Raises:
        ValueError: the budget cannot be met.
    """
    floor, ceiling = config.floor or 0.0, 1.0 if config.ceiling is None else config.ceiling
    budget = parameter_budget(config.keep, storages)
    curves: dict[str, list[Point]] = {}
    for name, storage in storages.items():
        if name in fixed:
            rank = fixed[name]
            curves[name] = [Point(rank, storage.stored(rank), 0.0)]
        else:
            small = min(storage.out_features, storage.in_features) < 8 * RANK_MULTIPLE  # gains nothing by alignment
            multiple = config.rank_multiple or (1 if small else RANK_MULTIPLE)
            curves[name] = points(losses[name], storage, multiple, floor, ceiling)
    least = sum(curve[0].parameters for curve in curves.values())
    if least > budget:
        held = sum(curves[name][0].parameters for name in fixed)
        raise ValueError(
            f"`keep={config.keep}` allows {budget:,} parameters, and the least that can be stored is {least:,}: {held:,} for "
            f"the {len(fixed)} targets that `dense_modules` and `rank_pattern` fix, and the lowest ranks of the others. Raise "
            "`keep`, or lower `floor` or `rank_multiple`."
        )
    chosen = allocate(list(curves.values()), budget)
    ranks = {name: curve[index].rank for (name, curve), index in zip(curves.items(), chosen, strict=True)}
    uniform = {name: _uniform_point(curve, config.keep * storages[name].dense) for name, curve in curves.items()}
    if None in uniform.values() or sum(point.parameters for point in uniform.values()) > budget:
        return ranks
    lost = sum(curve[index].loss for curve, index in zip(curves.values(), chosen, strict=True))
    if sum(point.loss for point in uniform.values()) < lost:
        return {name: point.rank for name, point in uniform.items()}
    return ranks


def is_nested(config: ReparamConfig) -> bool:
    """Whether products of a rank are the first columns of A and rows of B of those of any higher rank, and an adapter says so.

    They are, but for the pivot form and an autoencoder. It says so where a `ceiling` below 1 leaves nothing dense by itself.
    """
    return config.form == "factors" and config.method != "autoencoder" and config.ceiling is not None and config.ceiling < 1


def smaller_ranks(
    config: ReparamConfig, storages: Mapping[str, Storage], plan: Plan, given: Mapping[str, int | None]
) -> dict[float, dict[str, int | None]] | None:
    """Ranks at sizes below that of a plan, in steps of 0.05 down to the least there is: size → module → rank; None: dense.

    No rank rises, so that the products are the first columns of A and rows of B of those of the plan. A matrix may be dense
    where the budget allows it, since a base model has it. None unless the products are nested.

    Args:
        config: that the plan was made with.
        storages: what each target's product takes.
        plan: whose directions are in the order of what they cost.
        given: ranks that the config fixes, which stay.
    """
    factorised = {module.name: module for module in plan.modules if module.rank is not None}
    if not is_nested(config):
        return None
    config = copy.copy(config)
    config.ceiling = None
    fixed = {module.name: module.rank for module in plan.modules if module.rank is None or not any(module.spectrum)} | {**given}
    losses = {module.name: torch.tensor(module.spectrum, dtype=torch.float64) for module in plan.modules}
    found: dict[float, dict[str, int | None]] = {}
    for step in range(math.ceil(plan.keep * 20 - 1e-9) - 1, 0, -1):
        config.keep = step / 20
        try:
            ranks = allocate_ranks(config, storages, losses, fixed)
        except ValueError:  # smaller than the lowest ranks and what is always dense
            break
        found[config.keep] = {name: ranks[name] and min(ranks[name], module.rank) for name, module in factorised.items()}
    return found


def check_budget(keep: float, ranks: Mapping[str, int | None], storages: Mapping[str, Storage]) -> None:
    """Raise `ValueError` where ranks store more than the fraction `keep` of the targeted parameters."""
    stored, budget = _stored(ranks, storages), parameter_budget(keep, storages)
    if stored > budget:
        dense = sum(storages[name].dense for name, rank in ranks.items() if rank is None)
        raise ValueError(
            f"`keep={keep}` allows {budget:,} parameters, and these ranks store {stored:,}, of which {dense:,} are in matrices "
            "that stay dense. Raise `keep`, name fewer `dense_modules`, or use `allocation='loss'`."
        )


def parameter_budget(keep: float, storages: Mapping[str, Storage]) -> int:
    """How many numbers the fraction `keep` of the targeted parameters is."""
    return math.floor(keep * sum(storage.dense for storage in storages.values()) * (1 + 1e-12))


def _uniform_point(curve: list[Point], parameters: float) -> Point | None:
    """The dearest point of a curve that stores at most so many parameters; the only point of a fixed one."""
    within = curve if len(curve) == 1 else [point for point in curve if point.parameters <= parameters]
    return within[-1] if within else None


def _stored(ranks: Mapping[str, int | None], storages: Mapping[str, Storage]) -> int:
    return sum(storages[name].stored(rank) for name, rank in ranks.items())
