"""Groups of options that commands share: a parameter of a command whose type is a dataclass stands for its fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it: every option a parameter of its own, in the order in which groups and options are declared.

    Fields of a group may be groups again. The command itself gets the groups.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Size:
    ...     width: int
    ...     height: int = 2
    >>> def draw(name: str, size: Size) -> None:
    ...     print(name, size)
    >>> list(inspect.signature(spread(draw)).parameters)
    ['name', 'width', 'height']
    >>> spread(draw)(name="a", width=1, height=3)
    a Size(width=1, height=3)
    """
    options = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in _options(command)]

    @functools.wraps(command)
    def call(**values: Any) -> None:
        command(**_arguments(command, values))

    # typer looks at both: at the signature for names and defaults, at the annotations for types.
    vars(call)["__signature__"] = inspect.Signature(options)
    call.__annotations__ = {option.name: option.annotation for option in options}
    return call


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a command, or the fields of a group, with annotations that are no longer text."""
    return list(inspect.signature(function, eval_str=True).parameters.values())


def _is_group(parameter: inspect.Parameter) -> bool:
    return isinstance(parameter.annotation, type) and dataclasses.is_dataclass(parameter.annotation)


def _options(function: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    """What typer is to know of: a command's parameters, and the fields of its groups in place of these."""
    for parameter in _parameters(function):
        if _is_group(parameter):
            yield from _options(parameter.annotation)
        else:
            yield parameter


def _arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command or of a group, made of the values of all options by name."""
    return {
        parameter.name: parameter.annotation(**_arguments(parameter.annotation, values))
        if _is_group(parameter)
        else values[parameter.name]
        for parameter in _parameters(function)
    }
