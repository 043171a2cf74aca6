"""What matrices take of a budget that is not of what is stored: of multiply-adds, or of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Protocol

from ..numerics.storage import Storage


class Costs(Protocol):
    """What a matrix takes of a budget, stored in one way or another."""

    @property
    def unit(self) -> str:
        """What the budget is of."""

    def cost(self, name: str, storage: Storage, rank: int | None) -> int:
        """Of a module's matrix as a product of a rank, or whole (None)."""


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiplications, each with an addition, over all rows of the calibration data.

    A product takes as many for each row as its matrices have numbers; masks and biases take none.

    Attributes:
        rows: how many of its input each module saw, by name: positions of a convolution, and of an expert the tokens that were
            routed to it. One where that is not known.
        lookups: modules in which a row picks a column of the matrix, which takes none.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    lookups: Set[str] = frozenset()
    unit: str = "multiply-adds"

    def cost(self, name: str, storage: Storage, rank: int | None) -> int:
        """As for `Costs`."""
        matrices = {"W": storage.whole_shape} if rank is None else storage.matrices(rank)
        looked_up = {"W", "B", "P"} if name in self.lookups else set[str]()
        numbers = sum(math.prod(shape) for matrix, shape in matrices.items() if matrix not in looked_up)
        return numbers * max(1, self.rows.get(name, 1))


@dataclass(frozen=True)
class Nanoseconds:
    """Measured time, of some ranks and between them on straight lines.

    A higher rank never takes less: what noise says is left out.

    Attributes:
        dense: of a layer with the whole matrix, by module.
        products: of its products, by module: rank → nanoseconds, of two ranks at least.
    """

    dense: Mapping[str, int]
    products: Mapping[str, Mapping[int, int]]
    unit: str = "nanoseconds"

    def cost(self, name: str, storage: Storage, rank: int | None) -> int:
        """As for `Costs`.

        Raises:
            ValueError: neurons are left out, of which nothing was measured.
        """
        if rank is None:
            return self.dense[name]
        if storage.is_narrow:
            raise ValueError(f"{name}: the time of a layer that has lost neurons was not measured.")
        return round(_between(self.products[name], rank))


def _between(measured: Mapping[int, int], rank: int) -> float:
    """The time at a rank, rising with it.

    >>> _between({8: 100, 16: 90, 32: 200}, 12), _between({8: 100, 16: 90, 32: 200}, 24)
    (100.0, 150.0)
    """
    times: list[tuple[int, float]] = []
    for at in sorted(measured):
        times.append((at, max(float(measured[at]), times[-1][1] if times else 0.0)))
    start = next((entry for entry in reversed(times) if entry[0] <= rank), times[0])
    end = next((entry for entry in times if entry[0] > start[0]), times[-1])
    if end[0] == start[0]:
        return start[1]
    part = min(max((rank - start[0]) / (end[0] - start[0]), 0.0), 1.0)
    return start[1] + part * (end[1] - start[1])


def cost_of(costs: Costs | None, name: str, storage: Storage) -> Callable[[int | None], int]:
    """What a matrix takes, by rank: without other costs, the numbers stored."""
    return storage.stored if costs is None else lambda rank: costs.cost(name, storage, rank)
