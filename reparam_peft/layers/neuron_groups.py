"""MLPs as the matrices that their neurons connect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_choice

LAYOUTS = ("rows", "split", "interleaved")


class Producer(NamedTuple):
    """A module whose outputs make the neurons of an MLP.

    Attributes:
        name: of the module.
        layout: which of its rows make neuron j of d: "rows", row j; "split", rows j and j + d; "interleaved", 2 j and 2 j + 1.
    """

    name: str
    layout: str


@dataclass(frozen=True)
class NeuronGroup:
    """An MLP: producers, something elementwise, a consumer.

    Attributes:
        producers: gate and up, or both in one, or the first layer.
        consumer: the module that reads the neurons.
        neurons: how many there are, d: columns of the consumer.
    """

    producers: tuple[Producer, ...]
    consumer: str
    neurons: int

    @property
    def names(self) -> list[str]:
        """Of all modules, the consumer last."""
        return [*(producer.name for producer in self.producers), self.consumer]

    def sizes(self, shapes: Mapping[str, tuple[int, int]], kept: int) -> dict[str, tuple[int, int]]:
        """(out, in) of what is left of each matrix where so many neurons stay, by module.

        Args:
            shapes: (out, in) of the matrices with all neurons.
            kept: number of neurons.
        """
        rows = {name: (shapes[name][0] * kept // self.neurons, shapes[name][1]) for name, _ in self.producers}
        return {**rows, self.consumer: (shapes[self.consumer][0], kept)}


def rows_of(layout: str, kept: Tensor, neurons: int) -> Tensor:
    """Rows of a producer that make some neurons, in the order in which what is left of it has the same layout.

    Args:
        layout: of the producer.
        kept: indices of the neurons, shape (k,), int64, ascending.
        neurons: d.

    Returns:
        Indices of rows, shape (k,) or (2 k,), int64, ascending.

    Raises:
        ValueError: `layout` is unknown, or `kept` is not ascending in [0, d).

    >>> rows_of("split", torch.tensor([0, 2]), 4), rows_of("interleaved", torch.tensor([0, 2]), 4)
    (tensor([0, 2, 4, 6]), tensor([0, 1, 4, 5]))
    """
    check_choice("layout", layout, LAYOUTS)
    if not (torch.nn.functional.pad(kept, (1, 0), value=-1).diff() > 0).all() or (len(kept) and kept[-1] >= neurons):
        raise ValueError(f"`kept` must be ascending numbers in [0, {neurons}), got {kept.tolist()}; sort them.")
    if layout == "rows":
        return kept
    if layout == "split":
        return torch.cat([kept, kept + neurons])
    return torch.stack([2 * kept, 2 * kept + 1], 1).flatten()
