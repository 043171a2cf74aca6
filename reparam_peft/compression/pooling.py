"""Statistics of experts, each of which few tokens reach: moved toward those of all experts of their layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..calibration.statistics import Moments, Statistics, centre_in_place
from ..config.reparam_config import ReparamConfig
from ..layers.parameters import Reading
from ..numerics.storage import Storage


@dataclass(frozen=True)
class Pooled:
    """The statistics of one expert, in which those of all experts of its layer count as so many rows as a row has numbers.

    So an expert with many rows has its own, one with few rows is moved toward the others rather than toward the identity, and
    one without any has theirs. Losses stay those of the rows that an expert has; without rows, of one.

    Attributes:
        own: statistics that may hold the expert.
        shared: statistics that hold the sums over all experts, under one name.
    """

    own: Statistics
    shared: Statistics

    def mean(self, name: str) -> Tensor:
        """E[x], shape (in,)."""
        return self.moments(name, centred=False).mean

    def moments(self, name: str, centred: bool) -> Moments:
        """Moments of the expert's input, with its covariance if `centred`, else with E[x xᵀ]."""
        shared = self.shared.moments(SHARED, centred=False)
        gram, mean, rows, weight = shared.gram, shared.mean, 0, len(shared.mean)
        if self.own.is_reached(name):
            own = self.own.moments(name, centred=False)
            rows = own.rows
            gram, mean = (_moved(one, rows, other, weight) for one, other in ((own.gram, gram), (own.mean, mean)))
        if centred:
            gram = centre_in_place(gram, mean)
        return Moments(gram, mean, rows + min(weight, shared.rows))

    def weighted_gram(self, name: str, centre: Tensor | None = None) -> Tensor | None:
        """The Gram of the expert's input, weighed by the gradients there, around a centre; None where there are none."""
        shared = self.shared.weighted_gram(SHARED, centre)
        own = self.own.weighted_gram(name, centre) if self.own.is_reached(name) else None
        if own is None or shared is None:
            return own if shared is None else shared
        return _moved(own, self.own.input_rows(name), shared, len(shared))

    def fisher(self, name: str) -> Tensor:
        """F at the expert's output, shape (out, out) or (out,), as in `Statistics`."""
        shared = self.shared.fisher(SHARED)
        rows = self.own.output_rows(name) if name in self.own.outputs else 0
        return _moved(self.own.fisher(name), rows, shared, len(shared)) if rows else shared

    def output_rows(self, name: str) -> int:
        """Number of gradients that the Fisher matrix is of, those of other experts among them."""
        rows = self.own.output_rows(name) if name in self.own.outputs else 0
        return rows + min(self.shared.outputs[SHARED].size, self.shared.output_rows(SHARED))

    def loss_scale(self, name: str) -> float:
        """What ½ tr(F Δ G Δᵀ) is multiplied by, as in `Statistics`; of an expert without rows, as if it had one."""
        own = self.own.loss_scale(name) if name in self.own.outputs else 0.0
        return own or self.shared.loss_scale(SHARED) / max(self.shared.output_rows(SHARED), 1)


SHARED = "experts"  # under which `Pooled` has the sums of all


class Pool:
    """The experts among targets. Of those that have lost neurons, only experts with equally many of them share statistics.

    Args:
        storages: of all targets, by name.
        config: whose parameters are resolved.
    """

    def __init__(self, storages: Mapping[str, Storage], config: ReparamConfig) -> None:
        by_layer: defaultdict[object, list[str]] = defaultdict(list)
        for name, storage in storages.items():
            if is_expert(name, config):
                by_layer[name.rpartition(".")[0], storage.out_features, storage.in_features].append(name)
        self._experts = {name: names for names in by_layer.values() for name in names}
        self._shared: tuple[Statistics, list[str], Statistics] | None = None  # of those experts that were asked for last

    def shares(self, name: str) -> bool:
        """Whether others' statistics are weighed with those of a target."""
        return name in self._experts

    def pooled(self, name: str, statistics: Statistics) -> Statistics | Pooled:
        """The statistics to weigh a target's errors by: those of an expert, pooled with the others of its layer."""
        experts = self._experts.get(name)
        if experts is None:
            return statistics
        if self._shared is None or self._shared[0] is not statistics or self._shared[1] is not experts:
            self._shared = (statistics, experts, _together(statistics, experts))
        return Pooled(statistics, self._shared[2])

    def unreached(self, names: Iterable[str], statistics: Statistics) -> list[str]:
        """Those experts among names that have no rows, in layers of which others have."""
        without = statistics.unreached(names)
        return [name for name in without if any(statistics.is_reached(other) for other in self._experts.get(name, []))]


def is_opened(name: str, config: ReparamConfig) -> bool:
    """Whether a target is a layer of an opened parameter."""
    return name.rpartition(".")[0] in (config.target_parameters or ())


def is_expert(name: str, config: ReparamConfig) -> bool:
    """Whether a target is one of the layers of an opened parameter that may have several, such as fused experts."""
    parameters = config.target_parameters
    pattern = parameters.get(name.rpartition(".")[0]) if isinstance(parameters, dict) else ""
    return is_opened(name, config) and not (pattern and Reading.parse(pattern).batch == 0)


def _together(statistics: Statistics, experts: list[str]) -> Statistics:
    """The sums over experts, under the name `SHARED`."""
    inputs = [statistics.inputs[statistics.reads[name]] for name in experts if statistics.is_reached(name)]
    outputs = [statistics.outputs[name] for name in experts if name in statistics.outputs]
    shared = Statistics(reads={SHARED: SHARED})
    for one in inputs:
        shared.inputs[SHARED] = shared.inputs[SHARED] + one if SHARED in shared.inputs else one
    for output in outputs:
        shared.outputs[SHARED] = shared.outputs[SHARED] + output if SHARED in shared.outputs else output
    if outputs:  # the experts' rows are of the same tokens
        tokens = max(output.gradient_tokens for output in outputs)
        shared.outputs[SHARED] = replace(shared.outputs[SHARED], gradient_tokens=tokens)
    return shared


def _moved(own: Tensor, rows: int, shared: Tensor, weight: int) -> Tensor:
    """Means of so many rows, moved toward others, which count as `weight` rows."""
    return (rows * own + weight * shared.to(own.device)) / (rows + weight)
