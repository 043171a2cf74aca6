"""Statistics of the inputs and of the output gradients of modules, gathered in one pass over the data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import check_seed
from ..layers.kinds import stored_weight
from ..layers.wrapper import features, kind_and_layer
from ..numerics.metrics import device_of_sums
from ..runtime.batches import Batch, parts_of_tokens, rows_in
from ..runtime.devices import fast_products
from ..runtime.memory import return_freed
from ..runtime.modules import evaluating, frozen, input_device, leaving_no_graph, uncompiled
from ..runtime.processes import check_whole, fails_together, processes
from .given import Objective
from .graphs import tokens_at_a_time, tokens_within
from .recorder import Recorder
from .self_written import written
from .statistics import Statistics, weight_norm
from .sums import InputSums, OutputSums, Sums, WeightedSums

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What goes through the model at a time.

    Attributes:
        batch: keywords.
        index: number of the batch that it is a part of.
        first_row: number of its first row (sequence) in the whole of the data.
    """

    batch: Batch
    index: int
    first_row: int


def parts_of(batches: Iterable[Any], tokens: int, first_row: int = 0) -> Iterator[Part]:
    """Batches of token ids in parts of at most so many tokens, or of one row; others whole.

    Raises:
        ValueError: there are no batches, or one is no mapping.
    """
    index = -1
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"`batches` must hold mappings of keyword arguments, got a {type(batch).__name__} as batch {index}."
            )
        for part in parts_of_tokens(batch, tokens):
            yield Part(part, index, first_row)
            first_row += rows_in(part)
    if index < 0:
        raise ValueError("`batches` must hold at least one batch, got none; a generator can be read only once.")


def gather_statistics(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    *,
    gradients: bool = True,
    seed: int = 0,
    progress: bool = True,
    starts: Iterable[nn.Module] = (),
    first_row: int = 0,
    heads: Mapping[str, Sequence[nn.Module]] | None = None,
    objective: Objective | None = None,
    room: int | None = None,
) -> Statistics:
    """Run the model over the batches and gather the statistics of some of its modules.

    Padding, by the attention mask, is left out. Gradients are those of the log-likelihood of labels sampled from the model
    itself: their second moments are the Fisher information. A model without logits is taken as the mean of a normal
    distribution of its last hidden state. Products are float32, sums float64. The model is run in eval mode; mode, gradients
    and hooks are put back as they were.

    Memory: 4 · (2 Σ in² over distinct inputs + Σ out² over modules) bytes, of which very wide outputs take 8 · out
    (`sums.output_shape`), and the graph of a part of a batch: batches of
    token ids are run in parts of 512 tokens on a CPU, 4096 elsewhere, or one sequence; the statistics are the same.

    In a distributed run every process gives the same batches; process i takes every i-th, and all get the sums. An input that
    the model changes in place before the backward pass has no gradient-weighted Gram.

    Args:
        model: any model that is called as `model(**batch)`.
        modules: of the model, by name, of the known kinds.
        batches: keyword batches; read once.
        gradients: whether to gather second moments of the output gradients too, by a backward pass.
        seed: of the sampled labels, which depend on it and the position in the data only, not on the split into batches.
        progress: whether to show a progress bar.
        starts: modules from whose outputs on gradients flow, beside `modules`. Passes over parts of some modules, each with
            all of them as `starts`, give what one pass over all gives.
        first_row: number of the first row (sequence) of the batches in the whole of the data, where these are a part of it:
            then the statistics of the parts add up to those of the whole.
        heads: by the name of an embedding among `modules`, linear layers whose weight is its table, to count as uses of it.
        objective: (model, batch) → a scalar, the loss of the given labels summed over the batch, whose gradients are taken as
            they are (the empirical Fisher information); or logits (…, classes), of which labels are sampled. None: what the
            model returns for the batch says which.
        room: bytes that the graph of a part may take, which then is of fewer rows, but of one at least; None: any. Known of
            batches in a list.

    Returns:
        The `Statistics`; of modules that no batch reaches, the norms and, with gradients, zeros only.

    Raises:
        ValueError: there are no batches, the model does not accept one, or a module's inputs or gradients are NaN or infinite;
            or each process of a distributed run has batches of its own.
        RuntimeError: in inference mode, where there are no gradients.
    """
    check_seed("seed", seed)
    if gradients and torch.is_inference_mode_enabled():
        raise RuntimeError("calibration needs gradients, which `torch.inference_mode` rules out; leave it, or use `no_grad`.")
    with fails_together():
        statistics = Statistics(seed=seed, weight_norms={name: weight_norm(module) for name, module in modules.items()})
    world, rank = processes()
    check_whole(batches)
    batches = written(batches)
    return_freed()
    device = input_device(model)
    with fails_together(), calibrating(model), ExitStack() as stack:
        recorder = Recorder(statistics, modules, gradients, heads, objective)
        stack.enter_context(fast_products())
        tokens = tokens_at_a_time(device)
        if room is not None and gradients:
            tokens = tokens_within(room, model, batches, {*starts, *modules.values()})
        stack.enter_context(recorder.hooks(model, set(starts) - set(modules.values())))
        bar = tqdm(batches, desc="Calibrating", unit="batch", delay=1, disable=None if progress and rank == 0 else True)
        for part in parts_of(bar, tokens, first_row):
            if part.index % world == rank:
                recorder.run(model, send_to_device(dict(part.batch), device), part.index, part.first_row, seed)
    logger.info("calibrated %d modules", len(modules))
    finish(statistics, modules, recorder.gradient_tokens if gradients else None)
    return statistics


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """The model as it is calibrated: in eval mode, frozen, not compiled."""
    with evaluating(model), frozen(model), uncompiled(model), leaving_no_graph(model):
        yield


def finish(statistics: Statistics, modules: Mapping[str, nn.Module], gradient_tokens: int | None) -> None:
    """Complete the statistics that a process has gathered, in place; in a distributed run they become those of all processes.

    Args:
        statistics: of these modules, as far as batches have reached them.
        modules: by name.
        gradient_tokens: labels that this process has sampled; None: statistics are without gradients.
    """
    with fails_together():
        for name, module in modules.items() if gradient_tokens is not None else ():
            if name not in statistics.outputs:  # no gradient came back
                statistics.outputs[name] = OutputSums.zeros(*features(module), _device_of_sums(module))
            statistics.outputs[name].gradient_tokens = gradient_tokens or 0
    if processes()[0] > 1:
        _reduce(statistics, modules, gradient_tokens is not None)


def _device_of_sums(module: nn.Module) -> torch.device:
    return device_of_sums(stored_weight(module).device)


def _reduce(statistics: Statistics, modules: Mapping[str, nn.Module], gradients: bool) -> None:
    """Add up the statistics of all processes, in each of them; in place.

    A process whose share of the batches did not reach a module has no record of it, and `all_reduce` needs one in every
    process, of the same shapes and in the same order: so it takes part with zeros.
    """
    device = stored_weight(next(iter(modules.values()))).device
    statistics.reads = _agreed_reads(statistics.reads, list(modules), device)
    with fails_together():
        for name in dict.fromkeys(statistics.reads.values()):
            statistics.inputs[name] = _whole_record(statistics.inputs.get(name), modules[name], gradients)
    for name in dict.fromkeys(statistics.reads.values()):
        record = statistics.inputs[name]
        _all_reduce(record, device)
        if record.weighted is not None and not record.weighted.weight > 0:
            record.weighted = None
    for name in modules if gradients else ():
        _all_reduce(statistics.outputs[name], device)


def _whole_record(record: InputSums | None, module: nn.Module, gradients: bool) -> InputSums:
    """The record of an input with zeros for what this process has not seen, in place."""
    size, one_hot, where = features(module)[1], kind_and_layer(module)[0].one_hot, _device_of_sums(module)
    record = record or InputSums.zeros(size, where, one_hot)
    if gradients and not one_hot and record.weighted is None:
        record.weighted = WeightedSums.zeros(size, where)
    return record


def _agreed_reads(reads: Mapping[str, str], names: list[str], device: torch.device) -> dict[str, str]:
    """Which module reads the same input as which, of all processes together; in the order of `names`."""
    leaders = torch.tensor([names.index(reads[name]) if name in reads else -1 for name in names], device=device)
    lowest, highest = torch.where(leaders < 0, len(names), leaders), leaders.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    agreed = {}
    for name, low, high in zip(names, lowest.tolist(), highest.tolist(), strict=True):
        if high < 0:
            continue
        if low != high:
            raise ValueError(
                f"{name}: it shares its input with different modules in different batches; give batches of one kind."
            )
        agreed[name] = names[high]
    return agreed


def _all_reduce(record: Sums, device: torch.device) -> None:
    """Add up a record's fields over all processes, in place; numbers travel on `device`."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Sums):
            _all_reduce(value, device)
        elif isinstance(value, Tensor):
            total = value.contiguous()
            dist.all_reduce(total)
            setattr(record, field.name, total)
        elif value is not None:
            total = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64, device=device)
            dist.all_reduce(total)
            setattr(record, field.name, total.item())
