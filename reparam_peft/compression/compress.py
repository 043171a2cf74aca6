"""`compress`, `plan` and `calibrate`: from a model, a config and data to a compressed model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft import get_peft_model
from torch import nn

from ..blockwise.anchoring import Anchoring
from ..blockwise.gathering import BlockwiseGatherer
from ..blockwise.refinement import Refinement
from ..calibration.gather import gather_statistics
from ..calibration.given import Objective
from ..calibration.self_written import SELF, SelfWritten, batches_or_self_written
from ..calibration.statistics import Batches, Statistics
from ..config.few_bits import check_one_shot
from ..config.reparam_config import ReparamConfig
from ..layers.kinds import is_quantized
from ..numerics.methods import names_of_methods
from ..planning.plan import Plan
from ..runtime.blocks import find_blocks
from ..runtime.devices import fast_products
from ..runtime.memory import return_freed
from ..runtime.modules import input_device, uncompiled
from ..runtime.processes import fails_together, tells_of_errors
from ..runtime.restoring import unchanged, unchanged_on_error
from ..tuner.compressed_model import CompressedModel
from ..tuner.data_free import installing
from ..tuner.tying import heads_of
from .block_by_block import BlockByBlock, Result, Steps
from .grouping import gathered_by_block
from .job import Job
from .one_shot import one_shot
from .options import Options
from .passes import MaxMemory

OptionsOfStep = TypeVar("OptionsOfStep", Anchoring, Refinement)


@tells_of_errors()
def compress(
    model: nn.Module,
    config: ReparamConfig,
    batches: Any = SELF,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
    plan: Plan | None = None,
    max_memory: int | str | None = None,
    adapter_name: str = "default",
    sequential: bool | Anchoring = False,
    refine: bool | Refinement = False,
    statistics: Statistics | None = None,
    offload_folder: str | Path | None = None,
    run_folder: str | Path | None = None,
    device: str | torch.device | None = None,
    objective: Objective | None = None,
) -> CompressedModel:
    """Compress a model with calibration data: `get_peft_model` with ranks and factors chosen by what the layers compute.

    By default the factorisation is two-sided (`method="whitened"` in the metrics of inputs and gradients), ranks are chosen
    by predicted loss, MLPs lose neurons where that is predicted to lose less than lower ranks do (`neurons=False` leaves them
    alone), and products are stored in pivot form. The model is changed in place, as by `get_peft_model`, and only
    after everything is computed: an error, or an interrupt, leaves it as it was.

    With `sequential` or `refine` the model is compressed block by block in the order of the data flow, so that each block sees
    what the earlier ones became. What changes beside the factors (norms, and matrices that stay dense) becomes part of the
    adapter through its `modules_to_save`.

    In a distributed run (`torchrun`, `accelerate launch`) every process calls this with the same model and batches; they share
    out batches and matrices, and end with the same factors. Blocks are refined by each process, and taken from the first.

    Args:
        model: any model that is called as `model(**batch)`, on any device.
        config: what to compress, and to which size.
        batches: keyword batches, as a DataLoader yields them, read once; rows of a tokenised data set, of any lengths; texts;
            what a tokenizer or processor returns; tensors, or pairs (x, y); the `Statistics` of an earlier run; or "self", for
            text that the model writes itself, as by `self_written`. With `sequential` or `refine` they are kept.
        tokenizer: of the model, for "self" and texts.
        seed: of the labels sampled for gradients, and of the text for "self"; given `Statistics` have their own.
        progress: whether to show progress bars.
        plan: the ranks, from `reparam_peft.plan`, which then holds what the config leaves open; None: chosen here.
        max_memory: bytes that statistics may take at a time, also as text such as "1GB"; where all of them take more, they are
            gathered block by block, in two passes forward and one backward, and a pass more for each group of modules outside
            of blocks; outputs of all blocks, and gradients there, are kept in `run_folder` or the system's temporary folder.
            Where blocks cannot be replayed, there is no room, or an `objective` is given, they are gathered in groups of
            modules, in a pass over the data for each. From planning to factorising those of the others wait in the same
            folder, or, where it has no room, are gathered again. With `sequential` or `refine` it is three passes forward and
            two backward. The graph of a pass takes at most half of what is left beside them, by parts of fewer rows of token
            ids, but of one row at least. None: half of what is free on the device of the model, and never less than one module
            needs; the graph may take any number.
        adapter_name: name of the adapter.
        sequential: factorise each matrix for the inputs that it gets from the compressed part before it, anchored to the
            original's activations; True, or an `Anchoring` that says how far. Needs a calibrated method.
        refine: train each block to reproduce the original block's output; True, or a `Refinement` that says how.
        statistics: of an earlier run, where `batches` are for `sequential` or `refine`; None: gathered from `batches`.
        offload_folder: folder in which activations are kept during the run; None: in memory, two streams of
            (tokens, hidden size), or for statistics gathered block by block two such tensors for each block.
        run_folder: folder for what is finished: the statistics, the plan, and the products; with `sequential` or `refine` the
            plan, each block, and `log.jsonl` with its errors. A run that was killed goes on after that, with the same result,
            when it is called again with the same arguments. Text that the model has written is kept there, too.
        device: where blocks are computed, of which one at a time is copied there; None: where the model is.
        objective: (model, batch) → the loss of the batch, a scalar summed over it, or logits (…, classes), for a model whose
            outputs do not say what it is trained for; the y of pairs (x, y) is in `batch["labels"]`. None: logits of
            transformers' models, and of others what they return, taken as the mean of a normal distribution.

    Returns:
        A `PeftModel`, with what was resolved in `peft_config[adapter_name]`.

    Raises:
        TypeError: a target is of a kind that cannot be factorised, or the model is wrapped by PEFT already.
        ValueError: the batches are empty or not accepted by the model, or the model cannot write them; a target is never
            reached by them; activations or weights are NaN or infinite; statistics or plan are of another model; the budget
            cannot be met; the model has no blocks, with `sequential` or `refine`; or `run_folder` holds a run with other
            arguments.

    >>> from torch import nn
    >>> class Net(nn.Sequential):
    ...     def forward(self, x): return super().forward(x)
    >>> net = Net(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> small = compress(net, ReparamConfig(target_modules=["0"], keep=0.5), [{"x": torch.randn(64, 32)}], progress=False)
    >>> small.size_report().keep <= 0.5
    True
    """
    steps = Steps(
        anchoring=options_of("sequential", sequential, Anchoring),
        refinement=options_of("refine", refine, Refinement),
        offload_folder=offload_folder,
        run_folder=run_folder,
        device=device,
    )
    options = Options(seed, progress, MaxMemory.of(max_memory, input_device(model)), objective)
    data: Batches = batches_or_self_written(batches, model, tokenizer, seed=seed, progress=progress, folder=run_folder)
    if steps.anchoring is not None or steps.refinement is not None:
        if options.max_memory is not None:
            options = replace(options, max_memory=replace(options.max_memory, by_block="if needed"))
        return compress_blocks(model, config, data, steps, options, plan, statistics, adapter_name)
    without_blocks = {"statistics": statistics, "offload_folder": offload_folder, "device": device}
    for name, value in without_blocks.items():
        if value is not None:
            raise ValueError(f"`{name}` has an effect with `sequential` or `refine` only; leave it out.")
    if run_folder is not None and not isinstance(data, (Statistics, SelfWritten)):
        data = list(data)
    with unchanged_on_error(model):
        job = Job.of_model(model, config, data, options, adapter_name=adapter_name, plan=plan)
        result = one_shot(job, plan, data, run_folder, adapter_name)
        return_freed()
        with fails_together():
            return _install(model, job, result, adapter_name)


def compress_blocks(
    model: nn.Module,
    config: ReparamConfig,
    batches: Batches,
    steps: Steps,
    options: Options,
    plan: Plan | None,
    statistics: Statistics | None,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> CompressedModel:
    """`compress` block by block.

    Args:
        steps: what is done block by block, and where.
        options: how the job runs.
        autocast_adapter_dtype: as for `get_peft_model`.
        model, config, batches, plan, statistics, adapter_name: as for `compress`.
    """
    if isinstance(config, ReparamConfig):
        check_one_shot(config, "compression block by block (`sequential`, `refine`)")
    if isinstance(batches, Statistics):
        raise ValueError(
            "`sequential` and `refine` need the data themselves; give them as `batches`, and the statistics as `statistics`."
        )
    with fails_together():
        if not isinstance(batches, SelfWritten):
            batches = list(batches)
            if not batches:
                raise ValueError("`batches` must hold at least one batch, got none; a generator can be read only once.")
        blocks = find_blocks(model)
    with unchanged_on_error(model):
        job = Job.of_model(
            model,
            config,
            batches if statistics is None else statistics,
            options,
            adapter_name=adapter_name,
            plan=plan,
            blocks=list(blocks),
            moves_bias=steps.refinement is not None,
            example=None if isinstance(batches, SelfWritten) else batches[0],
        )
        if steps.anchoring is not None and not job.weigher.calibrated:
            calibrated = names_of_methods(needs_data=True)
            raise ValueError(f"`sequential` needs one of the methods {calibrated}, got {job.config.method!r}.")
        quantized = next((name for name, module in job.modules.items() if is_quantized(module)), None)
        if quantized is not None:
            raise ValueError(
                f"{quantized}: `sequential` and `refine` need weights that can be changed, and these are quantised. Load the "
                "base model in full precision, or leave both out."
            )
        with uncompiled(model), fast_products(), BlockwiseGatherer(blocks, steps.offload_folder) as gatherer:
            if len(job.passes) > 1 or (options.max_memory is not None and options.max_memory.by_block == "always"):
                job.gather = gatherer.gather
            result = BlockByBlock(job, blocks, batches, steps, plan).result(adapter_name)
        with fails_together():
            return _install(model, job, result, adapter_name, autocast_adapter_dtype)


def options_of(name: str, asked_for: bool | OptionsOfStep | None, options: type[OptionsOfStep]) -> OptionsOfStep | None:
    """The options of a step that is asked for by True or by options; None where it is not asked for."""
    if asked_for is None or isinstance(asked_for, bool):
        return options() if asked_for else None
    if not isinstance(asked_for, options):
        raise TypeError(f"`{name}` must be True, False or options of type {options.__name__}, got {asked_for!r}.")
    return asked_for


def _install(
    model: nn.Module, job: Job, result: Result, adapter_name: str, autocast_adapter_dtype: bool = True
) -> CompressedModel:
    """Put products in place of the targets, and what else has changed in the adapter's own copies of modules."""
    resolved = job.resolved(result.plan)
    if result.changed:
        resolved.modules_to_save = sorted({*(resolved.modules_to_save or []), *result.changed})
    with installing(result.products):
        compressed = get_peft_model(model, resolved, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
    base = compressed.get_base_model()
    for name, values in result.changed.items():
        for key, value in values.items():
            parameter = base.get_parameter(f"{name}.modules_to_save.{adapter_name}.{key}")
            parameter.data = value.to(parameter)
    return cast(CompressedModel, compressed)


@tells_of_errors()
def plan(
    model: nn.Module,
    config: ReparamConfig,
    batches: Any = SELF,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
    max_memory: int | str | None = None,
    objective: Objective | None = None,
) -> Plan:
    """The ranks that `compress` would choose, what they store and what they are predicted to cost; changes nothing.

    Args:
        model: as for `compress`, as are the errors.
        config: as for `compress`.
        batches: as for `compress`.
        tokenizer: as for `compress`.
        seed: as for `compress`.
        progress: whether to show progress bars.
        max_memory: as for `compress`.
        objective: as for `compress`.
    """
    options = Options(seed, progress, MaxMemory.of(max_memory, input_device(model)), objective)
    data: Batches = batches_or_self_written(batches, model, tokenizer, seed=seed, progress=progress)
    with unchanged(model):
        job = Job.of_model(model, config, data, options)
        with gathered_by_block(job):
            return job.plan()


@tells_of_errors()
def calibrate(
    model: nn.Module,
    config: ReparamConfig,
    batches: Any,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
    first_row: int = 0,
    objective: Objective | None = None,
) -> Statistics:
    """The statistics of a config's targets, to be given to `compress` and `plan` in place of batches, saved or merged.

    They serve any `keep`, method, allocation and form.

    Args:
        model: as for `compress`, as are the errors.
        config: whose targets are looked at.
        batches: data, read once; or "self", as for `compress`.
        tokenizer: as for `compress`.
        seed: as for `compress`.
        progress: whether to show progress bars.
        first_row: number of the first row (sequence) of the batches in the whole of the data, where these are a part of it:
            with the same seed, `Statistics.merge` of the parts gives the statistics of the whole.
        objective: as for `compress`.
    """
    data = batches_or_self_written(batches, model, tokenizer, seed=seed, progress=progress)
    with unchanged(model):
        if isinstance(config, ReparamConfig):
            config = copy.copy(config)
            config.neurons = False  # which statistics serve as well as ranks
        job = Job.of_model(model, config, (), Options(seed, progress, objective=objective))
        return gather_statistics(
            model,
            job.modules,
            data,
            seed=seed,
            progress=progress,
            first_row=first_row,
            heads=heads_of(job.config, model, job.modules),
            objective=objective,
        )
