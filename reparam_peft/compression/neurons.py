"""Neurons that MLPs lose: in which order, what numbers of them cost, and what is left of their matrices."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..layers.neuron_groups import NeuronGroup
from ..layers.product import Product
from ..numerics.neurons import Elimination, eliminate
from ..numerics.storage import Storage
from ..planning.neurons import NeuronOption, counts
from .factorizing import Factorizer
from .parts import Part, narrow, parts
from .weighing import Weighing

ShareOut: TypeAlias = Callable[
    [Sequence[str], str, Callable[[str], list[Tensor]], Callable[[str], list[Tensor]]], dict[str, list[Tensor]]
]

# Numbers of neurons, as parts of those that stay, at which spectra of what is left are computed; between them they are drawn
# straight, which changes predicted losses by one to three percent.
COMPUTED = (0.7, 0.4, 0.1)


class Neurons:
    """The MLPs of a job that may lose neurons.

    Args:
        mlps: the MLPs.
        storages: what the product of each matrix takes with all neurons, by module.
        matrix_of: gives a matrix (out, in).
        weighing: gives what errors of a module are weighed by; its statistics are at hand.
        factorizer: of the job.
        share_out: as `Job.share_out`, by the name of the consumer.
        as_predicted: whether matrices are factorised in the metrics that losses are predicted in.
    """

    def __init__(
        self,
        mlps: Sequence[NeuronGroup],
        storages: Mapping[str, Storage],
        matrix_of: Callable[[str], Tensor],
        weighing: Callable[[str], Weighing],
        factorizer: Factorizer,
        share_out: ShareOut,
        as_predicted: bool,
    ) -> None:
        self.mlps = {mlp.consumer: mlp for mlp in mlps}
        self.storages, self.matrix_of, self.weighing = storages, matrix_of, weighing
        self.factorizer, self.share_out, self.as_predicted = factorizer, share_out, as_predicted
        self.consumers = {name: mlp.consumer for mlp in mlps for name in mlp.names}
        self._eliminations: dict[str, Elimination] = {}
        self._recalled: dict[str, Tensor] = {}  # neurons that stay, by consumer, of an earlier run
        self._spectra: dict[str, list[Tensor]] = {}  # of what is left at each of the computed numbers, by module

    def leave_out(self, names: Container[str]) -> None:
        """MLPs that hold one of these modules keep their neurons."""
        self.mlps = {key: mlp for key, mlp in self.mlps.items() if not any(name in names for name in mlp.names)}
        self.consumers = {name: consumer for name, consumer in self.consumers.items() if consumer in self.mlps}

    def weigh(self, names: Sequence[str]) -> None:
        """Find what MLPs lose with their neurons, as far as the statistics of these modules, which are at hand, tell it.

        Consumers come before their producers, whose rows they choose, or together with them.
        """
        self._eliminate(names, spectra=True)

        def compute(name: str) -> list[Tensor]:
            consumer, weighing, matrix = self.consumers[name], self.weighing(name), self.matrix_of(name)
            spectra = []
            for count in self._computed(consumer):
                part = parts(self.mlps[consumer], self._eliminations[consumer].kept(count))[name]
                spectra.append(self.factorizer.losses(part.matrix(matrix, weighing.gram), part.weighing(weighing)))
            return spectra

        def room(name: str) -> list[Tensor]:
            mlp = self.mlps[self.consumers[name]]
            ranks = [self.narrowed(mlp, count)[name].full_rank for count in self._computed(mlp.consumer)]
            return [torch.empty(rank, dtype=torch.float64, device="cpu") for rank in ranks]

        members = [n for n in names if self.consumers.get(n) in self._eliminations and n not in self._spectra]
        self._spectra |= self.share_out(members, "Weighing neurons", compute, room)

    def offered(self, losses: Mapping[str, Tensor]) -> dict[str, list[NeuronOption]]:
        """The numbers of neurons that are offered of each MLP, by consumer, once all its matrices are weighed.

        Args:
            losses: what each direction of their matrices costs with all neurons, by module.
        """
        options = {}
        for consumer, mlp in self.mlps.items():
            spectra = {mlp.neurons: {name: losses[name] for name in mlp.names}}
            for index, count in enumerate(self._computed(consumer)):
                spectra[count] = {name: self._spectra[name][index] for name in mlp.names}
            options[consumer] = [self._option(mlp, count, spectra) for count in counts(mlp.neurons)]
        return options

    def parts(self, names: Sequence[str], left: Mapping[str, int]) -> dict[str, Part]:
        """What is left of those matrices, whose statistics are at hand, that belong to MLPs which lose neurons, by module.

        Args:
            names: of the modules; consumers before, or together with, their producers.
            left: number of neurons by consumer.
        """
        self.prepare(names, left)
        of_modules: dict[str, Part] = {}
        for name in names:
            consumer = self.consumers.get(name)
            if consumer is not None and consumer in left:
                kept = self._recalled.get(consumer)
                kept = self._eliminations[consumer].kept(left[consumer]) if kept is None else kept
                of_modules[name] = parts(self.mlps[consumer], kept)[name]
        return of_modules

    def recall(self, products: Mapping[str, Product]) -> None:
        """Leave the neurons that finished products of consumers have, which are then not chosen again."""
        columns = {name: products[name].columns for name in self.mlps if name in products}
        self._recalled |= {name: kept for name, kept in columns.items() if kept is not None}

    def prepare(self, names: Sequence[str], left: Mapping[str, int]) -> None:
        """Choose the neurons of the consumers among modules; processes wait for each other. Then `parts` computes nothing."""
        self._eliminate([name for name in names if name in left], left)

    def chosen(self, consumer: str, count: int, weighing: Weighing) -> dict[str, Part]:
        """What is left of the matrices of an MLP, by module, with neurons chosen by other inputs of the consumer.

        Args:
            consumer: which reads the neurons.
            count: of neurons that stay.
            weighing: of the consumer, by these inputs.
        """
        return parts(self.mlps[consumer], self._elimination(consumer, weighing, count).kept(count))

    def left(self, storages: Mapping[str, Storage]) -> dict[str, int]:
        """How many neurons stay of the MLPs that lose some, by consumer, where these are the storages of modules."""
        consumers = [consumer for consumer in self.mlps if consumer in storages and storages[consumer].is_narrow]
        return {consumer: storages[consumer].in_features for consumer in consumers}

    def narrowed(self, mlp: NeuronGroup, count: int) -> dict[str, Storage]:
        """What the products of the matrices of an MLP take where so many neurons stay, by module."""
        shapes = {name: self.storages[name].whole_shape for name in mlp.names}
        return {name: narrow(self.storages[name], size) for name, size in mlp.sizes(shapes, count).items()}

    def _eliminate(self, names: Sequence[str], left: Mapping[str, int] | None = None, spectra: bool = False) -> None:
        """Find the order in which MLPs lose neurons, of the consumers among modules, where it is not known yet.

        Args:
            names: of modules.
            left: numbers of neurons by consumer, where they are chosen already.
            spectra: whether spectra of what is left of the consumers are found along with it, where they need no other metrics.
        """
        along = spectra and self.as_predicted

        def ranks(consumer: str) -> list[int]:
            computed = self._computed(consumer) if along else []
            return [self.narrowed(self.mlps[consumer], count)[consumer].full_rank for count in computed]

        def compute(consumer: str) -> list[Tensor]:
            weighing = self.weighing(consumer)
            at = self._computed(consumer) if along else ()
            elimination = self._elimination(consumer, weighing, least[consumer], at)
            cut = [values[:rank] for values, rank in zip(elimination.spectra, ranks(consumer), strict=True)]
            return [elimination.order, *(costs * weighing.loss_scale for costs in (elimination.losses, *cut))]

        def room(consumer: str) -> list[Tensor]:
            gone = self.mlps[consumer].neurons - least[consumer]
            sizes = (gone + 1, *ranks(consumer))
            losses = [torch.empty(size, dtype=torch.float64, device="cpu") for size in sizes]
            return [torch.empty(gone, dtype=torch.int64, device="cpu"), *losses]

        new = [name for name in names if name in self.mlps and name not in self._eliminations]
        # A plan that is given may leave fewer neurons than are offered.
        least = {
            name: min(counts(self.mlps[name].neurons)[-1], (left or {}).get(name, self.mlps[name].neurons)) for name in new
        }
        for consumer, (order, losses, *of_what_is_left) in self.share_out(new, "Choosing neurons", compute, room).items():
            self._eliminations[consumer] = Elimination(order, losses, self.mlps[consumer].neurons)
            if along:
                self._spectra[consumer] = of_what_is_left

    def _elimination(self, consumer: str, weighing: Weighing, least: int, spectra_at: Sequence[int] = ()) -> Elimination:
        if weighing.fisher is None:
            raise ValueError("losses are predicted by gradients, which these statistics do not hold.")
        return eliminate(self.matrix_of(consumer), weighing.gram, weighing.fisher, least, spectra_at=spectra_at)

    def _computed(self, consumer: str) -> list[int]:
        """The numbers of neurons at which spectra are computed, from many to few."""
        neurons = self.mlps[consumer].neurons
        offered = counts(neurons)
        return sorted({min(offered, key=lambda count: abs(count - part * neurons)) for part in COMPUTED}, reverse=True)

    def _option(self, mlp: NeuronGroup, count: int, spectra: Mapping[int, Mapping[str, Tensor]]) -> NeuronOption:
        storages = self.narrowed(mlp, count)
        losses = {name: _between(spectra, count, name)[: storage.full_rank] for name, storage in storages.items()}
        return NeuronOption(count, self._eliminations[mlp.consumer].loss(count), storages, losses)


def _between(spectra: Mapping[int, Mapping[str, Tensor]], count: int, name: str) -> Tensor:
    """The spectrum of a matrix at a number of neurons: on the straight line between those of the nearest numbers."""
    fewer, more = max(c for c in spectra if c <= count), min(c for c in spectra if c >= count)
    low, high = spectra[fewer][name], spectra[more][name]
    low = torch.nn.functional.pad(low, (0, len(high) - len(low)))
    weight = (count - fewer) / (more - fewer) if more > fewer else 1.0
    return (1 - weight) * low + weight * high
