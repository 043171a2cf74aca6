"""Modules to whose weights a model writes as it runs, which a product cannot follow."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType

from torch import Tensor, nn

_WHEN_MADE = ("init", "reset_parameters")  # beginnings of the names of methods that run before anything is factorised
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


def written_modules(model: nn.Module) -> set[str]:
    """Names of the modules whose weight a method of the model, or of a part of it, changes in place.

    Seen in the code of the methods, as `self.gate.weight.data.clamp_(…)` or `block.value.weight.div_(…)`: whether it runs may
    depend on the mode, so that no forward pass tells.

    Args:
        model: whose parts are looked at; those of torch itself are not.
    """
    names = [name for name, _ in model.named_modules()]
    written = set()
    for part, module in model.named_modules():
        for ending in _written_by(module.__class__):
            start = f"{part}." if part else ""
            written |= {name for name in names if name.startswith(start) and f".{name}".endswith(f".{ending}")}
    return written


@cache
def _written_by(cls: type[nn.Module]) -> frozenset[str]:
    """Endings of the names of modules to whose weight the methods of a class write."""
    own = [base for base in cls.__mro__ if not base.__module__.startswith("torch.")]
    methods = [(name, inspect.unwrap(value)) for base in own for name, value in vars(base).items() if callable(value)]
    codes = (getattr(method, "__code__", None) for name, method in methods if not name.lstrip("_").startswith(_WHEN_MADE))
    return frozenset(ending for code in codes if isinstance(code, CodeType) for ending in _written_in(code))


def _written_in(code: CodeType) -> Iterator[str]:
    if "weight" not in code.co_names or not any(map(_is_in_place, code.co_names)):
        return
    path: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname not in _ATTRIBUTES:
            path = []
            continue
        if _is_in_place(instruction.argval):
            *owner, last = [part for part in path if part != "data"] or [""]
            if last == "weight" and owner:
                yield ".".join(owner)
        path.append(instruction.argval)


def _is_in_place(name: str) -> bool:
    """Whether this is a method of tensors that changes their numbers."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place and name != "requires_grad_" and callable(getattr(Tensor, name, None))
