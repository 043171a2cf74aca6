"""What is refused under a budget of bytes before any work."""

from __future__ import annotations

from types import ModuleType

import pytest
from support.compressing import TEXT, planned
from support.models import llama

from reparam_peft.layers.schemes import SCHEME_OF

CHOICES = {"target_modules": "all-linear", "budget": "bytes", "keep": 0.2}


@pytest.mark.parametrize("name", ["floor", "ceiling"])
def test_bounds_of_parameters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` bounds parameters"):
        planned(llama(), TEXT, **CHOICES, **{name: 0.2})


def test_a_library_that_is_not_installed_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: object) -> ModuleType:
        raise ImportError("quantised factors need bitsandbytes")

    monkeypatch.setattr(type(SCHEME_OF[4]), "imported", missing)
    with pytest.raises(ImportError, match="need bitsandbytes"):
        planned(llama(), iter(()), **CHOICES)
