"""What a plan says of the neurons of one MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..arguments import check_text, is_finite, is_int
from ..layers.neuron_groups import LAYOUTS, NeuronGroup, Producer


@dataclass(frozen=True)
class NeuronPlan:
    """What becomes of the neurons of one MLP.

    Attributes:
        group: the MLP.
        kept: how many neurons stay.
        predicted_loss: what leaving out the others is predicted to cost, nats per token.
    """

    group: NeuronGroup
    kept: int
    predicted_loss: float

    @property
    def consumer(self) -> str:
        """The module that reads the neurons."""
        return self.group.consumer

    def sizes(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """(out, in) of what is left of each matrix, by module.

        Args:
            shapes: (out, in) of the matrices with all neurons.
        """
        return self.group.sizes(shapes, self.kept)


def read_neuron_plan(entry: Mapping[str, Any]) -> NeuronPlan:
    """What `asdict` made of a `NeuronPlan`.

    Raises:
        ValueError, TypeError, KeyError: a field is missing or wrong.
    """
    fields = dict(entry["group"])
    producers = tuple(Producer(*producer) for producer in fields.pop("producers"))
    group, kept, lost = NeuronGroup(producers, **fields), entry["kept"], entry["predicted_loss"]
    check_text("consumer", group.consumer)
    if not producers or not all(isinstance(name, str) and layout in LAYOUTS for name, layout in producers):
        raise ValueError(f"{group.consumer}: `producers` must be names, each with one of {LAYOUTS}, got {producers!r}.")
    if not (is_int(group.neurons) and is_int(kept) and 0 < kept < group.neurons):
        raise ValueError(f"{group.consumer}: `kept` must be in [1, {group.neurons}), the number of neurons, got {kept!r}.")
    if not is_finite(lost):
        raise ValueError(f"{group.consumer}: `predicted_loss` must be a finite number, got {lost!r}.")
    return NeuronPlan(**{**entry, "group": group})
