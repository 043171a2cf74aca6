"""What a model is made of, noted before it is changed, so that an error leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

CONTAINERS = (dict, list, set)


class Snapshot:
    """The modules of a model, their attributes, parameters, buffers and hooks, by reference: no tensor is copied.

    What is noted is kept in memory for as long as the snapshot is, also where the model has dropped it.

    Args:
        model: any model.
        beside: other objects that change along with it, such as configs.
    """

    def __init__(self, model: nn.Module, beside: Iterable[object] = ()) -> None:
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        for owner in (*model.modules(), *beside):
            held = vars(owner)
            self._attributes.append((held, dict(held)))
            contents = [(value, value.copy() if value else None) for value in held.values() if isinstance(value, CONTAINERS)]
            self._contents += contents  # most are empty: a module has a dozen dictionaries of hooks
        self._parameters = [(parameter, parameter.requires_grad, _numbers(parameter)) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back in place: the same objects hold what they held."""
        for held, before in self._attributes:
            held.clear()
            held.update(before)
        for container, before in self._contents:
            if before is None:
                if container:
                    container.clear()
            elif not _holds_the_same(container, before):
                container.clear()
                put: Callable[[Any], None] = container.extend if isinstance(container, list) else container.update
                put(before)
        for parameter, trained, numbers in self._parameters:
            if numbers is not None and parameter.data_ptr() != numbers.data_ptr():
                parameter.data = numbers
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)


def _holds_the_same(one: Any, other: Any) -> bool:
    """Whether two containers of a kind hold the same objects, in the same order where they have one."""
    if isinstance(one, set):
        return one == other

    def objects(container: Any) -> list[Any]:
        return container if isinstance(container, list) else [*container.keys(), *container.values()]

    return len(one) == len(other) and all(a is b for a, b in zip(objects(one), objects(other), strict=True))


def _numbers(parameter: nn.Parameter) -> Tensor | None:
    """What `parameter.data` is put back to; None for the parameters of other libraries, which nothing here assigns to."""
    return parameter.data if type(parameter) is nn.Parameter else None


@contextmanager
def unchanged_on_error(model: nn.Module, beside: Iterable[object] = ()) -> Iterator[None]:
    """Where this block ends with an error or is interrupted, the model is as it was before, to the very same tensors.

    Args:
        model: what the block changes; numbers within its tensors must not be written to, only replaced.
        beside: other objects whose attributes the block changes.
    """
    with ExitStack() as on_error:
        on_error.callback(Snapshot(model, beside).restore)
        yield
        on_error.pop_all()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """After this block, however it ends, the model is as it was before, to the very same tensors.

    Args:
        model: as for `unchanged_on_error`.
    """
    before = Snapshot(model)
    try:
        yield
    finally:
        before.restore()
