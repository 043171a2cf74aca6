"""Every field says what it means."""

from __future__ import annotations

import dataclasses

from peft import PeftConfig

from reparam_peft import ReparamConfig


def test_every_own_field_says_what_it_means() -> None:
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(ReparamConfig):
        if field.name not in inherited:
            assert field.metadata["help"].endswith("."), field.name
