"""Neurons that MLPs lose: in which order, what numbers of them cost, and what is left of their matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..calibration.neuron_groups import find_groups
from ..calibration.statistics import Batches, Statistics
from ..config.reparam_config import ReparamConfig
from ..layers.neuron_groups import NeuronGroup
from ..numerics.methods import method_of
from ..numerics.neurons import Elimination, eliminate
from ..numerics.storage import Storage
from ..planning.neurons import NeuronOption, counts
from ..planning.plan import Plan
from ..planning.ranks import is_nested
from ..tuner.targets import Target
from .factorizing import Factorizer
from .parts import Part, narrow, parts
from .weighing import Weighing

ShareOut: TypeAlias = Callable[
    [Sequence[str], str, Callable[[str], list[Tensor]], Callable[[str], list[Tensor]]], dict[str, list[Tensor]]
]

# Numbers of neurons, as parts of those that stay, at which spectra of what is left are computed; between them they are drawn
# straight, which changes predicted losses by about a percent.
COMPUTED = (0.7, 0.4)


class Neurons:
    """The MLPs of a job that may lose neurons.

    Args:
        mlps: the MLPs.
        storages: what the product of each matrix takes with all neurons, by module.
        matrix_of: gives a matrix (out, in).
        weighing: gives what errors of a module are weighed by; its statistics are at hand.
        factorizer: of the job.
        share_out: as `Job.share_out`, by the name of the consumer.
    """

    def __init__(
        self,
        mlps: Sequence[NeuronGroup],
        storages: Mapping[str, Storage],
        matrix_of: Callable[[str], Tensor],
        weighing: Callable[[str], Weighing],
        factorizer: Factorizer,
        share_out: ShareOut,
    ) -> None:
        self.mlps = {mlp.consumer: mlp for mlp in mlps}
        self.storages, self.matrix_of, self.weighing = storages, matrix_of, weighing
        self.factorizer, self.share_out = factorizer, share_out
        self._eliminations: dict[str, Elimination] = {}

    def options(self, names: Sequence[str], losses: Mapping[str, Tensor]) -> dict[str, list[NeuronOption]]:
        """The numbers of neurons that are offered of the MLPs among modules whose statistics are at hand, by consumer.

        Args:
            names: of the modules.
            losses: what each direction of their matrices costs with all neurons, by module.
        """
        mlps = {consumer: mlp for consumer, mlp in self.mlps.items() if set(mlp.names) <= set(names)}
        self._eliminate(list(mlps))

        def compute(consumer: str) -> list[Tensor]:
            return [costs for count in self._computed(consumer) for costs in self._spectra(mlps[consumer], count).values()]

        def room(consumer: str) -> list[Tensor]:
            return [
                torch.empty(storage.full_rank, dtype=torch.float64)
                for count in self._computed(consumer)
                for storage in self.narrowed(mlps[consumer], count).values()
            ]

        offered = {}
        for consumer, spectra in self.share_out(list(mlps), "Weighing neurons", compute, room).items():
            mlp, found = mlps[consumer], iter(spectra)
            known = {mlp.neurons: {name: losses[name] for name in mlp.names}}
            for count in self._computed(consumer):
                known[count] = {name: next(found) for name in mlp.names}
            offered[consumer] = [self._option(mlp, count, known) for count in counts(mlp.neurons)]
        return offered

    def parts(self, left: Mapping[str, int]) -> dict[str, Part]:
        """What is left of the matrices of MLPs whose statistics are at hand, by module.

        Args:
            left: number of neurons by consumer.
        """
        self._eliminate(left)
        found: dict[str, Part] = {}
        for consumer, count in left.items():
            found |= parts(self.mlps[consumer], self._eliminations[consumer].kept(count))
        return found

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
        found = {consumer: storages[consumer] for consumer in self.mlps if consumer in storages}
        return {consumer: storage.in_features for consumer, storage in found.items() if storage.is_narrow}

    def narrowed(self, mlp: NeuronGroup, count: int) -> dict[str, Storage]:
        """What the products of the matrices of an MLP take where so many neurons stay, by module."""
        shapes = {name: self.storages[name].whole_shape for name in mlp.names}
        return {name: narrow(self.storages[name], size) for name, size in mlp.sizes(shapes, count).items()}

    def _eliminate(self, consumers: Iterable[str]) -> None:
        """Find the order in which MLPs lose neurons, where it is not known yet."""

        def compute(consumer: str) -> list[Tensor]:
            weighing = self.weighing(consumer)
            found = self._elimination(consumer, weighing, counts(self.mlps[consumer].neurons)[-1])
            return [found.order, found.losses * weighing.loss_scale]

        def room(consumer: str) -> list[Tensor]:
            gone = self.mlps[consumer].neurons - counts(self.mlps[consumer].neurons)[-1]
            return [torch.empty(gone, dtype=torch.int64), torch.empty(gone + 1, dtype=torch.float64)]

        new = [consumer for consumer in consumers if consumer not in self._eliminations]
        for consumer, (order, losses) in self.share_out(new, "Choosing neurons", compute, room).items():
            self._eliminations[consumer] = Elimination(order, losses, self.mlps[consumer].neurons)

    def _elimination(self, consumer: str, weighing: Weighing, least: int) -> Elimination:
        if weighing.fisher is None:
            raise ValueError("losses are predicted by gradients, which these statistics do not hold.")
        return eliminate(self.matrix_of(consumer), weighing.gram, weighing.fisher, least)

    def _computed(self, consumer: str) -> list[int]:
        """The numbers of neurons at which spectra are computed, from many to few."""
        neurons = self.mlps[consumer].neurons
        offered = counts(neurons)
        return sorted({min(offered, key=lambda count: abs(count - part * neurons)) for part in COMPUTED}, reverse=True)

    def _spectra(self, mlp: NeuronGroup, count: int) -> dict[str, Tensor]:
        """What each direction of what is left of the matrices of an MLP costs, by module."""
        spectra = {}
        for name, part in parts(mlp, self._eliminations[mlp.consumer].kept(count)).items():
            weighing = self.weighing(name)
            spectra[name] = self.factorizer.losses(part.matrix(self.matrix_of(name), weighing.gram), part.weighing(weighing))
        return spectra

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


def may_lose_neurons(config: ReparamConfig) -> bool:
    """Whether MLPs may lose neurons under a config whose choices are resolved.

    Raises:
        ValueError: the config asks for it, and it cannot be.
    """
    reasons = {
        "needs the ranks of `allocation='loss'`, whose units tell neurons from ranks": config.allocation != "loss",
        "needs a method that uses data": not method_of(config.method).needs_data,
        "excludes one adapter of many sizes (`form='factors'` with a `ceiling` below 1)": is_nested(config),
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    if config.neurons and reason is not None:
        raise ValueError(f"`neurons=True` {reason}; leave out the one or the other.")
    return config.neurons is not False and reason is None


def find_mlps(
    model: nn.Module, config: ReparamConfig, targets: Mapping[str, Target], batches: Batches, plan: Plan | None
) -> tuple[list[NeuronGroup], Batches]:
    """The MLPs of a model that may lose neurons, found by running it on its first batch; and the batches, all of them.

    Args:
        model: as calibration runs it; stays as it is.
        config: whose choices are resolved.
        targets: by name.
        batches: of which the first is read; of statistics the model's own example of an input stands in for it.
        plan: which may have chosen the neurons already; None: they are chosen by loss.

    Raises:
        ValueError: the config asks for MLPs that lose neurons, or the plan has such, and they are not found.
    """
    if plan is not None:
        _check_sizes(plan)
    if not (may_lose_neurons(config) if plan is None else plan.neurons):
        return [], batches
    batch, batches = _first(model, batches)
    modules = {name: target.module for name, target in targets.items()}
    found = [] if batch is None else find_groups(model, modules, batch)
    mlps = [mlp for mlp in found if counts(mlp.neurons)]
    if config.neurons and not mlps:
        raise ValueError(
            "`neurons=True`, and no MLP of the model can lose neurons: nowhere do targets make hidden activations, each by its "
            "own row, that another target alone reads. Leave `neurons` out, or target all matrices of an MLP."
        )
    known = {mlp.consumer: mlp for mlp in mlps}
    for planned in () if plan is None else plan.neurons:
        if known.get(planned.consumer) != planned.group:
            raise ValueError(
                f"{planned.consumer}: the plan leaves out neurons that it reads, and in this model it reads none of "
                f"{[producer.name for producer in planned.group.producers]}, or others; make a plan for this model."
            )
    return mlps, batches


def _check_sizes(plan: Plan) -> None:
    """Raise `ValueError` where a plan says that neurons are left out, and not of which MLP, as those in reports."""
    known = {name for planned in plan.neurons for name in planned.group.names}
    unknown = [module.name for module in plan.modules if module.size is not None and module.name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]}: the plan does not say to which MLP its neurons belong; make one with `plan`.")


def _first(model: nn.Module, batches: Batches) -> tuple[Mapping[str, Any] | None, Batches]:
    """A batch to try the model on, or None; and the batches, with the first one."""
    if isinstance(batches, Statistics):
        return getattr(model, "dummy_inputs", None), batches
    iterator = iter(batches)
    if iterator is not batches:  # which can be read again
        return next(iterator, None), batches
    first = next(iterator, None)
    return first, [] if first is None else chain([first], iterator)
