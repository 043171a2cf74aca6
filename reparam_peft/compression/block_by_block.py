"""Compression block by block: each block is factorised, and refined, on what the earlier ones became."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from tqdm.auto import tqdm

from ..blockwise.activations import Activations
from ..blockwise.anchoring import Anchoring, Observed, anchored, input_groups, observe, residual_sources
from ..blockwise.blocks import Call, Replay, hollowed, main_tensor
from ..blockwise.refinement import Refinement, Task, refine_block
from ..layers.kinds import layer_kind
from ..layers.product import Product
from ..planning.plan import Plan
from ..runtime.batches import Batch, fitting_mask, padding_masks, split_rows
from ..runtime.fingerprints import fingerprint_of_batches, fingerprint_of_model
from ..runtime.modules import input_device, naming, parameter_owners, replaced, set_module
from ..runtime.processes import processes
from ..runtime.run_folder import RunFolder, json_able
from ..tuner.layer import ReparamLayer
from ..tuner.matrices import source_matrix
from ..tuner.targets import Target, check_targets
from .run import Run
from .student import (
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

ORIGINAL, COMPRESSED = "original", "compressed"  # the two streams of activations


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
    """One run of `compress` with `sequential` or `refine`; the model stays as it is.

    Args:
        run: targets, statistics and metrics.
        blocks: of the model, by name.
        batches: keyword batches.
        anchoring: how matrices are fitted to the inputs in the compressed part; None: they are factorised one-shot.
        refinement: how blocks are trained; None: not at all.
        offload_folder, run_folder, device: as for `compress`.
        mapped: whether the result stays in the files of the run folder.
    """

    def __init__(
        self,
        run: Run,
        blocks: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        anchoring: Anchoring | None,
        refinement: Refinement | None,
        offload_folder: str | Path | None = None,
        run_folder: str | Path | None = None,
        device: str | torch.device | None = None,
        mapped: bool = False,
    ) -> None:
        parts = list(batches)
        if refinement is not None:
            parts = [part for batch in batches for part in split_rows(batch, refinement.batch_size)]
        self.run, self.batches, self.anchoring, self.refinement = run, parts, anchoring, refinement
        self.offload_folder, self.device, self.home = offload_folder, device, input_device(run.model)
        self.replay = Replay(run.model, blocks, parts)
        encodes = getattr(getattr(run.model, "config", None), "is_encoder_decoder", False)
        self.encoder = set(run.model.get_encoder().modules()) if encodes else None
        self.shared = {name for names in parameter_owners(run.model).values() if len(names) > 1 for name in names}
        self.hollow: dict[tuple[int, int], Any] = {}
        self.outside: dict[str, nn.Module] = {}  # targets outside of blocks, factorised
        settings: dict[str, Any] = {}
        if run_folder is not None:
            settings = {
                "config": json_able(run.config.to_dict()),
                "sequential": None if anchoring is None else asdict(anchoring),
                "refine": None if refinement is None else asdict(refinement),
                "seed": run.seed,
                "model": fingerprint_of_model(run.model),
                "batches": fingerprint_of_batches(batches),
            }
        self.folder = RunFolder(run_folder, settings, mapped)

    def result(self, plan: Plan | None, adapter_name: str) -> Result:
        """Compress everything but what an earlier run has finished."""
        run = self.run
        done = {block: self.folder.tensors(i) for i, block in enumerate(self.replay.order[: len(self.folder.finished)])}
        if self.folder.plan is not None:
            plan = Plan.from_dict(self.folder.plan)
            run.resume(plan, [name for name in run.modules if any(name.startswith(f"{block}.") for block in done)])
        if plan is None:
            plan = run.plan()
        self.unfinished = len(done) < len(self.replay.order)  # else nobody needs what blocks compute
        targets = run.ranked(plan)
        check_targets(targets, run.config, run.model, adapter_name, loading=False)
        self.folder.begin(plan.to_dict())
        result = Result(plan)
        passes = 1 + (self.refinement.epochs if self.refinement else 0)
        total = passes * len(self.replay.order)
        hidden = None if run.progress and processes()[1] == 0 else True
        inside = {block: targets_within(targets, block) for block in self.replay.order}
        covered = {f"{block}.{name}" for block, own in inside.items() for name in own}
        with Activations(self.offload_folder) as self.store, tqdm(total=total, unit="pass", delay=1, disable=hidden) as bar:
            self._outside({name: target for name, target in targets.items() if name not in covered}, result)
            for position, (name, own) in enumerate(inside.items()):
                bar.set_description(name)
                with naming(name):
                    self._block(position, name, own, done.get(name), result, bar)
                bar.update((position + 1) * passes - bar.n)
        return result

    def _outside(self, targets: Mapping[str, Target], result: Result) -> None:
        """Targets that belong to no block are factorised one-shot; those before the blocks change what the blocks see."""
        result.products |= self.run.products(targets)
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
        original = self.replay.blocks[name]
        original = original if self.device is None else copy.deepcopy(original).to(self.device)
        student = copy.deepcopy(original).requires_grad_(False).eval()
        if self.unfinished:
            self._propagate(ORIGINAL, position, original.eval())
        if done is not None:
            restore(student, targets, done)
        else:
            errors = self._compress(position, name, original, student, targets, bar) if targets else {}
            entry = {"block": name, "position": position, **errors, "seconds": round(time.perf_counter() - start, 2)}
            self.folder.finish(entry, state_of(original, student, targets))
            if self.folder.mapped:  # the file's pages in place of memory
                student = copy.deepcopy(original).requires_grad_(False).eval()
                restore(student, targets, self.folder.tensors(position))
        result.products |= {f"{name}.{relative}": product for relative, product in products_of(student).items()}
        result.changed |= {f"{name}.{relative}": values for relative, values in changed_parameters(original, student).items()}
        if self.unfinished:
            self._propagate(COMPRESSED, position, student)
            self._forget(position)

    def _propagate(self, which: str, position: int, block: nn.Module) -> None:
        """Run a block on all batches, and keep what it makes."""
        for batch in range(len(self.batches)):
            with torch.no_grad():
                args, kwargs = self._call(which, position, batch)
                output = block(*args, **kwargs)
            if not torch.isfinite(main_tensor(output)).all():
                raise ValueError(f"the output of the {which} block holds NaN or infinite values in batch {batch}.")
            self.store.put((which, position, batch), send_to_device(output, torch.device("cpu")))
            self.hollow[position, batch] = send_to_device(hollowed(output), self.home)

    def _compress(
        self, position: int, name: str, original: nn.Module, student: nn.Module, targets: Mapping[str, Target], bar: tqdm[Any]
    ) -> dict[str, Any]:
        """Factorise and refine a block; returns its errors."""
        task = Task(
            call=partial(self._call, COMPRESSED, position),
            target=lambda batch: main_tensor(self.store.get((ORIGINAL, position, batch))),
            mask=lambda batch, output: self._rows(position, batch, output),
        )
        train, held = (self.refinement or Refinement()).split(len(self.batches))
        errors: dict[str, Any] = {"original": task.error(original, held or train)}
        first = self._call(ORIGINAL, position, 0)
        sources = {}
        if self.anchoring is not None and self.anchoring.residual:
            sources = residual_sources(original, first, list(targets))
        for group in input_groups(original, first, list(targets)):
            seen = None
            if self.anchoring is not None:
                with naming(group[0]):
                    seen = observe(original, student, self._calls(position), group, sources)
            for relative in group:
                with naming(relative):
                    self._factorize(f"{name}.{relative}", relative, targets[relative], student, seen)
        share_block(student)
        errors["before"] = errors["after"] = task.error(student, held or train)
        if self.refinement is not None:
            trained = self._trained(name, student, targets)
            found = refine_block(student, trained, task, len(self.batches), self.refinement, partial(bar.update, 1))
            share_block(student)
            errors |= {"after": min(found), "epochs": found[1:]}
        return errors

    def _factorize(self, name: str, relative: str, target: Target, student: nn.Module, seen: Observed | None) -> None:
        """Put the product of a matrix, or the matrix that takes its place, in a block under construction."""
        module = student.get_submodule(relative)
        if target.rank is None and seen is None:
            return
        statistics = self.run.statistics_with(name)
        W, bias = source_matrix(module), module.bias if target.storage.bias else None
        if seen is None:
            metrics = self.run.metrics(name, statistics)
            output_mean = None if bias is None else mean_output(W, bias, metrics.mean)
        else:
            inputs = seen.moments(bias is not None)
            metrics = self.run.metrics(name, statistics, inputs)
            W, output_mean = anchored(W, bias, relative, seen, self.run.shrunk(inputs), self.anchoring)
        if target.rank is not None:
            set_module(student, relative, factorized_layer(target, self.run.product(target, metrics, W, output_mean), module))
            return
        module.weight.data = layer_kind(module).weight(W, module.weight.shape).to(module.weight)
        if bias is not None:
            module.bias.data = (output_mean - W @ metrics.mean.to(W.device)).to(bias)

    def _calls(self, position: int) -> Iterator[tuple[Call, Call, Callable[[Tensor], Tensor | None]]]:
        """What a block is called with in both streams, and which rows of an input in it count."""
        for batch in range(len(self.batches)):
            compressed = self._call(COMPRESSED, position, batch)
            yield self._call(ORIGINAL, position, batch), compressed, partial(self._rows, position, batch, call=compressed)

    def _call(self, which: str, position: int, batch: int) -> Call:
        """What a block is called with, in one of the streams."""
        needed = self.replay.depends[position]
        outputs = {j: self._output(which, j, batch) if j in needed else self.hollow[j, batch] for j in range(position)}
        with replaced(self.run.model, self.outside if which == COMPRESSED else {}):
            call = self.replay.inputs(position, batch, outputs)
        return call if self.device is None else send_to_device(call, self.device)

    def _output(self, which: str, position: int, batch: int) -> Any:
        return send_to_device(self.store.get((which, position, batch)), self.home)

    def _forget(self, position: int) -> None:
        """Drop outputs that no later block depends on."""
        for earlier, last in self.replay.last_use.items():
            for which in (ORIGINAL, COMPRESSED) if earlier <= position and last <= position else ():
                for batch in range(len(self.batches)):
                    self.store.drop((which, earlier, batch))

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
            own = dict(module.named_parameters())
            if name in targets or all(parameter.ndim <= 1 for parameter in own.values()):
                trained += [p for key, p in own.items() if f"{block}.{name}.{key}" not in self.shared and p.is_floating_point()]
        return trained
