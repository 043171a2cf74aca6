"""How batches go through the blocks of a model, in parts that are run at a time."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from copy import copy
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from ..calibration.gather import calibrating, parts_of
from ..calibration.graphs import tokens_at_a_time, tokens_within
from ..calibration.recorder import Recorder
from ..calibration.self_written import written
from ..calibration.statistics import Statistics
from ..runtime.batches import REFUSALS, Batch
from ..runtime.devices import fast_products
from ..runtime.modules import input_device, without_cache
from ..runtime.processes import alike_in_every_process, check_whole, fails_together, processes
from .activations import Activations
from .blocks import Replay, hollowed
from .streams import Stream

PLAIN = (Tensor, bool, int, float, complex, str, torch.dtype, torch.device)  # arguments in which nothing can be left
SAMPLE = 4096  # numbers of each tensor of what a block gives, that are compared
ALIKE = 1e-3  # difference of the numbers, relative

logger = logging.getLogger(__name__)


class Course:
    """The parts of batches that a process runs, and how they go through the blocks of a model.

    Args:
        model: in eval mode.
        blocks: of the model, by name.
        batches: keyword batches, all of them in every process.
        starts: modules from whose outputs on gradients flow.
        room: bytes that the graph of a block may take; None: any.

    Attributes:
        model: the model.
        parts: those of every n-th batch, where there are n processes.
        replay: of the blocks, on these parts.

    Raises:
        ValueError: the blocks cannot be replayed, or the model does not accept the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        batches: Iterable[Mapping[str, Any]],
        starts: Collection[nn.Module],
        room: int | None = None,
    ) -> None:
        world, rank = processes()
        check_whole(batches)
        tokens = tokens_at_a_time(input_device(model))
        if room is not None:
            tokens = tokens_within(room, model, batches, starts, blocks.values())
        parts = list(parts_of(batches, tokens))
        self.model, self.starts = model, starts
        self.parts = [part for part in parts if part.index % world == rank]
        # A process that has no batch of its own knows the blocks by the first one.
        data: list[Batch] = [part.batch for part in self.parts or parts[:1]]
        self.replay = Replay(model, blocks, data)
        self._numbers = sum(_numbers(part.batch) for part in parts) / _numbers(data[0])

    @torch.enable_grad()
    def look(self) -> Look:
        """What a pass forward of the first part tells, of which no graph is held."""
        look = Look()
        blocks = [self.replay.blocks[name] for name in self.replay.order]
        recorder = Recorder(Statistics(seed=0), {}, gradients=True)
        with ExitStack() as stack, suppress(_Seen):
            stack.enter_context(saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing))
            stack.enter_context(recorder.hooks(self.model, set(self.starts)))
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(look.before, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(partial(look.after, is_last=block is blocks[-1])).remove)
            batch = send_to_device(dict(self.replay.batches[0]), input_device(self.model))
            self.model(**without_cache(self.model, batch))
        look.bytes_of_outputs = int(look.bytes_of_outputs * self._numbers)
        return look

    @torch.no_grad()
    def is_true(self, gradients: bool) -> bool:
        """Whether blocks that are run one after the other, each on two batches, give what they give in whole passes.

        With gradients neither may the result read what a block reads, too, since both send gradients to it.

        A block that leaves something for a later one, or for the model, elsewhere than in its output has left that of the last
        batch by then.
        """
        replay = copy(self.replay)
        replay.batches = [self.replay.batches[0], _another(self.replay.batches[0])]
        blocks = [replay.blocks[name] for name in replay.order]
        expected: dict[tuple[int, int], Tensor] = {}
        results: list[Tensor] = []

        def result(batch: Batch) -> Tensor:
            return _sample(self.model(**without_cache(self.model, send_to_device(dict(batch), input_device(self.model)))))

        def keep(key: tuple[int, int], module: nn.Module, args: Any, output: Any) -> None:
            expected[key] = _sample(output)

        for number, batch in enumerate(replay.batches):
            with ExitStack() as stack:
                for position, block in enumerate(blocks):
                    stack.callback(block.register_forward_hook(partial(keep, (position, number))).remove)
                results.append(result(batch))
        with Activations() as store:
            stream = Stream("original", replay, store, {}, None)
            for position, block in enumerate(blocks):
                stream.put(position, block)
                if not all(_alike(_sample(stream.output(position, n)), expected[position, n]) for n in stream.batches):
                    return False
            is_hollow = [gradients and replay.last_use[position] > position for position in range(len(blocks))]
            for number, batch in enumerate(replay.batches):
                outputs = [stream.output(position, number) for position in range(len(blocks))]
                played = [hollowed(output) if hollow else output for output, hollow in zip(outputs, is_hollow, strict=True)]
                with replay.playing(dict(enumerate(played))):
                    if not _alike(result(batch), results[number]):
                        return False
        return True


class Look:
    """What is seen of a pass through blocks.

    Attributes:
        bytes_of_outputs: of all blocks, on all batches of all processes.
        shares_inputs: whether several blocks read one tensor that gradients flow through.
        hands_objects_on: whether a block is called with an object in which it may leave something for later ones.
    """

    def __init__(self) -> None:
        self.bytes_of_outputs, self.shares_inputs, self.hands_objects_on = 0, False, False
        self._read: dict[int, Tensor] = {}  # by the identity, which nothing else takes as long as they are here

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of each block."""
        leaves = tree_leaves((args, kwargs))
        reads = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad}
        self.shares_inputs |= not self._read.keys().isdisjoint(reads)
        self.hands_objects_on |= not all(leaf is None or isinstance(leaf, PLAIN) for leaf in leaves)
        self._read |= reads

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any, is_last: bool) -> None:
        """A hook of each block, at the last of which the pass ends."""
        self.bytes_of_outputs += sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if is_last:
            self._read.clear()
            raise _Seen


class _Seen(Exception):
    """The last block has run."""


def course_of(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    starts: Collection[nn.Module],
    gradients: bool,
    room: int | None = None,
) -> tuple[Course, int] | None:
    """How batches go through the blocks of a model, and the bytes of what is kept of them; all processes call this together.

    None where statistics that are gathered block by block would not be those of passes over the whole model: the blocks cannot
    be replayed, several, or one and the result, read one tensor that gradients flow through, such as the output of an encoder,
    one may leave something elsewhere than in its output, or the first batches of processes reach different blocks.

    Args:
        model: in any mode.
        blocks: of the model, by name.
        batches: keyword batches, all of them in every process.
        starts: modules from whose outputs on gradients flow.
        gradients: whether gradients are kept, too.
        room: bytes that the graph of a block may take; None: any.
    """
    batches = written(batches)
    course, kept = None, 0
    with fails_together(), calibrating(model), fast_products():
        try:
            course = Course(model, blocks, batches, starts, room if gradients else None)
            look = course.look()
            kept = look.bytes_of_outputs * (2 if gradients else 1)
            if (gradients and look.shares_inputs) or look.hands_objects_on or not course.is_true(gradients):
                course = None
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            logger.info("Statistics are not gathered block by block: %s", error)
            course = None
    return (course, kept) if is_of_all(None if course is None else course.replay) and course is not None else None


def is_of_all(replay: Replay | None) -> bool:
    """Whether all processes, which call this together, run the same blocks in the same order, or none has a replay."""
    return alike_in_every_process(None if replay is None else (replay.order, replay.unreached))


def _another(batch: Batch) -> Batch:
    """A batch of the same shapes, of other tokens and values."""

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return leaf
        return leaf / 2 if leaf.is_floating_point() else leaf.roll(1, -1)

    masks = {key: value for key, value in batch.items() if "mask" in key}
    return {**tree_map(other, dict(batch)), **masks}


def _sample(output: Any) -> Tensor:
    """Some numbers of what a block gives, float64."""
    leaves = [leaf.detach().flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([leaf[:: max(1, len(leaf) // SAMPLE)].to("cpu", torch.float64) for leaf in leaves] or [torch.zeros(0)])


def _alike(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and bool((got - expected).norm() <= ALIKE * expected.norm())


def _numbers(batch: Batch) -> int:
    """Of the first tensor of a batch, which says how large it is beside others of its kind."""
    return max(1, next((value.numel() for value in batch.values() if isinstance(value, Tensor)), 1))
