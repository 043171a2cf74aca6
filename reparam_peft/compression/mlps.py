"""The MLPs of a model that may lose neurons: found, and held against a plan."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from ..arguments import ReparamWarning
from ..calibration.neuron_groups import RefusedBatch, find_groups
from ..calibration.self_written import SelfWritten
from ..calibration.statistics import Batches, Statistics
from ..config.reparam_config import ReparamConfig
from ..layers.experts import neurons_of_experts
from ..layers.neuron_groups import NeuronGroup
from ..numerics.methods import method_of
from ..planning.neurons import counts
from ..planning.plan import Plan
from ..planning.ranks import is_nested
from ..runtime.blocks import block_of
from ..runtime.processes import alike_in_every_process
from ..tuner.targets import Target
from .pooling import is_opened


def may_lose_neurons(config: ReparamConfig) -> bool:
    """Whether MLPs may lose neurons under a config whose choices are resolved.

    Raises:
        ValueError: the config asks for it, and it cannot be.
    """
    reasons = {
        "needs the ranks of `allocation='loss'`, whose units tell neurons from ranks": config.allocation != "loss",
        "is not measured with `budget='latency'`": config.budget == "latency",
        "needs a method that uses data": not method_of(config.method).needs_data,
        "excludes one adapter of many sizes (`form='factors'` with a `ceiling` below 1)": is_nested(config),
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    if config.neurons and reason is not None:
        raise ValueError(f"`neurons=True` {reason}; leave out the one or the other.")
    return config.neurons is not False and reason is None


def find_mlps(
    model: nn.Module,
    config: ReparamConfig,
    targets: Mapping[str, Target],
    batches: Batches,
    plan: Plan | None,
    blocks: Sequence[str] = (),
    example: Mapping[str, Any] | None = None,
) -> tuple[list[NeuronGroup], Batches]:
    """The MLPs of a model that may lose neurons, found by running it on its first batch; and the batches, all of them.

    Args:
        model: as calibration runs it; stays as it is.
        config: whose choices are resolved.
        targets: by name.
        batches: of which the first is read.
        plan: which may have chosen the neurons already; None: they are chosen by loss.
        blocks: names of blocks that are factorised one after the other; an MLP that lies across two keeps its neurons.
        example: a batch where `batches` are statistics. Where there is none, or the text is yet to be written, the example that
            models of transformers have stands in for it (`dummy_inputs`).

    Raises:
        ValueError: the config asks for MLPs that lose neurons, or the plan has such, and they are not found.
    """
    if plan is not None:
        plan.check_neurons(config.neurons)
    if not (may_lose_neurons(config) if plan is None else plan.neurons):
        return [], batches
    needed = bool(config.neurons) or plan is not None
    first, batches = _first(model, batches, example)
    if first is None and isinstance(batches, (Statistics, SelfWritten)):
        _tell_that_nothing_can_be_tried(model, needed)
    modules = {name: target.module for name, target in targets.items() if not is_opened(name, config)}
    of_experts = [group for group in neurons_of_experts(model) if targets.keys() >= {*group.names}]
    try:
        candidates = find_groups(model, modules, first) if isinstance(first, Mapping) and modules else []
    except RefusedBatch:  # which calibration tells, with the batch's number
        if isinstance(batches, (Statistics, SelfWritten)):
            _tell_that_nothing_can_be_tried(model, needed)
        return [], batches
    candidates += of_experts
    mlps = [mlp for mlp in candidates if counts(mlp.neurons) and len({block_of(name, blocks) for name in mlp.names}) == 1]
    if config.neurons and not mlps:
        raise ValueError(
            "`neurons=True`, and no MLP of the model can lose neurons: nowhere do targets make hidden activations, each by its "
            "own row, that another target alone reads. Leave `neurons` out, or target all matrices of an MLP."
        )
    by_consumer = {mlp.consumer: mlp for mlp in mlps}
    for planned in () if plan is None else plan.neurons:
        if by_consumer.get(planned.consumer) != planned.group:
            raise ValueError(
                f"{planned.consumer}: the plan leaves out neurons that it reads, and in this model it reads none of "
                f"{[producer.name for producer in planned.group.producers]}, or others; make a plan for this model."
            )
    return mlps, batches


def check_alike(mlps: Sequence[NeuronGroup]) -> None:
    """Raise `RuntimeError` in all processes of a distributed run where they have found different MLPs."""
    if not alike_in_every_process(list(mlps)):
        raise RuntimeError(
            "the processes found different MLPs, since their devices may compute differently; set `neurons=False`."
        )


def _tell_that_nothing_can_be_tried(model: nn.Module, needed: bool) -> None:
    """Warn, or where neurons are asked for raise `ValueError`, that no MLP can be found."""
    message = (
        f"a {type(model).__name__} is to be run to find its MLPs, and there is no example of its input: "
        "give batches in place of statistics"
    )
    if needed:
        raise ValueError(f"{message}.")
    warnings.warn(f"No MLP loses neurons, since {message}, or set `neurons=False`.", ReparamWarning, stacklevel=2)


def _first(model: nn.Module, batches: Batches, example: Mapping[str, Any] | None) -> tuple[Mapping[str, Any] | None, Batches]:
    """A batch to try the model on, or None; and the batches, with the first one."""
    if isinstance(batches, (Statistics, SelfWritten)):  # of which the latter is not written before all is checked
        return getattr(model, "dummy_inputs", None) if example is None else example, batches
    if isinstance(batches, Sequence):
        return (batches[0] if batches else None), batches
    iterator = iter(batches)
    first = next(iterator, None)
    return first, [] if first is None else chain([first], iterator)
