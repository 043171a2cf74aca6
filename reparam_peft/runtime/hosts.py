"""Methods and functions of the libraries around us, extended where they have no place to plug in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

EXTENDED = "__extended_by_reparam__"


def extend(owner: type | ModuleType, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of a class, or a function of a module, by what `make` returns of it; nothing where that was done before.

    Args:
        owner: whose own method it is, or class method or function.
        name: of the method.
        make: takes the method as a function of `self` (or of the class), and returns one of the same arguments.
    """
    defined = vars(owner)[name]
    is_class_method = isinstance(defined, classmethod)
    original = defined.__func__ if is_class_method else defined
    if getattr(original, EXTENDED, False):
        return
    extended = wraps(original)(make(original))
    setattr(extended, EXTENDED, True)
    setattr(owner, name, classmethod(extended) if is_class_method else extended)
