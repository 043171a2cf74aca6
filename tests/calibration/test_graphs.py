"""The graph of a pass takes what it may, by parts of fewer rows, which change nothing."""

from __future__ import annotations

import pytest
from support.batches import text
from support.gathering import assert_same, gather, linear_layers
from support.models import llama
from torch import Tensor, nn

from reparam_peft.calibration.graphs import tokens_within
from reparam_peft.runtime.blocks import find_blocks

TEXTS = [text([9, 9, 5, 9, 2, 9], 9), text([9, 9], 9, seed=1)]


def test_fewer_tokens_where_there_is_less_room() -> None:
    model = llama(num_hidden_layers=4)
    starts, blocks = list(linear_layers(model).values()), list(find_blocks(model).values())
    whole, by_block = (tokens_within(10**6, model, TEXTS, starts, some) for some in ((), blocks))
    assert 9 < whole < by_block < 512
    assert by_block == pytest.approx(4 * whole, rel=0.3)
    assert tokens_within(2 * 10**6, model, TEXTS, starts) == pytest.approx(2 * whole, abs=1)
    assert tokens_within(10**12, model, TEXTS, starts) == 512
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("batches", [[text([9], 9)], iter(TEXTS), [{"x": Tensor(4, 3)}], [text([600, 600], 600)], []])
def test_what_is_in_rows_already_or_cannot_be_is_not_looked_at(batches: object) -> None:
    assert tokens_within(1, nn.Linear(3, 3), batches, []) == 512


def test_statistics_do_not_depend_on_the_room() -> None:
    model = llama()
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    whole = gather(model, linear_layers, TEXTS)
    assert rows == [6, 2]
    rows.clear()
    assert_same(gather(model, linear_layers, TEXTS, room=1), whole)
    assert rows == [1] * 9, "one of them to find out what a graph takes"
    rows.clear()
    gather(model, linear_layers, TEXTS, room=1, gradients=False)
    assert rows == [6, 2], "there is no graph"
