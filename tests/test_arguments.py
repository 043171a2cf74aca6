"""Checks of arguments: what passes, and what is said of what does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from reparam_peft.arguments import (
    check_bool,
    check_choice,
    check_count,
    check_int,
    check_names,
    check_number,
    check_regex,
)


@pytest.mark.parametrize(
    "check",
    [
        lambda: check_int("r", 3, "a positive int", least=1),
        lambda: check_int("seed", -3, "an int"),
        lambda: check_count("epochs", 0, least=0),
        lambda: check_number("keep", 1, 0, 1, above=True),
        lambda: check_number("floor", 0.0, 0, 1),
        lambda: check_number("floor", None, 0, 1, optional=True),
        lambda: check_choice("form", None, ("factors",), optional=True),
        lambda: check_choice("form", "factors", ("factors",)),
        lambda: check_bool("keep_base", False),
        lambda: check_names("target_modules", {"a"}),
        lambda: check_names("target_modules", "a", allows_str=True),
        lambda: check_regex("target_modules", r".*\.q"),
    ],
)
def test_what_is_right_passes(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: check_int("r", True, "an int"), TypeError, "`r` must be an int, got True."),
        (lambda: check_int("r", 1.0, "an int"), TypeError, "`r` must be an int, got 1.0."),
        (lambda: check_int("r", 0, "a positive int", 1), ValueError, "`r` must be a positive int, got 0."),
        (lambda: check_count("k", True), ValueError, "`k` must be a whole number of at least 1, got True."),
        (lambda: check_count("k", 1, 2), ValueError, "`k` must be a whole number of at least 2, got 1."),
        (lambda: check_number("keep", False, 0, 1), TypeError, "`keep` must be a number in [0, 1], got False."),
        (lambda: check_number("keep", None, 0, 1), TypeError, "`keep` must be a number in [0, 1], got None."),
        (lambda: check_number("keep", "1", 0, 1, optional=True), TypeError, "must be a number in [0, 1] or None, got '1'."),
        (lambda: check_number("keep", 0, 0, 1, above=True), ValueError, "`keep` must be in (0, 1], got 0."),
        (lambda: check_number("keep", math.nan, 0, 1), ValueError, "`keep` must be in [0, 1], got nan."),
        (lambda: check_choice("form", None, ("a", "b")), ValueError, "`form` must be one of 'a', 'b', got None."),
        (lambda: check_bool("keep_base", 1), TypeError, "`keep_base` must be True or False, got 1."),
        (lambda: check_names("m", "a"), TypeError, "`m` must be a list of module names, got 'a'."),
        (
            lambda: check_names("m", ["a", ""], allows_str=True),
            TypeError,
            "must be a str or list of module names, got ['a', ''].",
        ),
        (lambda: check_regex("m", "("), ValueError, "`m` holds '(', which is not a valid regular expression: missing )"),
    ],
)
def test_what_is_wrong_is_told(check: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        check()
    assert message in str(caught.value)
