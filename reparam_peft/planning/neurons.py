"""Numbers of neurons of an MLP as options of the allocator: one curve for the matrices that its neurons connect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..numerics.storage import Storage
from .allocation import Point, lower_hull

# Numbers of neurons that are offered, as fractions of all; multiples of `NEURON_MULTIPLE`, where there are many.
FRACTIONS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
NEURON_MULTIPLE = 8
# What the predicted loss of neurons is multiplied by: when measured, that of low ranks exceeds its prediction by a little more.
# Chosen on held-out text of two kinds, at two sizes; 0.5 to 1.2 differ by less than 0.04 nats on text of the calibrated kind.
NEURON_FACTOR = 0.8

Ranks = dict[str, int | None]  # module → rank; None: dense


@dataclass(frozen=True)
class NeuronOption:
    """One number of neurons of an MLP.

    Attributes:
        neurons: how many stay.
        loss: what leaving out the others is predicted to cost, nats per token.
        storages: what the product of each matrix takes, by module: of what is left of it.
        losses: what each direction of what is left of each matrix is predicted to cost, by module.
    """

    neurons: int
    loss: float
    storages: Mapping[str, Storage]
    losses: Mapping[str, Tensor]


class GroupPoint(NamedTuple):
    """One way to store the matrices that the neurons of an MLP connect.

    Attributes:
        option: the number of neurons; None: all.
        points: one of each matrix, by module.
        cost: what they take of the budget, in all: numbers stored.
        loss: predicted increase of the loss, nats per token.
    """

    option: NeuronOption | None
    points: Mapping[str, Point]
    cost: int
    loss: float


@dataclass(frozen=True)
class Losses:
    """What the allocator goes by.

    Attributes:
        directions: what each direction of each matrix is predicted to cost, by module.
        neurons: for each MLP whose neurons are offered, numbers of them below all; by the module that reads them.
        options: what each way to store a matrix in few bits costs, by module; inf where it was not computed.
    """

    directions: Mapping[str, Tensor] = field(default_factory=dict)
    neurons: Mapping[str, Sequence[NeuronOption]] = field(default_factory=dict)
    options: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Allotment:
    """What the allocator chose.

    Attributes:
        ranks: of all matrices.
        neurons: the option of each MLP that loses neurons, by the module that reads them.
        points: of those matrices whose forms and bits were chosen, too, by module.
    """

    ranks: Ranks
    neurons: Mapping[str, NeuronOption] = field(default_factory=dict)
    points: Mapping[str, Point] = field(default_factory=dict)


def counts(neurons: int) -> list[int]:
    """Numbers of neurons that are offered, from many to few.

    >>> counts(1536)
    [1456, 1376, 1224, 1072, 920, 768, 608, 456, 304, 152]
    >>> counts(20)
    [19, 18, 16, 14, 12, 10, 8, 6, 4, 2]
    """
    multiple = NEURON_MULTIPLE if neurons >= 8 * NEURON_MULTIPLE else 1
    offered = {int(fraction * neurons + 1e-9) // multiple * multiple for fraction in FRACTIONS}
    return sorted((count for count in offered if 0 < count < neurons), reverse=True)


def group_curve(
    whole: Mapping[str, Sequence[Point]],
    options: Sequence[NeuronOption],
    curve: Callable[[NeuronOption, str], Sequence[Point]],
) -> list[GroupPoint]:
    """The curve of an MLP, cheapest first, losses falling: at each size the best number of neurons, and ranks.

    Args:
        whole: the curves of its matrices with all neurons, by module.
        options: the other numbers of neurons.
        curve: of what is left of a matrix in an option.
    """
    points = _together(None, whole)
    for option in options:
        curves = {name: curve(option, name) for name in whole}
        points += _together(option, curves) if all(curves.values()) else []
    points.sort(key=lambda point: (point.cost, point.loss))
    best: list[GroupPoint] = []
    for point in points:
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def _together(option: NeuronOption | None, curves: Mapping[str, Sequence[Point]]) -> list[GroupPoint]:
    """Points of several matrices together: the segments of their lower hulls in the order of what they gain."""
    hulls = {name: lower_hull(curve) for name, curve in curves.items()}
    steps = [(slope, name, index) for name, hull in hulls.items() for index, slope in hull[1:]]
    steps.sort(key=lambda step: -step[0])
    chosen = {name: curve[0] for name, curve in curves.items()}
    lost = 0.0 if option is None else NEURON_FACTOR * option.loss
    points = []
    for step in [None, *steps]:
        if step is not None:
            _, name, index = step
            chosen = {**chosen, name: curves[name][index]}
        cost = sum(point.cost for point in chosen.values())
        points.append(GroupPoint(option, chosen, cost, lost + sum(point.loss for point in chosen.values())))
    return points
