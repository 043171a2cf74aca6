"""Statistics of the modules of a model of which one block at a time is run, forward and backward."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm.auto import tqdm

from ..calibration.gather import Part, calibrating, finish, gather_statistics
from ..calibration.given import Objective
from ..calibration.recorder import Recorder
from ..calibration.self_written import written
from ..calibration.statistics import Statistics, weight_norm
from ..runtime.batches import REFUSALS
from ..runtime.blocks import block_of
from ..runtime.devices import fast_products
from ..runtime.processes import fails_together, processes
from .activations import Activations
from .courses import Course, is_of_all
from .streams import Stream

OUTPUTS, GRADIENTS = "calibration", "gradient"  # of blocks, in the store

logger = logging.getLogger(__name__)


class BlockwiseGatherer:
    """Gathers what `gather_statistics` gathers, of a model of which one block at a time is run.

    An input that several blocks read, such as the output of an encoder, is weighed by the gradients that come through the block
    at hand, and not by those of all that read it.

    First the model is run forward, block after block, each on all batches, and what blocks give is kept. From the last block to
    the first, each is run once more, forward and backward from the gradients at its output, which leaves those at the outputs
    of the blocks that it depends on: kept, too, so that the statistics of any block can be gathered at any time by one pass
    over that block. Of weights, graphs and statistics no more than those of one block are wanted at a time.

    With blocks asked for from the last to the first, all statistics take two passes forward and one backward; each time that
    they are gathered again takes one forward and one backward more. What is kept takes twice (tokens, hidden size) for each
    block.

    Modules outside of blocks, and in blocks that the first batch does not reach, are gathered by passes over the whole model,
    and so are all with an objective, which may call the model in any way.

    Args:
        blocks: of the model, by name.
        offload_folder: where outputs and gradients are kept; None: in memory.
        course: of the batches through the blocks; then all is gathered by passes over the whole model where one of the batches
            takes another one. None: found here, and that is an error.
    """

    def __init__(
        self, blocks: Mapping[str, nn.Module], offload_folder: str | Path | None = None, course: Course | None = None
    ) -> None:
        self.blocks, self.store = dict(blocks), Activations(offload_folder)
        self.course, self.must_replay = course, course is None
        self.tape: Tape | None = None

    def __enter__(self) -> BlockwiseGatherer:
        return self

    def __exit__(self, *error: object) -> None:
        self.tape = None
        self.store.__exit__(*error)

    def gather(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        batches: Iterable[Mapping[str, Any]],
        *,
        gradients: bool = True,
        seed: int = 0,
        progress: bool = True,
        starts: Iterable[nn.Module] = (),
        heads: Mapping[str, Sequence[nn.Module]] | None = None,
        objective: Objective | None = None,
        room: int | None = None,
    ) -> Statistics:
        """The statistics of some modules; model, batches and options are the same in every call.

        Args:
            modules: of one block, or any others, which are gathered by passes over the whole model.
            model, batches, gradients, seed, progress, starts, heads, objective, room: as for `gather_statistics`.

        Raises:
            ValueError: as for `gather_statistics`, and where the inputs of blocks cannot be reproduced.
        """
        starts = list(starts)
        names = {block_of(name, self.blocks) for name in modules}
        # Heads are outside of the block of their embedding, and an objective may call the model as it likes.
        is_replayed = len(names) == 1 and not heads and objective is None
        (block,) = names if is_replayed else (None,)
        if block is not None and self.tape is None:
            self._run(model, written(batches), gradients, seed, starts, progress, room)
        tape = self.tape
        if tape is None or block is None or block not in tape.replay.order:
            return gather_statistics(
                model, modules, batches, gradients=gradients, seed=seed, progress=progress, starts=starts, heads=heads,
                objective=objective, room=room,
            )  # fmt: skip
        with fails_together():
            statistics = Statistics(seed=seed, weight_norms={name: weight_norm(module) for name, module in modules.items()})
            with calibrating(model), fast_products():
                tape.record(tape.replay.order.index(block), modules, statistics)
        finish(statistics, modules, tape.gradient_tokens if gradients else None)
        return statistics

    def _run(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        gradients: bool,
        seed: int,
        starts: Sequence[nn.Module],
        progress: bool,
        room: int | None,
    ) -> None:
        """Run the model forward, and what comes after its blocks backward."""
        with fails_together(), calibrating(model), fast_products():
            try:
                course = self.course or Course(model, self.blocks, batches, starts, room if gradients else None)
                self.tape = Tape(course, self.store, gradients, seed, starts, progress)
            except (*REFUSALS, OSError) as error:
                if self.must_replay or isinstance(error, torch.OutOfMemoryError):
                    raise
                logger.info(
                    "Statistics are gathered by passes over the whole model, since blocks cannot be replayed: %s", error
                )
        course_is_one = is_of_all(None if self.tape is None else self.tape.replay)
        if not course_is_one and self.must_replay:
            raise ValueError(
                "the first batches of the processes reach different blocks, which are to be run one after the other by all of "
                "them; give batches of one kind first, or run one process."
            )
        if not course_is_one or self.tape is None:
            self.blocks, self.tape = {}, None
            self.store.clear()


class Tape:
    """What the blocks of a model give for each part of the batches, and the gradients there, as far as they are known.

    Args:
        course: of the batches through the blocks.
        gradients, seed, starts, progress: as for `BlockwiseGatherer.gather`.
        store: where outputs and gradients are kept.

    Attributes:
        gradient_tokens: labels that were sampled.
    """

    def __init__(
        self,
        course: Course,
        store: Activations,
        gradients: bool,
        seed: int,
        starts: Sequence[nn.Module],
        progress: bool,
    ) -> None:
        self.model, self.parts, self.replay = course.model, course.parts, course.replay
        self.store, self.gradients, self.seed = store, gradients, seed
        self.starts, self.progress = set(starts), progress
        self.stream = Stream(OUTPUTS, self.replay, store, {}, None)
        self.gradient_tokens = 0
        inside = {module for block in self.replay.blocks.values() for module in block.modules()}
        self.outside = self.starts - inside
        for position, block in enumerate(self._bar(self._blocks(), "Running blocks")):
            self.stream.put(position, block)
        # Whether gradients reach what a block gives, as they do in a pass of the whole model.
        self.flows: dict[int, bool] = {}
        starts_before = self._is_run_before()
        for position, block in enumerate(self._blocks()):
            earlier = any(self.flows[j] for j in self.replay.depends[position])
            self.flows[position] = starts_before or earlier or not self.starts.isdisjoint(block.modules())
        if gradients:
            self._from_the_end()
        self.backward_from = len(self.replay.order) if gradients else 0  # the first block that gradients have come through

    def record(self, position: int, modules: Mapping[str, nn.Module], statistics: Statistics) -> None:
        """Add up the statistics of modules of the block at a position."""
        for later in reversed(range(position + 1, self.backward_from)):
            self._pass(later, {}, Statistics(seed=self.seed))
        self._pass(position, modules, statistics)

    def _pass(self, position: int, modules: Mapping[str, nn.Module], statistics: Statistics) -> None:
        """Run a block on all batches, forward and, for gradients, backward."""
        block = self.replay.blocks[self.replay.order[position]]
        recorder = Recorder(statistics, modules, self.gradients)
        is_new = position < self.backward_from  # whether gradients have not come through it yet
        others = self.outside | (self.starts & set(block.modules())) - set(modules.values())
        with recorder.hooks(self.model, others):
            for number, part in enumerate(self._bar(self.parts, self.replay.order[position])):
                played: dict[int, Played] = {}

                def run(number: int = number, played: dict[int, Played] = played) -> bool:
                    trees = None
                    if self.gradients:
                        played.update({j: self._played(j, number) for j in self.replay.depends[position]})
                        trees = {j: output.tree for j, output in played.items()}
                    with torch.set_grad_enabled(self.gradients):
                        args, kwargs = self.stream.call(position, number, trees)
                        output = block(*args, **kwargs)
                    if self.gradients:
                        _backward(output, self._gradients(position, number))
                    return True

                recorder.run_as(part.batch, part.index, run)
                if is_new and self.gradients:
                    self._add(number, played)
        if is_new:
            self.backward_from = position

    def _is_run_before(self) -> bool:
        """Whether one of the modules outside of blocks is run before the last block."""
        run: list[nn.Module] = []
        handles = [module.register_forward_hook(lambda module, args, output: run.append(module)) for module in self.outside]
        try:
            self.stream.call(len(self.replay.order) - 1, 0)
        finally:
            for handle in handles:
                handle.remove()
        return bool(run)

    def _from_the_end(self) -> None:
        """Run what comes after the blocks, on all batches, and keep the gradients at the outputs of blocks."""
        recorder = Recorder(Statistics(seed=self.seed), {}, gradients=True)
        with recorder.hooks(self.model, self.outside):
            for number, part in enumerate(self._bar(self.parts, "Sampling labels")):
                played: dict[int, Played] = {}

                def run(number: int = number, part: Part = part, played: dict[int, Played] = played) -> bool:
                    # Anew each time that it is run, since the model may change them in place.
                    played.update({j: self._played(j, number) for j in range(len(self.replay.order))})
                    batch = send_to_device(dict(part.batch), self.stream.home)
                    with self.replay.playing({j: output.tree for j, output in played.items()}):
                        return recorder.run_once(self.model, batch, part.index, part.first_row, self.seed)

                recorder.run_as(part.batch, part.index, run)
                self._add(number, played)
        self.gradient_tokens = recorder.gradient_tokens

    def _played(self, position: int, number: int) -> Played:
        """The output of a block, for the model to go on with."""
        return Played(self.stream.output(position, number), self.flows[position])

    def _gradients(self, position: int, number: int) -> list[Tensor | None]:
        """The gradients at the leaves of a block's output; empty where none has come."""
        key = (GRADIENTS, position, number)
        return send_to_device(self.store.get(key), self.stream.home) if self.store.holds(key) else []

    def _add(self, number: int, played: Mapping[int, Played]) -> None:
        """Add the gradients at outputs that were played to those that came from other blocks."""
        for position, output in played.items():
            new = output.gradients()
            if any(gradient is not None for gradient in new):
                before = self._gradients(position, number) or [None] * len(new)
                total = [b if a is None else a if b is None else a + b for a, b in zip(before, new, strict=True)]
                self.store.put((GRADIENTS, position, number), send_to_device(total, torch.device("cpu")))

    def _blocks(self) -> list[nn.Module]:
        return [self.replay.blocks[name] for name in self.replay.order]

    def _bar(self, items: Sequence[Any], what: str) -> Iterable[Any]:
        hidden = None if self.progress and processes()[1] == 0 else True
        return tqdm(items, desc=what, unit="part", delay=1, leave=False, disable=hidden)


class Played:
    """An output that is played in place of a block, and the gradients that come back to it.

    Args:
        output: a tree.
        flows: whether gradients come back to its floating-point tensors.

    Attributes:
        tree: the output, which the model may change in place.
    """

    def __init__(self, output: Any, flows: bool) -> None:
        leaves, structure = tree_flatten(output)
        self._leaves = [
            leaf.detach().requires_grad_() if flows and isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for leaf in leaves
        ]
        with torch.enable_grad():
            copies = [leaf.clone() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in self._leaves]
        self.tree = tree_unflatten(copies, structure)

    def gradients(self) -> list[Tensor | None]:
        """Of each leaf of the tree; None where none has come."""
        return [leaf.grad if isinstance(leaf, Tensor) else None for leaf in self._leaves]


def _backward(output: Any, gradients: Sequence[Tensor | None]) -> None:
    """Send gradients back from the leaves of an output."""
    pairs = [
        (leaf, gradient.to(leaf.device))
        for leaf, gradient in zip(tree_flatten(output)[0], gradients, strict=False)
        if gradient is not None and isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if pairs:
        leaves, of_leaves = zip(*pairs, strict=True)
        torch.autograd.backward(leaves, of_leaves)
