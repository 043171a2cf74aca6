"""The inputs of the blocks of a model: the model's own code says what happens between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..runtime.batches import Batch
from ..runtime.modules import evaluating, forward_as, input_device, without_cache

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


class _Reached(Exception):
    """A block was about to run."""

    def __init__(self, call: Call) -> None:
        self.call = call


class _Unplayable(ValueError):
    """Blocks that cannot be replayed: nothing that a batch could do about."""


class Replay:
    """The inputs of each block, given the outputs of the blocks before it.

    What a block is called with is the output of the one before it, and masks, positions and more besides, which every
    architecture makes in its own way. So nothing of that is imitated: the model itself is run, with players of recorded outputs
    in place of its blocks, up to the block in question, where the run ends. Which earlier outputs a block's inputs depend
    on is found by leaving them out, with the first batch; all other outputs need not be kept.

    Args:
        model: in eval mode.
        blocks: some of its modules, by name.
        batches: keyword batches.

    Attributes:
        order: names of the blocks that the first batch reaches, in the order of the data flow.
        unreached: names of the other blocks.
        depends: position of a block in `order` → positions of earlier ones that its inputs depend on.
        last_use: position of a block → the last position that depends on it.

    Raises:
        ValueError: a block runs several times in one pass, the model does not accept a batch, or the inputs of a
            block cannot be reproduced.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], batches: Sequence[Batch]) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.order: list[str] = []
        self.unreached: list[str] = []
        self.depends: dict[int, set[int]] = {}
        self.changes_in_place = False  # what blocks return, for which hollow outputs need memory of their own
        self._find_dependencies()
        self.last_use = {
            earlier: max((position for position in self.depends if earlier in self.depends[position]), default=earlier)
            for earlier in range(len(self.order))
        }

    def inputs(self, position: int, batch: int, outputs: Mapping[int, Any], gradients: bool = False) -> Call:
        """Arguments that a block is called with.

        Args:
            position: of the block in `order`.
            batch: number of the batch.
            outputs: outputs of all earlier blocks, or `hollowed` ones of those that this one does not depend on.
            gradients: whether gradients flow from the arguments to the outputs.

        Returns:
            Positional and keyword arguments.

        Raises:
            ValueError: the model does not accept the batch, or the block is not reached.
        """
        if self.changes_in_place:
            outputs = {j: _cloned(outputs[j], detach=not gradients) for j in range(position)}
        with ExitStack() as stack, torch.set_grad_enabled(gradients):
            stack.enter_context(self.playing(outputs))
            stack.enter_context(forward_as(self.blocks[self.order[position]], _reach))
            stack.enter_context(evaluating(self.model))
            try:
                self._run(batch)
            except _Reached as reached:
                return reached.call
        raise ValueError(f"{self.order[position]}: batch {batch} does not reach this block, as the first batch did.")

    @contextmanager
    def playing(self, outputs: Mapping[int, Any]) -> Iterator[None]:
        """Within this block blocks give these outputs, by their positions, in place of what they would compute."""
        with ExitStack() as stack:
            for position, output in outputs.items():
                stack.enter_context(forward_as(self.blocks[self.order[position]], _player(output)))
            yield

    def _run(self, batch: int) -> Any:
        try:
            arguments = without_cache(self.model, self.batches[batch])  # to which every replay of a block would add
            return self.model(**send_to_device(arguments, input_device(self.model)))
        except _Unplayable:
            raise
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise ValueError(f"the model does not accept batch {batch} ({sorted(self.batches[batch])}): {error}") from error

    @torch.no_grad()
    def _find_dependencies(self) -> None:
        calls: list[Call] = []
        outputs: dict[int, Any] = {}

        def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self.order:
                raise _Unplayable(
                    f"{name}: this block runs more than once in a pass, so that it has no single place in the data flow. Leave "
                    "out `sequential` and `refine`."
                )
            self.order.append(name)
            if _holds_nan((args, kwargs)):
                raise _Unplayable(f"{name}: the inputs of this block hold NaN in batch 0; repair the model or its data.")
            calls.append(_cloned((args, kwargs)))

        def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[self.order.index(name)] = _cloned(output)

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for name, block in self.blocks.items():
                hook = block.register_forward_pre_hook(_bound(before, name), with_kwargs=True)
                stack.callback(hook.remove)
                stack.callback(block.register_forward_hook(_bound(after, name)).remove)
            self._run(0)
        self.unreached = [name for name in self.blocks if name not in self.order]
        # An output that is left out is played as a hollow one: right in shape, so that the model's code runs, and NaN, so that
        # whatever is computed from it is NaN, which equals nothing. Inputs that come out equal do not depend on it.
        hollow = {position: hollowed(output) for position, output in outputs.items()}

        def reproduces(position: int, kept: set[int]) -> bool:
            """Whether a block's inputs are the recorded ones where only these earlier outputs are played."""
            played = {j: _cloned(outputs[j]) if j in kept else hollow[j] for j in range(position)}
            try:
                call = self.inputs(position, 0, played)
            except RuntimeError:  # a hollow output is one number in memory, which cannot be changed in place
                self.changes_in_place = True
                call = self.inputs(position, 0, played)
            return _same(call, calls[position])

        for position in range(len(self.order)):
            earlier = set(range(position))
            if reproduces(position, earlier & {position - 1}):
                self.depends[position] = earlier & {position - 1}
            elif reproduces(position, earlier):
                self.depends[position] = {j for j in earlier if not reproduces(position, earlier - {j})}
            else:
                raise ValueError(
                    f"{self.order[position]}: the inputs of this block are not reproduced from the outputs of those before "
                    "it (the model computes something at random or changes its state). Leave out `sequential` and `refine`."
                )


def hollowed(tree: Any) -> Any:
    """A tree whose tensors have the shapes and dtypes of this one's, and hold NaN, or zero where the dtype has none.

    Each is one number, expanded: a stand-in for an output that is not kept takes no memory.
    """

    def hollow(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.new_full((), torch.nan if leaf.is_floating_point() else 0).expand(leaf.shape)

    return tree_map(hollow, tree)


def main_tensor(output: Any) -> Tensor:
    """The first floating-point tensor of a block's output, which goes on to the next block.

    Raises:
        ValueError: there is none.
    """
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise ValueError("this block returns no floating-point tensor to compare; leave out `sequential` and `refine`.")


def _reach(*args: Any, **kwargs: Any) -> None:
    raise _Reached((args, kwargs))


def _player(output: Any) -> Callable[..., Any]:
    # Anew each time, but for the tensors: some models go on to write into the object that a part of them has returned.
    return lambda *args, **kwargs: tree_map(lambda leaf: leaf, output)


def _bound(hook: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda *args: hook(name, *args)


def _cloned(tree: Any, detach: bool = True) -> Any:
    return tree_map(lambda leaf: (leaf.detach() if detach else leaf).clone() if isinstance(leaf, Tensor) else leaf, tree)


def _holds_nan(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in tree_flatten(tree)[0])


def _same(one: Any, other: Any) -> bool:
    """Whether tensors are equal, NaN being equal to nothing; other leaves are not compared."""
    leaves, other_leaves = (tree_flatten(tree)[0] for tree in (one, other))
    if len(leaves) != len(other_leaves):
        return False
    pairs = [(a, b) for a, b in zip(leaves, other_leaves, strict=True) if isinstance(a, Tensor) or isinstance(b, Tensor)]
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)
