"""The blocks of a model, and their inputs: the model's own code says what happens between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..runtime.batches import Batch
from ..runtime.modules import evaluating, input_device

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model, by name: what the model itself says must not be split, or else repeated items of module lists.

    Args:
        model: a transformers model, whose `_no_split_modules` names classes, or any other that repeats a class of modules in
            an `nn.ModuleList` or `nn.Sequential`. Blocks inside of blocks do not count.

    Raises:
        ValueError: there are none.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    found = _outermost({name: module for name, module in model.named_modules() if type(module).__name__ in named})
    if not found:
        found = _outermost(
            {
                f"{prefix}{'.' if prefix else ''}{name}": child
                for prefix, parent in model.named_modules()
                if isinstance(parent, (nn.ModuleList, nn.Sequential))
                for name, child in parent.named_children()
                if sum(type(other) is type(child) for other in parent) > 1 and any(True for _ in child.children())
            }
        )
    if not found:
        raise ValueError(
            f"a {type(model).__name__} has no blocks: it names none in `_no_split_modules`, and repeats no class of modules in "
            "an nn.ModuleList. Leave out `sequential` and `refine`, which go block by block."
        )
    return found


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in modules.items() if not any(name.startswith(f"{n}.") for n in modules)}


class _Reached(Exception):
    """A block was about to run."""

    def __init__(self, call: Call) -> None:
        self.call = call


class Replay:
    """The inputs of each block, given the outputs of the blocks before it.

    The model itself is run, with players of recorded outputs in place of its blocks, up to the block in question: masks,
    positions, embeddings, and whatever happens between blocks are those of the model's own code. Which earlier outputs a
    block's inputs depend on is found by leaving them out, with the first batch; all other outputs need not be kept.

    Args:
        model: in eval mode.
        blocks: some of its modules, by name.
        batches: keyword batches.

    Attributes:
        order: names of the blocks, in the order of the data flow.
        depends: position of a block in `order` → positions of earlier ones that its inputs depend on.
        last_use: position of a block → the last position that depends on it.

    Raises:
        ValueError: a block is never run or several times in one pass, the model does not accept a batch, or the inputs of a
            block cannot be reproduced.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], batches: Sequence[Batch]) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.order: list[str] = []
        self.depends: dict[int, set[int]] = {}
        self.changes_in_place = False  # what blocks return, for which hollow outputs need memory of their own
        self._find_dependencies()
        self.last_use = {j: max((k for k in self.depends if j in self.depends[k]), default=j) for j in range(len(self.order))}

    def inputs(self, position: int, batch: int, outputs: Mapping[int, Any]) -> Call:
        """Arguments that a block is called with.

        Args:
            position: of the block in `order`.
            batch: number of the batch.
            outputs: outputs of all earlier blocks, or `hollow` ones of those that this one does not depend on.
        """
        if self.changes_in_place:
            outputs = {j: _cloned(outputs[j]) for j in range(position)}
        with ExitStack() as stack, torch.no_grad():
            for earlier in range(position):
                stack.enter_context(_forward_as(self.blocks[self.order[earlier]], _player(outputs[earlier])))
            stack.enter_context(_forward_as(self.blocks[self.order[position]], _reach))
            stack.enter_context(_without_cache(self.model))
            try:
                self._run(batch)
            except _Reached as reached:
                return reached.call
        raise ValueError(f"{self.order[position]}: batch {batch} does not reach this block, as the first batch did.")

    def _run(self, batch: int) -> Any:
        try:
            return self.model(**send_to_device(dict(self.batches[batch]), input_device(self.model)))
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise ValueError(f"the model does not accept batch {batch} ({sorted(self.batches[batch])}): {error}") from error

    @torch.no_grad()
    def _find_dependencies(self) -> None:
        calls: list[Call] = []
        outputs: dict[int, Any] = {}

        def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self.order:
                raise ValueError(
                    f"{name}: this block runs more than once in a pass, so that it has no single place in the data flow. Leave "
                    "out `sequential` and `refine`."
                )
            self.order.append(name)
            calls.append(_cloned((args, kwargs)))

        def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[self.order.index(name)] = _cloned(output)

        with ExitStack() as stack:
            stack.enter_context(_without_cache(self.model))
            for name, block in self.blocks.items():
                hook = block.register_forward_pre_hook(_bound(before, name), with_kwargs=True)
                stack.callback(hook.remove)
                stack.callback(block.register_forward_hook(_bound(after, name)).remove)
            self._run(0)
        for name in self.blocks.keys() - set(self.order):
            raise ValueError(f"{name}: no batch reaches this block. Give batches that use it, or target none of its modules.")
        hollow = {position: hollowed(output) for position, output in outputs.items()}

        def reproduces(position: int, kept: set[int]) -> bool:
            given = {j: _cloned(outputs[j]) if j in kept else hollow[j] for j in range(position)}
            try:
                got = self.inputs(position, 0, given)
            except RuntimeError:
                self.changes_in_place = True
                got = self.inputs(position, 0, given)
            return _same(got, calls[position])

        for position in range(len(self.order)):
            everything = set(range(position))
            if reproduces(position, everything & {position - 1}):
                self.depends[position] = everything & {position - 1}
            elif reproduces(position, everything):
                self.depends[position] = {j for j in everything if not reproduces(position, everything - {j})}
            else:
                raise ValueError(
                    f"{self.order[position]}: the inputs of this block are not reproduced from the outputs of those before "
                    "it (the model computes something at random or changes its state). Leave out `sequential` and `refine`."
                )


def hollowed(tree: Any) -> Any:
    """The same shapes, full of NaN (zero where the dtype has none), in no memory."""

    def hollow(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.new_full((), torch.nan if leaf.is_floating_point() else 0).expand(leaf.shape)

    return tree_map(hollow, tree)


def main_tensor(output: Any) -> Tensor:
    """The first floating-point tensor of a block's output."""
    return next(leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _reach(*args: Any, **kwargs: Any) -> None:
    raise _Reached((args, kwargs))


def _player(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _bound(hook: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda *args: hook(name, *args)


def _cloned(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def _same(one: Any, other: Any) -> bool:
    """Whether tensors are equal, NaN being equal to nothing; other leaves are not compared."""
    ours, theirs = (tree_flatten(tree) for tree in (one, other))
    if len(ours[0]) != len(theirs[0]):
        return False
    pairs = [(a, b) for a, b in zip(ours[0], theirs[0], strict=True) if isinstance(a, Tensor) or isinstance(b, Tensor)]
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this block a module computes something else."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Within this block the model keeps no keys and values, which every replay of a block would add to."""
    configs = [module.config for module in model.modules() if getattr(getattr(module, "config", None), "use_cache", False)]
    distinct = list({id(config): config for config in configs}.values())
    for config in distinct:
        config.use_cache = False
    with evaluating(model):
        try:
            yield
        finally:
            for config in distinct:
                config.use_cache = True
