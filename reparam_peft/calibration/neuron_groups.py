"""Which layers make, and which one reads, the neurons of an MLP: found by running the model, in any architecture.

In producer → elementwise → consumer, neuron j is a row of each producer (gate and up, or fc1) and column j of the consumer
(down). Names say nothing of it. So the model is run with all of its linear layers replaced by players, which read nothing and
give what they are told: what the consumer reads then depends on nothing but the few operations between. Random numbers take the
place of more and more of what the producers give, and a group is found where

1. what the consumer reads at a token and column changes only if the rows of this neuron change at this token, and each row
   counts for some token;
2. nothing else in the model changes with the producers' outputs, while the consumer's is held;
3. with the producers' outputs cut to some of the neurons the model runs, and the consumer reads what it read there before.

A pass with players costs what a model does beside its linear layers, so that all groups are found in some twenty passes of a
few tokens that read no weight, and one that does.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..layers.neuron_groups import LAYOUTS, NeuronGroup, Producer, rows_of
from ..layers.wrapper import kind_and_layer, matrix_shape
from ..runtime.batches import split_rows
from ..runtime.modules import (
    evaluating,
    forward_as,
    input_device,
    is_offloaded,
    parameter_owners,
    uncompiled,
    without_cache,
)

MOST_TOKENS = 16  # enough for a ReLU to be open at one of them
MOST_PRODUCERS = 4
QUIET_STEPS, MOST_STEPS = 8, 64
# What a model's own code raises where it cannot work with other numbers, or fewer of them.
MODEL_ERRORS = (TypeError, ValueError, LookupError, RuntimeError, AttributeError, ArithmeticError, AssertionError)


class RefusedBatch(ValueError):
    """A batch that a model does not accept."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module, factorised already or not, computes y = W x + b along the last dimension of its input.

    >>> is_linear(nn.Linear(3, 2)), is_linear(nn.Embedding(3, 2)), is_linear(nn.ReLU())
    (True, False, False)
    """
    try:
        return kind_and_layer(module)[0].linear
    except (TypeError, ValueError):
        return False


@torch.no_grad()
def find_groups(model: nn.Module, targets: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> list[NeuronGroup]:
    """The groups of targets that can give up neurons, in the order in which they run; the model is left as it was.

    What is not certain is left out: layers that a pass runs not exactly once, that share a parameter, that accelerate offloads,
    or that the batch does not reach. Where a layer would be in two groups, as in a chain of layers, the first counts.

    Args:
        model: any model that is called as `model(**batch)`; with layers of any dtype, quantised, or factorised already.
        targets: of the model, by name; others than linear ones are passed over.
        batch: one keyword batch. Its first row, and of token ids the first 16 tokens, are enough where the model takes that.

    Returns:
        The groups; none where the model does not run with other numbers in place of what its layers compute.

    Raises:
        RefusedBatch: the model does not accept the batch.
    """
    with evaluating(model), uncompiled(model):
        players = _Players.of(model, targets, batch)
        hypotheses = list(players.hypotheses(targets))
        base = players.run(players.outputs)  # as the model itself, so that a mixture sends tokens where it does
        if base is None or not base.outputs:
            return []
        if not _observe(players, base, hypotheses):
            hypotheses = _without_fragile(players, base, hypotheses)
            if not _observe(players, base, hypotheses):
                return []
        owners = parameter_owners(model)
        offered = [hypothesis.group() for hypothesis in hypotheses if hypothesis.holds]
        offered = [group for group in offered if all(_stands_alone(targets[name], owners) for name in set(group.names))]
        for holds in (_nothing_else_reads, _runs_smaller):
            if not holds(players, base, offered):
                offered = [group for group in offered if holds(players, base, [group])]
        return _disjoint(offered)


def _disjoint(offered: list[NeuronGroup]) -> list[NeuronGroup]:
    """Those that share no layer with one before."""
    used: set[str] = set()
    disjoint = []
    for group in offered:
        if not used & set(group.names):
            disjoint.append(group)
            used |= set(group.names)
    return disjoint


def _stands_alone(module: nn.Module, owners: Mapping[int, list[str]]) -> bool:
    """Whether a module's parameters are its own, and stay where they are."""
    return not is_offloaded(module) and all(len(owners[id(parameter)]) == 1 for parameter in module.parameters())


@dataclass
class _Hypothesis:
    """That the rows of some producers, and nothing else, make the columns that a consumer reads.

    Attributes:
        producers: names, the last that runs first.
        possible: whether nothing was seen that speaks against it.
        seen: bool (rows of a neuron, neurons), for which rows it was seen that they count.
    """

    producers: tuple[str, ...]
    layout: str
    consumer: str
    neurons: int
    possible: bool = True
    seen: Tensor | None = None

    @property
    def holds(self) -> bool:
        return self.possible and self.seen is not None and bool(self.seen.all())

    @property
    def count(self) -> int:
        """How many rows were seen to count; 0 where it cannot be any more."""
        return int(self.seen.sum()) if self.possible and self.seen is not None else 0

    def group(self) -> NeuronGroup:
        return NeuronGroup(tuple(Producer(name, self.layout) for name in reversed(self.producers)), self.consumer, self.neurons)

    def observe(self, before: _Pass, after: _Pass, changed: Mapping[str, Tensor]) -> None:
        """Learn from two passes, between which some of what the producers give was changed."""
        (old, *more), (new, *others) = before.inputs.get(self.consumer, [None]), after.inputs.get(self.consumer, [None])
        if old is None or new is None or more or others or old.shape != new.shape:
            return  # a mixture has sent other tokens here
        differs = (new != old).reshape(-1, self.neurons)
        parts = [part.to(differs.device) for name in self.producers for part in self._parts(changed[name])]
        if any(part.shape != differs.shape for part in parts):
            self.possible = False
            return
        rows = torch.stack(parts)
        count = rows.sum(0)
        self.possible &= not (differs & (count == 0)).any()
        seen = (differs & rows & (count == 1)).any(1)
        self.seen = seen if self.seen is None else self.seen | seen

    def _parts(self, cells: Tensor) -> tuple[Tensor, ...]:
        """Cells (tokens, rows) of a producer as cells (tokens, neurons), for each row that a neuron has."""
        if self.layout == "rows":
            return (cells,)
        if self.layout == "split":
            return cells.unflatten(1, (2, -1)).unbind(1)
        return cells.unflatten(1, (-1, 2)).unbind(2)


@dataclass
class _Pass:
    """What happened in a pass: what players gave, what they read in each call, and the tensors that the model returned."""

    given: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)


class _Players:
    """A model whose linear layers give what they are told.

    Args:
        model: in eval mode.
        layers: all of its linear layers, by name.
        batch: one that the model accepts.
        outputs: of the layers in a pass of the model itself, with their names, in the order of the calls.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], batch: Mapping[str, Any], outputs: list[tuple[str, Tensor]]
    ) -> None:
        self.model, self.layers, self.batch = model, layers, batch
        self.shapes = {name: matrix_shape(layer) for name, layer in layers.items()}
        self.order = list(dict.fromkeys(name for name, _ in outputs))
        self.calls = Counter(name for name, _ in outputs)
        self.outputs = dict(outputs)
        self.generator = torch.Generator().manual_seed(0)

    @classmethod
    def of(cls, model: nn.Module, targets: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> _Players:
        """With as little of a batch as the model takes."""
        names = {id(module): name for name, module in targets.items()}
        linear = {name: module for name, module in model.named_modules() if is_linear(module)}
        layers = {names.get(id(module), name): module for name, module in linear.items()}
        small, row = _few_tokens(batch), split_rows(batch, 1)[0]
        for attempt in (small, row, batch):
            part = send_to_device(without_cache(model, attempt), input_device(model))
            outputs: list[tuple[str, Tensor]] = []
            with _listening(layers, outputs):
                try:
                    model(**part)
                except torch.OutOfMemoryError:
                    raise
                except MODEL_ERRORS as error:
                    if attempt is batch:
                        raise RefusedBatch(f"the model does not accept the batch ({sorted(batch)}): {error}") from error
                else:
                    break
        return cls(model, layers, part, outputs)

    def hypotheses(self, targets: Mapping[str, nn.Module]) -> Iterator[_Hypothesis]:
        """For each target that reads what others before it may have made, from the last one of these to the last few."""
        once = [name for name in self.order if name in targets and self.calls[name] == 1]
        for position, consumer in enumerate(once):
            neurons = self.shapes[consumer][1]
            for layout in LAYOUTS:
                rows = neurons if layout == "rows" else 2 * neurons
                fitting = [name for name in reversed(once[:position]) if self.shapes[name][0] == rows]
                for count in range(1, min(len(fitting), MOST_PRODUCERS) + 1):
                    if neurons > 1:
                        yield _Hypothesis(tuple(fitting[:count]), layout, consumer, neurons)

    def run(self, values: Mapping[str, Tensor]) -> _Pass | None:
        """A pass in which players give these values, or numbers of their own where there are none; None where it fails."""
        record = _Pass()
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(forward_as(layer, partial(self._play, name, values, record)))
            try:
                output = self.model(**self.batch)
            except torch.OutOfMemoryError:
                raise
            except MODEL_ERRORS:
                return None
        record.outputs = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        return record

    def _play(self, name: str, values: Mapping[str, Tensor], record: _Pass, *args: Any, **kwargs: Any) -> Tensor:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        record.inputs.setdefault(name, []).append(x.clone())  # a model may change in place what it reads, and what it gets
        value = values.get(name)
        if value is None or value.shape[:-1] != x.shape[:-1]:
            shape = (*x.shape[:-1], self.shapes[name][0])
            value = self.random(name, shape, torch.Generator().manual_seed(zlib.crc32(name.encode())))
        record.given[name] = value
        return value.clone()

    def random(self, name: str, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Normal numbers of the dtype and on the device of what a layer gives."""
        drawn = torch.randn(shape, generator=generator or self.generator, device="cpu")
        return drawn.to(self.outputs[name]) if name in self.outputs else drawn

    def changed(self, record: _Pass, name: str) -> tuple[Tensor, Tensor]:
        """What a layer gave in a pass, with about half of the numbers changed, and which ones, bool (tokens, rows)."""
        old = record.given[name]
        cells = (torch.rand(old.shape, generator=self.generator, device="cpu") < 0.5).to(old.device)
        return torch.where(cells, self.random(name, tuple(old.shape)), old), cells.reshape(-1, old.shape[-1])


@contextmanager
def _listening(layers: Mapping[str, nn.Module], outputs: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Within this block each call of a layer appends its name and its output."""

    def hear(name: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs.append((name, output.detach().clone()))

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(hear, name)).remove)
        yield


def _few_tokens(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first row, and of token ids the first tokens that are no padding; the first rows where rows are of numbers."""
    row = dict(split_rows(batch, 1)[0])
    sequences = {key: value for key, value in row.items() if isinstance(value, Tensor) and value.ndim > 1}
    if any(value.ndim > 2 for value in sequences.values()):
        return row
    if any(value.is_floating_point() for value in sequences.values()):
        return dict(split_rows(batch, MOST_TOKENS)[0])
    mask = row.get("attention_mask")
    for key, value in sequences.items():
        if isinstance(mask, Tensor) and value.shape == mask.shape:
            row[key] = value[:, mask[0].nonzero()[:MOST_TOKENS, 0]]
        else:
            row[key] = value[:, :MOST_TOKENS]
    return row


def _observe(players: _Players, base: _Pass, hypotheses: list[_Hypothesis]) -> bool:
    """Run passes that each change a random half of what possible producers give, until some in a row have brought nothing new.

    Returns:
        Whether no pass has failed.
    """
    last = base
    steps = quiet = seen_before = 0
    while quiet < QUIET_STEPS and steps < MOST_STEPS:
        possible = [hypothesis for hypothesis in hypotheses if hypothesis.possible]
        names = dict.fromkeys(name for hypothesis in possible for name in hypothesis.producers if name in last.given)
        changes = {name: players.changed(last, name) for name in names}
        after = players.run({**last.given, **{name: value for name, (value, _) in changes.items()}})
        if after is None:
            return False
        cells = {name: which for name, (_, which) in changes.items()}
        for hypothesis in possible:
            if cells.keys() >= {*hypothesis.producers}:
                hypothesis.observe(last, after, cells)
        settled = {hypothesis.consumer for hypothesis in hypotheses if hypothesis.holds}
        seen = sum(hypothesis.count for hypothesis in hypotheses if hypothesis.consumer not in settled)
        quiet = quiet + 1 if seen == seen_before else 0
        last, seen_before, steps = after, seen, steps + 1
    return True


def _without_fragile(players: _Players, base: _Pass, hypotheses: list[_Hypothesis]) -> list[_Hypothesis]:
    """Those whose producers can each give other numbers without an error of the model."""
    fragile = set()
    for name in dict.fromkeys(name for hypothesis in hypotheses for name in hypothesis.producers if name in base.given):
        changed = players.random(name, tuple(base.given[name].shape))
        if players.run({**base.given, name: changed}) is None:
            fragile.add(name)
    return [hypothesis for hypothesis in hypotheses if not fragile & {*hypothesis.producers}]


def _nothing_else_reads(players: _Players, before: _Pass, offered: list[NeuronGroup]) -> bool:
    """Whether only the consumers read other numbers where the producers give others, and the model returns the same."""
    names = [producer.name for group in offered for producer in group.producers]
    changed = {name: players.random(name, tuple(before.given[name].shape)) for name in names}
    after = players.run({**before.given, **changed})
    return after is not None and _same(before, after, {group.consumer for group in offered})


def _runs_smaller(players: _Players, before: _Pass, offered: list[NeuronGroup]) -> bool:
    """Whether the consumers read the same, and the model returns the same, where the producers make some neurons only."""
    values, kept = dict(before.given), {}
    for group in offered:
        size = max(1, group.neurons // 2 - 1 + group.neurons // 2 % 2)  # odd, so that no number of heads divides it
        chosen = torch.randperm(group.neurons, generator=players.generator, device="cpu")[:size].sort().values
        kept[group.consumer] = chosen
        for name, layout in group.producers:
            value = before.given[name]
            values[name] = value.index_select(-1, rows_of(layout, chosen, group.neurons).to(value.device))
    after = players.run(values)
    if after is None or not _same(before, after, {*kept}):
        return False
    return all(_close(after.inputs[name], before.inputs[name], chosen) for name, chosen in kept.items())


def _close(calls: list[Tensor], before: list[Tensor], kept: Tensor) -> bool:
    """Whether what a layer reads, in its one call, is to rounding what it read before, at the neurons that are kept."""
    (new,), (old,) = calls, before
    old = old.index_select(-1, kept.to(old.device))
    tolerance = 16 * torch.finfo(old.dtype).eps
    return new.shape == old.shape and torch.allclose(new, old, rtol=tolerance, atol=tolerance)


def _same(before: _Pass, after: _Pass, consumers: set[str]) -> bool:
    """Whether two passes agree to the bit, in what layers beside the consumers read and in what the model returns."""
    calls = [{name: len(tensors) for name, tensors in record.inputs.items()} for record in (before, after)]
    if calls[0] != calls[1] or len(before.outputs) != len(after.outputs):
        return False
    pairs = [*zip(before.outputs, after.outputs, strict=True)]
    for name in before.inputs.keys() - consumers:
        pairs += zip(before.inputs[name], after.inputs[name], strict=True)
    return all(_equal(old, new) for old, new in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
