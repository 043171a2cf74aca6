"""Checks of arguments, with one wording for each kind of mistake: the name, the rule, and what was given."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard


class ReparamWarning(UserWarning):
    """What this package warns of, so that the command line can show it without what other libraries warn of."""


def listed(names: Iterable[str]) -> str:
    """Names as prose has them.

    >>> listed(["svd", "whitened", "autoencoder"])
    'svd, whitened or autoencoder'
    """
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an int, and not one of the two that Python calls True and False."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is an int or a float, and no bool."""
    return is_int(value) or isinstance(value, float)


def is_finite(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number that a file can hold: no NaN, no infinity, and no int beyond 64 bits."""
    return is_number(value) and (abs(value) < 1 << 63 if is_int(value) else math.isfinite(value))


def check_int(name: str, value: object, rule: str, least: int | None = None) -> None:
    """Raise `TypeError` unless a value is an int, and `ValueError` where it is below `least`.

    >>> check_int("r", 0, "a positive int or None", least=1)
    Traceback (most recent call last):
    ValueError: `r` must be a positive int or None, got 0.
    """
    if not is_int(value):
        raise TypeError(f"`{name}` must be {rule}, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise `ValueError` unless a value is a whole number of at least `least`.

    >>> check_count("epochs", 1.5)
    Traceback (most recent call last):
    ValueError: `epochs` must be a whole number of at least 1, got 1.5.
    """
    if not is_int(value) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def check_seed(name: str, value: object) -> None:
    """Raise `ValueError` unless a value is a seed that files can hold and every generator takes.

    >>> check_seed("seed", -1)
    Traceback (most recent call last):
    ValueError: `seed` must be a whole number in [0, 2**63), got -1.
    """
    if not is_int(value) or not 0 <= value < 1 << 63:
        raise ValueError(f"`{name}` must be a whole number in [0, 2**63), got {value!r}.")


def check_number(
    name: str,
    value: object,
    least: float,
    most: float,
    *,
    above: bool = False,
    optional: bool = False,
    meaning: str = "",
) -> None:
    """Raise `TypeError` unless a value is a number, and `ValueError` unless it is in [`least`, `most`].

    Args:
        name: of the argument.
        value: what was given.
        least, most: the bounds.
        above: whether `least` itself is excluded.
        optional: whether None is allowed.
        meaning: what the number is, for the message.

    >>> check_number("keep", 1.5, 0, 1, above=True, meaning="the fraction that is stored")
    Traceback (most recent call last):
    ValueError: `keep` must be in (0, 1], the fraction that is stored, got 1.5.
    """
    if value is None and optional:
        return
    interval = f"{'(' if above else '['}{least:g}, {most:g}]"
    if not is_number(value):
        raise TypeError(f"`{name}` must be a number in {interval}{' or None' * optional}, got {value!r}.")
    if not (least < value if above else least <= value) or not value <= most:
        raise ValueError(f"`{name}` must be in {interval}{', ' * bool(meaning)}{meaning}, got {value!r}.")


def check_choice(name: str, value: object, allowed: Sequence[str], *, optional: bool = False) -> None:
    """Raise `ValueError` unless a value is one of those that are allowed.

    >>> check_choice("form", "table", ("factors", "pivot"), optional=True)
    Traceback (most recent call last):
    ValueError: `form` must be one of 'factors', 'pivot' or None, got 'table'.
    """
    if not (value in allowed or (value is None and optional)):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}{' or None' * optional}, got {value!r}.")


def check_bool(name: str, value: object) -> None:
    """Raise `TypeError` unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def check_names(name: str, value: Any, *, allows_str: bool = False) -> None:
    """Raise `TypeError` unless a value is a list, tuple or set of names, none empty; or one str where that is allowed."""
    if allows_str and isinstance(value, str):
        return
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) and item for item in value):
        raise TypeError(f"`{name}` must be a {'str or ' * allows_str}list of module names, got {value!r}.")


def check_text(name: str, value: object) -> None:
    """Raise `ValueError` unless a value is text of one line that any terminal shows as it is.

    >>> check_text("name", "fc\\x1b[31m")
    Traceback (most recent call last):
    ValueError: `name` must be text that can be printed, got 'fc\\x1b[31m'.
    """
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"`{name}` must be text that can be printed, got {value!r}.")


def check_regex(name: str, pattern: str) -> None:
    """Raise `ValueError` where `re` would fail later, inside PEFT's matching."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"`{name}` holds {pattern!r}, which is not a valid regular expression: {error}.") from error
