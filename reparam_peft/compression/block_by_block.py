"""Compression block by block: each block is factorised, and refined, on what the earlier ones became."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from tqdm.auto import tqdm

from ..arguments import ReparamWarning
from ..blockwise.activations import Activations
from ..blockwise.anchoring import Anchoring, Expansion, Observed, anchored, input_groups, observe, residual_sources
from ..blockwise.blocks import Call, Replay
from ..blockwise.refinement import Refinement, Task, refine_block
from ..blockwise.streams import Stream
from ..calibration.self_written import SelfWritten, written
from ..layers.kinds import layer_kind
from ..layers.product import Product
from ..planning.plan import Plan
from ..runtime.batches import Batch, fitting_mask, padding_masks, split_rows
from ..runtime.modules import abridged, encoder_of, endings_of, evaluating, naming, parameter_owners, set_module
from ..runtime.processes import fails_together, processes
from ..runtime.run_folder import RunFolder
from ..tuner.layer import ReparamLayer
from ..tuner.matrices import own_bias, source_matrix
from ..tuner.targets import Target, check_targets
from .job import Job
from .parts import Part
from .run_settings import settings_of
from .student import (
    beside,
    changed_parameters,
    factorized_layer,
    plain_modules,
    products_of,
    restore,
    share_block,
    state_of,
    targets_within,
)
from .weighing import mean_output

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Steps:
    """What is done block by block, and where.

    Attributes:
        anchoring: how matrices are fitted to the inputs in the compressed part; None: they are factorised one-shot.
        refinement: how blocks are trained; None: not at all.
        offload_folder, run_folder, device: as for `compress`.
        mapped: whether the result stays in the files of the run folder.
    """

    anchoring: Anchoring | None = None
    refinement: Refinement | None = None
    offload_folder: str | Path | None = None
    run_folder: str | Path | None = None
    device: str | torch.device | None = None
    mapped: bool = False


@dataclass(frozen=True)
class Narrowed:
    """What is left of a target of a block.

    Attributes:
        part: rows and columns.
        expansion: estimates all inputs from those that are left, as they are in the compressed part; None where all are left,
            or where that part is not looked at.
    """

    part: Part = field(default_factory=Part)
    expansion: Expansion | None = None


@dataclass
class Result:
    """What is to be installed in the model.

    Attributes:
        plan: the ranks.
        products: of all targets that do not stay dense.
        changed: module → parameter → value: what else has changed.
    """

    plan: Plan
    products: dict[str, Product] = field(default_factory=dict)
    changed: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class BlockByBlock:
    """One call of `compress` with `sequential` or `refine`; the model stays as it is.

    Args:
        job: targets, statistics and metrics.
        blocks: of the model, by name.
        batches: keyword batches.
        steps: what is done.
        plan: the ranks; None: the job chooses them.
    """

    def __init__(
        self,
        job: Job,
        blocks: Mapping[str, nn.Module],
        batches: Sequence[Batch] | SelfWritten,
        steps: Steps,
        plan: Plan | None,
    ) -> None:
        self.job, self.steps, self.plan = job, steps, plan
        self.outside: dict[str, nn.Module] = {}  # targets outside of blocks, factorised
        self.fixed: set[str] = set()  # targets that stay as they are
        with fails_together():
            settings = {} if steps.run_folder is None else settings_of(job, batches, plan, steps.anchoring, steps.refinement)
        self.folder = RunFolder(steps.run_folder, settings, steps.mapped)
        with ExitStack() as stack:
            stack.callback(self.folder.release)
            data = written(batches)
            with fails_together():
                self.batches = list(data)
                if steps.refinement is not None:
                    self.batches = [part for batch in batches for part in split_rows(batch, steps.refinement.batch_size)]
                self.replay = Replay(job.model, blocks, self.batches)
                encoder = encoder_of(job.model)
                self.encoder = None if encoder is None else set(encoder.modules())
                self.shared = {name for names in parameter_owners(job.model).values() if len(names) > 1 for name in names}
            stack.pop_all()

    def result(self, adapter_name: str) -> Result:
        """Compress everything but what an earlier call has finished; then other runs may work in the folder."""
        with self.folder:
            return self._result(adapter_name)

    def _result(self, adapter_name: str) -> Result:
        job, order, plan = self.job, self.replay.order, self.plan
        with fails_together():
            done = {block: self.folder.tensors(i) for i, block in enumerate(order[: len(self.folder.finished)])}
            if self.folder.plan is not None:
                plan = Plan.load(self.folder.plan)
                job.resume(plan, [name for name in job.modules if any(name.startswith(f"{block}.") for block in done)])
        if plan is None:
            plan = job.plan()
        self.unfinished = len(done) < len(order)  # else nobody needs what blocks compute
        with fails_together():
            targets = job.ranked(plan)
            self._tell_of_unreached(targets)
            check_targets(targets, job.config, job.model, adapter_name, loading=False)
        factorised = {name for name, target in targets.items() if target.rank is not None}
        # PEFT saves modules whole by endings of names, so that it would take a factorised one, too.
        self.fixed = endings_of(factorised, targets.keys() - factorised)
        self.folder.begin(plan.to_dict())
        result = Result(plan)
        passes = 1 + (self.steps.refinement.epochs if self.steps.refinement else 0)
        hidden = None if job.options.progress and processes()[1] == 0 else True
        inside = {block: targets_within(targets, block) for block in order}
        covered = {f"{block}.{name}" for block, within in inside.items() for name in within}
        with (
            Activations(self.steps.offload_folder) as store,
            tqdm(total=passes * len(order), unit="pass", delay=1, disable=hidden) as bar,
        ):
            self.original = Stream("original", self.replay, store, {}, self.steps.device)
            self.compressed = Stream("compressed", self.replay, store, self.outside, self.steps.device)
            self._outside({name: target for name, target in targets.items() if name not in covered}, result)
            for position, (name, within) in enumerate(inside.items()):
                bar.set_description(name)
                with naming(name), evaluating(self.replay.blocks[name]):
                    self._block(position, name, within, done.get(name), result, bar)
                bar.update((position + 1) * passes - bar.n)
        return result

    def _tell_of_unreached(self, targets: Mapping[str, Target]) -> None:
        """Warn of blocks with targets that the first batch does not run, so that their place in the data flow is not known."""
        blocks = [name for name in self.replay.unreached if targets_within(targets, name)]
        if blocks:
            warnings.warn(
                f"The first batch does not run {', '.join(abridged(blocks))}, so that what is targeted there is factorised "
                "one-shot, and not refined.",
                ReparamWarning,
                stacklevel=5,
            )

    def _outside(self, targets: Mapping[str, Target], result: Result) -> None:
        """Targets that belong to no block are factorised one-shot; those before the blocks change what the blocks see."""
        result.products |= self.job.products(targets)
        with fails_together():
            for name, target in targets.items():
                if target.rank is not None:
                    self.outside[name] = factorized_layer(target, result.products[name], target.module)

    def _block(
        self,
        position: int,
        name: str,
        targets: Mapping[str, Target],
        done: Mapping[str, Tensor] | None,
        result: Result,
        bar: tqdm[Any],
    ) -> None:
        start = time.perf_counter()
        with fails_together():
            original = self.replay.blocks[name]
            original = original if self.steps.device is None else copy.deepcopy(original).to(self.steps.device)
            student = copy.deepcopy(original).requires_grad_(False).eval()
            if self.unfinished:
                self.original.put(position, original)
            if done is not None:
                restore(student, targets, done)
        if done is None:
            errors = self._compress(position, name, original, student, targets, bar) if targets else {}
            entry = {"block": name, "position": position, **errors, "seconds": round(time.perf_counter() - start, 2)}
            self.folder.finish(entry, state_of(original, student))
            logger.info("block %s is compressed, in %.1f s", name, entry["seconds"])
        with fails_together():
            if done is None and self.folder.mapped:  # the file's pages in place of memory
                student = copy.deepcopy(original).requires_grad_(False).eval()
                restore(student, targets, self.folder.tensors(position))
            # Where the model has the block, which may have been computed elsewhere.
            home = self.replay.blocks[name]
            for relative, product in products_of(student).items():
                result.products[f"{name}.{relative}"] = beside(home.get_submodule(relative), product)
            for relative, values in changed_parameters(original, student).items():
                places = {key: home.get_parameter(f"{relative}.{key}").device for key in values}
                result.changed[f"{name}.{relative}"] = {key: value.to(places[key]) for key, value in values.items()}
            if self.unfinished:
                self.compressed.put(position, student)
                self.original.forget(position)
                self.compressed.forget(position)

    def _compress(
        self, position: int, name: str, original: nn.Module, student: nn.Module, targets: Mapping[str, Target], bar: tqdm[Any]
    ) -> dict[str, Any]:
        """Factorise and refine a block; returns its errors."""
        refinement = self.steps.refinement
        task = Task(
            call=partial(self.compressed.call, position),
            target=partial(self.original.main, position),
            mask=lambda batch, output: self._rows(position, batch, output),
        )
        train, held = (refinement or Refinement()).split(len(self.batches))
        if self.steps.anchoring is not None or any(target.rank is not None for target in targets.values()):
            self.job.statistics_of(f"{name}.{next(iter(targets))}")  # of the whole block, by all processes
        if self.steps.anchoring is None:
            storages = {f"{name}.{relative}": target.storage for relative, target in targets.items()}
            self.job.neurons.prepare(list(storages), self.job.neurons.left(storages))
        with fails_together():
            errors: dict[str, Any] = {"original": task.error(original, held or train)}
            self._factorize_all(position, name, original, student, targets)
        share_block(student)
        with fails_together():
            errors["before"] = errors["after"] = task.error(student, held or train)
            if refinement is not None:
                trained = self._trained(name, student, targets)
                by_epoch = refine_block(student, trained, task, len(self.batches), refinement, partial(bar.update, 1))
                errors |= {"after": min(by_epoch), "epochs": by_epoch[1:]}
        if refinement is not None:
            share_block(student)
        return errors

    def _factorize_all(
        self, position: int, name: str, original: nn.Module, student: nn.Module, targets: Mapping[str, Target]
    ) -> None:
        """Factorise the targets of a block, those with one input together, in the order of the data flow."""
        anchoring = self.steps.anchoring
        first = self.original.call(position, 0)
        sources = {}
        if anchoring is not None and anchoring.residual:
            sources = residual_sources(original, first, list(targets))
        left = {name: target.storage for name, target in ((f"{name}.{relative}", targets[relative]) for relative in targets)}
        waiting = self.job.neurons.left(left)
        narrowed: dict[str, Narrowed] = {}
        for group in input_groups(original, first, list(targets)):
            observed = None
            for consumer in [c for c in waiting if {f"{name}.{r}" for r in group} & set(self.job.neurons.mlps[c].names)]:
                relative = consumer.removeprefix(f"{name}.")
                with naming(relative):  # before the first of its producers is factorised
                    calls = None if anchoring is None else self._calls(position)
                    before = None if calls is None else observe(original, student, calls, [relative], {}, compares=False)
                    narrowed |= self._narrowed(consumer, waiting.pop(consumer), before)
                    del before
            if anchoring is not None:
                with naming(group[0]):
                    expansion = narrowed.get(f"{name}.{group[0]}", Narrowed()).expansion
                    observed = observe(original, student, self._calls(position), group, sources, expansion)
            for relative in group:
                with naming(relative):
                    full = f"{name}.{relative}"
                    self._factorize(
                        full,
                        relative,
                        targets[relative],
                        student,
                        observed,
                        narrowed.get(full, Narrowed()),
                        is_last=relative == group[-1],
                    )
                    self.job.forget(full)

    def _narrowed(self, consumer: str, count: int, observed: Observed | None) -> dict[str, Narrowed]:
        """What is left of the matrices of an MLP, by module; neurons are chosen by what they are in the compressed part."""
        if observed is None:
            parts = self.job.neurons.parts(self.job.neurons.mlps[consumer].names, {consumer: count})
            return {name: Narrowed(part) for name, part in parts.items()}
        centred = self.job.targets[consumer].storage.bias
        weighing = self.job.weighing(consumer, observed.moments(centred))
        parts = self.job.neurons.chosen(consumer, count, weighing)
        narrowed = {name: Narrowed(part) for name, part in parts.items()}
        narrowed[consumer] = Narrowed(
            parts[consumer], parts[consumer].expansion(weighing.gram, weighing.mean if centred else None)
        )
        return narrowed

    def _factorize(
        self,
        name: str,
        relative: str,
        target: Target,
        student: nn.Module,
        observed: Observed | None,
        narrowed: Narrowed,
        *,
        is_last: bool,
    ) -> None:
        """Put the product of a matrix, or the matrix that takes its place, in a block under construction.

        What was `observed` of a group is used up by its last module.
        """
        module = student.get_submodule(relative)
        if target.rank is None and (observed is None or name in self.fixed):
            return
        W, bias = source_matrix(module), own_bias(module) if target.storage.bias else None
        part = narrowed.part
        if observed is None or self.steps.anchoring is None:
            weighing = self.job.weighing(name)
            output_mean = None if bias is None else mean_output(W, bias, weighing.mean)
        else:
            # Unpacked twice, so that there is but one matrix of the inputs in memory while another is solved for.
            gram = self.job.weigher.shrunk(observed.moments(bias is not None))
            anchoring, expansion = self.steps.anchoring, narrowed.expansion
            W, output_mean = anchored(W, bias, relative, observed, gram, anchoring, expansion, used_up=is_last)
            del gram
            weighing = self.job.weighing(name, observed.moments(bias is not None), part.columns)
            part = Part(part.rows)  # its columns are left out already
        if target.rank is not None:
            mean = None if output_mean is None else part.of_outputs(output_mean)
            left = part.matrix(W, weighing.gram)
            product = self.job.factorizer.product_of_part(narrowed.part, target, left, part.weighing(weighing), mean)
            set_module(student, relative, factorized_layer(target, product, module))
            return
        weight = module.get_parameter("weight")
        weight.data = layer_kind(module).weight(W, weight.shape).to(weight)
        if bias is not None and output_mean is not None:
            bias.data = (output_mean - W @ weighing.mean.to(W.device)).to(bias)

    def _calls(self, position: int) -> Iterator[tuple[Call, Call, Callable[[Tensor], Tensor | None]]]:
        """What a block is called with in both streams, and which rows of an input in it count."""
        for batch in self.original.batches:
            compressed = self.compressed.call(position, batch)
            yield self.original.call(position, batch), compressed, partial(self._rows, position, batch, call=compressed)

    def _rows(self, position: int, batch: int, x: Tensor, call: Call = ((), {})) -> Tensor | None:
        """Which rows of an input or output of a block are no padding, flattened; None: all."""
        source, target = padding_masks(self.batches[batch], self.encoder is not None)
        encodes = self.encoder is None or self.replay.blocks[self.replay.order[position]] in self.encoder
        others = [leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, Tensor)][1:]
        of_encoder = any(leaf.data_ptr() == x.data_ptr() and leaf.shape == x.shape for leaf in others)
        return fitting_mask(source if encodes or of_encoder else target, x)

    def _trained(self, block: str, student: nn.Module, targets: Mapping[str, Target]) -> list[nn.Parameter]:
        """The parameters of a block that are refined: factors, their biases, dense targets, and vectors such as norms.

        Other matrices are not ours to change; PEFT saves no parameters of modules that have children; and what the block
        shares with other parts of the model stays as it is.
        """
        layers = [module for module in student.modules() if isinstance(module, ReparamLayer)]
        trained = [parameter for layer in layers for parameter in layer.reparam_factors.parameters()]
        for name, module in plain_modules(student):
            parameters = dict(module.named_parameters())
            if name in targets or all(parameter.ndim <= 1 for parameter in parameters.values()):
                ours = {key: p for key, p in parameters.items() if f"{block}.{name}.{key}" not in self.shared}
                if f"{block}.{name}" not in self.fixed:
                    trained += [parameter for parameter in ours.values() if parameter.is_floating_point()]
        return trained
