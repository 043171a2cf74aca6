"""Ranks under a budget: what a config gives, uniform ones, and those of the least predicted loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config.reparam_config import ReparamConfig
from ..numerics.decompositions import check_rank
from ..numerics.methods import METHODS
from ..numerics.storage import OF_THE_BASE, Storage, uniform_rank
from .allocation import RANK_MULTIPLE, Choice, Point, allocate, points
from .byte_options import Bytes
from .costs import Costs, cost_of
from .neurons import Allotment, GroupPoint, Losses, NeuronOption, Ranks, group_curve
from .plan import Plan


def resolve_rank(config: ReparamConfig, name: str, storage: Storage, keep: float | None = None) -> int | None:
    """The rank that a config gives a module's matrix by itself, or None where it stays dense.

    `dense_modules` comes first, then `rank_pattern`, `r`, and `keep`, in place of which another can be given.

    Raises:
        ValueError: `rank_pattern` holds a rank above min(out, in).
    """
    if name in (config.dense_modules or ()):
        return None
    rank = config.module_rank(name)
    if rank is not None:
        check_rank(rank, (storage.out_features, storage.in_features))
        if storage.form == "dense" and rank < storage.full_rank:
            raise ValueError(f"its form is 'dense', of which the rank is {storage.full_rank}, and `rank_pattern` says {rank}.")
        if storage.form_at(rank) == "corrected" and "Q" not in storage.widths(rank) and storage.bits != OF_THE_BASE:
            raise ValueError(
                f"its rank is in `rank_pattern`, and a matrix {storage.whole_shape} of this kind of layer is not stored in few "
                "bits, so that there is nothing to correct; leave it out with `exclude_modules`."
            )
        return rank
    if config.r is None:
        return uniform_rank(config.keep if keep is None else keep, storage)
    largest = min(storage.out_features, storage.in_features)
    if isinstance(config.r, str):  # "full"
        return largest
    return config.r if config.r <= largest and storage.saves(config.r) else None


def is_nested(config: ReparamConfig) -> bool:
    """Whether products of a rank are the first columns of A and rows of B of those of any higher rank, and an adapter says so.

    They are with most methods, but not in pivot form. It says so where a `ceiling` below 1 leaves nothing dense by itself.
    """
    method_is_nested = config.method is not None and METHODS[config.method].nested
    return (
        config.form == "factors"
        and not config.chooses_bits
        and config.budget in (None, "parameters")
        and method_is_nested
        and config.ceiling is not None
        and config.ceiling < 1
    )


@dataclass(frozen=True)
class RankChooser:
    """Chooses the ranks of some matrices under a budget.

    Attributes:
        storages: what the product of each matrix takes.
        keep: fraction of the parameters of all of them that may be stored.
        by_loss: whether ranks are those of the least predicted loss under one budget; else each matrix has its own.
        prescribed: ranks that are not to be chosen.
        uniform: without `by_loss`, the ranks at this size.
        within_budget: whether `uniform` is meant to fit `keep`; one rank for all matrices is not.
        rank_multiple: what chosen ranks are a multiple of; None: 8, and 1 for matrices with a side below 64.
        floor: the least fraction of a matrix that is stored.
        ceiling: the most; below 1 only matrices too small for any product stay dense.
        bytes: what each matrix takes and can be stored as, under a budget of bytes; None: of parameters.
        costs: what a matrix takes of a budget of another kind; None: numbers stored.
    """

    storages: Mapping[str, Storage]
    keep: float
    by_loss: bool = True
    prescribed: Mapping[str, int | None] = field(default_factory=dict)
    uniform: Mapping[str, int | None] = field(default_factory=dict)
    within_budget: bool = True
    rank_multiple: int | None = None
    floor: float = 0.0
    ceiling: float = 1.0
    bytes: Bytes | None = None
    costs: Costs | None = None

    @classmethod
    def of(
        cls, config: ReparamConfig, storages: Mapping[str, Storage], keep: float | None = None, of_bytes: Bytes | None = None
    ) -> RankChooser:
        """The chooser that a config asks for, at its own `keep` or another.

        Args:
            config: with its `allocation` resolved.
            storages: what the product of each matrix takes.
            keep: in place of that of the config.
            of_bytes: what each matrix takes and can be stored as, where the budget is of bytes.

        Raises:
            ValueError: `rank_pattern` holds a rank above min(out, in).
        """
        uniform = {name: resolve_rank(config, name, storage, keep) for name, storage in storages.items()}
        dense = set(config.dense_modules or ())
        # Under a budget of bytes a rank that is given leaves the bits to be chosen.
        prescribed = {
            name: rank
            for name, rank in uniform.items()
            if name in dense or (of_bytes is None and config.module_rank(name) is not None)
        }
        return cls(
            storages=storages,
            keep=config.keep if keep is None else keep,
            by_loss=config.allocation == "loss",
            prescribed=prescribed,
            uniform=uniform,
            within_budget=config.r is None,
            rank_multiple=config.rank_multiple,
            floor=config.floor or 0.0,
            ceiling=1.0 if config.ceiling is None else config.ceiling,
            bytes=of_bytes,
        )

    def without(self, names: Container[str]) -> RankChooser:
        """The chooser of the other matrices."""
        ours: Any = (self.storages, self.prescribed, self.uniform)
        storages, prescribed, uniform = ({n: value for n, value in of.items() if n not in names} for of in ours)
        return replace(self, storages=storages, prescribed=prescribed, uniform=uniform)

    @property
    def budget(self) -> int:
        """How many numbers, or bytes, may be stored."""
        if self.bytes is not None:
            return math.floor(self.keep * sum(self.bytes.dense[name] for name in self.storages) * (1 + 1e-12))
        if self.costs is not None:
            return math.floor(self.keep * sum(self._cost(name)(None) for name in self.storages) * (1 + 1e-12))
        return parameter_budget(self.keep, self.storages)

    @property
    def unit(self) -> str:
        """What the budget is of."""
        if self.costs is not None:
            return self.costs.unit
        return "parameters" if self.bytes is None else "bytes"

    def _cost(self, name: str, storage: Storage | None = None) -> Callable[[int | None], int]:
        return cost_of(self.costs, name, self.storages[name] if storage is None else storage)

    def check(self) -> None:
        """Raise `ValueError`, before minutes of work, where with all neurons no ranks fit, whatever the losses are."""
        if not self.by_loss:
            self.ranks(Losses())
            return
        nothing = {
            name: torch.zeros(storage.full_rank, dtype=torch.float64, device="cpu") for name, storage in self.storages.items()
        }
        options = {} if self.bytes is None else self.bytes.options
        falling = {name: torch.arange(len(offered), 0.0, -1.0, device="cpu") for name, offered in options.items()}
        self.least_loss(Losses(nothing, options=falling), self.prescribed)

    def ranks(self, losses: Losses) -> Allotment:
        """The ranks, and the MLPs that lose neurons; `losses` are needed with `by_loss`.

        A matrix that no gradient reaches, whose directions cost nothing, gets a uniform rank.

        Raises:
            ValueError: the budget cannot be met.
        """
        if self.by_loss:
            unreached = {
                name: uniform_rank(self.keep, self.storages[name]) for name in self.unreached(losses) if self.bytes is None
            }
            return self.least_loss(losses, {**self.prescribed, **unreached})
        if self.within_budget:
            self.check_budget(self.uniform)
        return Allotment(dict(self.uniform))

    def unreached(self, losses: Losses) -> list[str]:
        """Matrices whose rank is to be chosen by loss, and that no gradient reaches."""
        chosen = [name for name in self.storages if self.by_loss and name not in self.prescribed]
        return [name for name in chosen if not losses.directions[name].any()]

    def least_loss(self, losses: Losses, fixed: Mapping[str, int | None]) -> Allotment:
        """Ranks of the least predicted loss under the budget, with those of some matrices fixed; uniform ranks are a candidate.

        An MLP keeps its neurons where the rank of one of its matrices is fixed.

        Raises:
            ValueError: the budget cannot be met.
        """
        curves = {name: self._curve(name, losses, fixed) for name in self.storages}
        least = sum(curve[0].cost for curve in curves.values())
        if least > self.budget:
            held = sum(curves[name][0].cost for name in fixed)
            remedy = "lower `floor` or `rank_multiple`" if self.bytes is None else "allow a lower width in `bits`"
            raise ValueError(
                f"`keep={self.keep}` allows {self.budget:,} {self.unit}, and the least that can be stored is {least:,}: "
                f"{held:,} for the {len(fixed)} targets that `dense_modules` and `rank_pattern` fix, and the lowest ranks of "
                f"the others. Raise `keep`, or {remedy}."
            )
        mlps = self._mlps(losses, fixed)
        grouped = {name for options in mlps.values() for name in options[0].storages}
        units: dict[str, Sequence[Choice]] = {name: curve for name, curve in curves.items() if name not in grouped}
        for consumer, options in mlps.items():
            units[consumer] = group_curve({name: curves[name] for name in options[0].storages}, options, self._curve_of_option)
        chosen = self._allocated(units)
        if (of_bytes := self.bytes) is not None:
            alone = {
                name: curve if name in fixed else of_bytes.curve_alone(name, losses.options[name], self.keep)
                for name, curve in curves.items()
            }
            if all(alone.values()) and sum(curve[0].cost for curve in alone.values()) <= self.budget:
                # What quantisation alone can do is a candidate, so that nothing predicted to be worse is ever chosen.
                chosen = min(chosen, self._allocated(alone), key=lambda made: sum(choice.loss for choice in made.values()))
            points = {name: choice for name, choice in chosen.items() if isinstance(choice, Point)}
            return Allotment({name: point.rank for name, point in points.items()}, points=points)
        uniform = {name: _uniform_point(curve, self.keep * self._cost(name)(None)) for name, curve in curves.items()}
        candidates = [point for point in uniform.values() if point is not None]
        fits = len(candidates) == len(curves) and sum(point.cost for point in candidates) <= self.budget
        if fits and sum(point.loss for point in candidates) < sum(choice.loss for choice in chosen.values()):
            return Allotment({name: point.rank for name, point in zip(uniform, candidates, strict=True)})
        ranks: Ranks = dict.fromkeys(self.storages)
        neurons = {}
        for unit, choice in chosen.items():
            if isinstance(choice, Point):
                ranks[unit] = choice.rank
            elif isinstance(choice, GroupPoint):
                ranks.update({name: point.rank for name, point in choice.points.items()})
                if choice.option is not None:
                    neurons[unit] = choice.option
        return Allotment(ranks, neurons)

    def _allocated(self, units: Mapping[str, Sequence[Choice]]) -> dict[str, Choice]:
        """The choice of least predicted loss for each unit, by its curve."""
        indices = allocate(list(units.values()), self.budget)
        return {unit: curve[index] for (unit, curve), index in zip(units.items(), indices, strict=True)}

    def _mlps(self, losses: Losses, fixed: Mapping[str, int | None]) -> dict[str, Sequence[NeuronOption]]:
        """The MLPs that may lose neurons: those with all ranks to be chosen."""
        mlps = {consumer: options for consumer, options in losses.neurons.items() if options}
        return {consumer: options for consumer, options in mlps.items() if not fixed.keys() & options[0].storages.keys()}

    def _curve_of_option(self, option: NeuronOption, name: str) -> list[Point]:
        return self._points(name, option.losses[name], option.storages[name])

    def smaller(self, plan: Plan) -> dict[float, Ranks]:
        """Ranks at sizes below that of a plan, in steps of 0.05 down to the least there is: size → module → rank; None: dense.

        No rank rises, so that the products are the first columns of A and rows of B of those of the plan. A matrix may be
        dense where the budget allows it, since a base model has it.

        Args:
            plan: of this chooser, whose directions are in the order of what they cost.
        """
        factorised = {module.name: module.rank for module in plan.modules if module.rank is not None}
        held = {module.name: module.rank for module in plan.modules if module.rank is None or not any(module.spectrum)}
        losses = {module.name: torch.tensor(module.spectrum, dtype=torch.float64, device="cpu") for module in plan.modules}
        sizes: dict[float, Ranks] = {}
        for step in range(math.ceil(plan.keep * 20 - 1e-9) - 1, 0, -1):
            keep = step / 20
            try:
                ranks = replace(self, keep=keep, ceiling=1.0).least_loss(Losses(losses), {**held, **self.prescribed}).ranks
            except ValueError:  # smaller than the lowest ranks and what is always dense
                break
            sizes[keep] = {
                name: None if (rank := ranks[name]) is None else min(rank, most) for name, most in factorised.items()
            }
        return sizes

    def check_budget(self, ranks: Mapping[str, int | None]) -> None:
        """Raise `ValueError` where ranks store more than the budget."""
        stored = sum(self.storages[name].stored(rank) for name, rank in ranks.items())
        if stored > self.budget:
            dense = sum(self.storages[name].dense for name, rank in ranks.items() if rank is None)
            raise ValueError(
                f"`keep={self.keep}` allows {self.budget:,} parameters, and these ranks store {stored:,}, of which {dense:,} "
                "are in matrices that stay dense. Raise `keep`, name fewer `dense_modules`, or use `allocation='loss'`."
            )

    def _curve(self, name: str, losses: Losses, fixed: Mapping[str, int | None]) -> list[Point]:
        storage = self.storages[name]
        if self.bytes is not None:
            if name in fixed:
                return [Point(fixed[name], self.bytes.arrived[name], 0.0)]
            return self.bytes.curve(name, losses.options[name], self.keep)
        if name in fixed:
            return [Point(fixed[name], self._cost(name)(fixed[name]), 0.0)]
        return self._points(name, losses.directions[name], storage)

    def _points(self, name: str, losses: Tensor, storage: Storage) -> list[Point]:
        small = min(storage.out_features, storage.in_features) < 8 * RANK_MULTIPLE  # gains nothing by alignment
        multiple = self.rank_multiple or (1 if small else RANK_MULTIPLE)
        return points(losses, storage, multiple, self.floor, self.ceiling, self._cost(name, storage))


def parameter_budget(keep: float, storages: Mapping[str, Storage]) -> int:
    """How many numbers the fraction `keep` of the targeted parameters is."""
    return math.floor(keep * sum(storage.dense for storage in storages.values()) * (1 + 1e-12))


def _uniform_point(curve: Sequence[Point], cost: float) -> Point | None:
    """The dearest point of a curve that takes at most so much of the budget; the only point of a fixed one."""
    within = curve if len(curve) == 1 else [point for point in curve if point.cost <= cost]
    return within[-1] if within else None
