"""Statistics of the inputs and of the output gradients of modules, gathered in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layers.kinds import kind_and_layer, matrix_shape, stored_weight
from ..numerics.grams import mirror
from ..numerics.metrics import device_of_sums
from ..runtime.batches import rows_in
from ..runtime.modules import evaluating, frozen, input_device
from ..runtime.processes import check_whole, fails_together, processes
from .recorder import Recorder
from .statistics import Statistics, weight_norm


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
) -> Statistics:
    """Run the model over the batches and gather the statistics of some of its modules.

    Padding, by the attention mask, is left out. Gradients are those of the log-likelihood of labels sampled from the model
    itself: their second moments are the Fisher information. A model without logits is taken as the mean of a normal
    distribution of its last hidden state. Products are float32, sums float64. The model is run in eval mode; mode, gradients
    and hooks are put back as they were.

    Memory: 8 · (2 Σ in² over distinct inputs + Σ out² over modules) bytes, and one batch with its graph.

    In a distributed run every process gives the same batches; process i takes every i-th, and all get the sums. An input that
    the model changes in place before the backward pass has no gradient-weighted Gram.

    Args:
        model: any model that is called as `model(**batch)`.
        modules: of the model, by name, of the known kinds.
        batches: keyword batches; read once.
        gradients: whether to gather second moments of the output gradients too, by a backward pass.
        seed: of the sampled labels, which depend on it and the position in the data only, not on the split into batches.
        progress: whether to show a progress bar.
        starts: modules from whose outputs on gradients flow, beside `modules`: with the same, passes over parts of the
            modules give what one pass over all gives.
        first_row: number of the first row (sequence) of the batches in the whole of the data, where these are a part of it:
            then the statistics of the parts add up to those of the whole.

    Returns:
        The `Statistics`.

    Raises:
        ValueError: there are no batches, the model does not accept one, or a module's inputs or gradients are NaN or infinite;
            or each process of a distributed run has batches of its own.
        RuntimeError: in inference mode, where there are no gradients.
    """
    if gradients and torch.is_inference_mode_enabled():
        raise RuntimeError("calibration needs gradients, which `torch.inference_mode` rules out; leave it, or use `no_grad`.")
    statistics = Statistics(seed=seed, weight_norms={name: weight_norm(module) for name, module in modules.items()})
    world, own = processes()
    check_whole(batches)
    device = input_device(model)
    count = 0
    with fails_together(device), evaluating(model), frozen(model), ExitStack() as stack:
        recorder = Recorder(statistics, modules, gradients)
        stack.enter_context(recorder.hooks(model, set(starts) - set(modules.values())))
        bar = tqdm(batches, desc="Calibrating", unit="batch", delay=1, disable=None if progress and own == 0 else True)
        for index, batch in enumerate(bar):
            count += 1
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"`batches` must hold mappings of keyword arguments, got a {type(batch).__name__} as batch {index}."
                )
            if index % world == own:
                recorder.run(model, send_to_device(dict(batch), device), index, first_row, seed)
            first_row += rows_in(batch)
        if count == 0:
            raise ValueError("`batches` must hold at least one batch, got none; a generator can be read only once.")
    if gradients:
        statistics.predictions = dict.fromkeys(modules, recorder.predictions)
    if world > 1:
        _reduce(statistics, modules, gradients)
    for name in modules.keys() - statistics.output_grams.keys() if gradients else ():  # no gradient came back
        module = modules[name]
        size = matrix_shape(module)[0]
        statistics.output_grams[name], statistics.energies[name] = _zeros(module, size, size), _zeros(module, 2)
        statistics.gradient_rows[name] = 0
    for gram in (*statistics.grams.values(), *statistics.weighted_grams.values(), *statistics.output_grams.values()):
        if gram.ndim == 2:
            mirror(gram)
    return statistics


def _zeros(module: nn.Module, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device_of_sums(stored_weight(module).device))


def _reduce(statistics: Statistics, modules: Mapping[str, nn.Module], gradients: bool) -> None:
    """Add up the statistics of all processes, in each of them."""
    names = list(modules)
    device = stored_weight(next(iter(modules.values()))).device

    def total(value: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        dist.all_reduce(value, op)
        return value

    def sum_up(totals: dict[str, Tensor], name: str, *shape: int) -> None:
        totals[name] = total(totals[name].contiguous() if name in totals else _zeros(modules[name], *shape))

    def count(counts: dict[str, float], name: str, dtype: torch.dtype = torch.int64) -> None:
        counts[name] = total(torch.tensor(counts.get(name, 0), dtype=dtype, device=device)).item()

    leaders = torch.tensor([names.index(statistics.inputs[n]) if n in statistics.inputs else -1 for n in names], device=device)
    lowest = total(torch.where(leaders < 0, len(names), leaders), dist.ReduceOp.MIN)
    highest = total(leaders.clone(), dist.ReduceOp.MAX)
    for name, low, high in zip(names, lowest.tolist(), highest.tolist(), strict=True):
        if high < 0:
            continue
        if low != high:
            raise ValueError(
                f"{name}: it shares its input with different modules in different batches; give batches of one kind."
            )
        statistics.inputs[name] = names[high]
    for name in dict.fromkeys(statistics.inputs[n] for n in names if n in statistics.inputs):
        module = modules[name]
        size, one_hot = matrix_shape(module)[1], kind_and_layer(module)[0].one_hot
        sum_up(statistics.grams, name, *((size,) if one_hot else (size, size)))
        sum_up(statistics.sums, name, size)
        count(statistics.rows, name)
        if not gradients or one_hot:
            continue
        count(statistics.weights, name, torch.float64)
        sum_up(statistics.weighted_grams, name, size, size)
        sum_up(statistics.weighted_sums, name, size)
        if not statistics.weights[name] > 0:
            del statistics.weights[name], statistics.weighted_grams[name], statistics.weighted_sums[name]
    for name, module in modules.items() if gradients else ():
        size = matrix_shape(module)[0]
        sum_up(statistics.output_grams, name, size, size)
        sum_up(statistics.energies, name, 2)
        count(statistics.gradient_rows, name)
        count(statistics.predictions, name)
