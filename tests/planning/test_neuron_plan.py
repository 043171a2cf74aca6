from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from reparam_peft.layers.neuron_groups import NeuronGroup, Producer
from reparam_peft.planning.neuron_plan import NeuronPlan, read_neuron_plan

PLANNED = NeuronPlan(NeuronGroup((Producer("gate_up", "split"),), "down", 8), 6, 0.25)


def test_it_is_read_as_it_was_written() -> None:
    assert read_neuron_plan(asdict(PLANNED)) == PLANNED
    assert PLANNED.sizes({"gate_up": (16, 4), "down": (4, 8)}) == {"gate_up": (12, 4), "down": (4, 6)}


def no_producers(fields: dict[str, Any]) -> None:
    fields["group"]["producers"] = []


def unknown_layout(fields: dict[str, Any]) -> None:
    fields["group"]["producers"] = [["gate_up", "columns"]]


def all_kept(fields: dict[str, Any]) -> None:
    fields["kept"] = 8


def no_number(fields: dict[str, Any]) -> None:
    fields["predicted_loss"] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_producers, "`producers` must be names"),
        (unknown_layout, "`producers` must be names"),
        (all_kept, "`kept` must be in"),
        (no_number, "`predicted_loss` must be a finite number"),
    ],
)
def test_what_is_wrong_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    fields = asdict(PLANNED)
    change(fields)
    with pytest.raises(ValueError, match=message):
        read_neuron_plan(fields)
