"""A stream gives each block what the model gives it, and keeps no output that nobody needs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from support.models import Skipping, skipping
from torch import Tensor, nn

from reparam_peft.blockwise.activations import Activations
from reparam_peft.blockwise.blocks import Replay
from reparam_peft.blockwise.streams import Stream
from reparam_peft.runtime.blocks import find_blocks

BATCHES = [{"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)]


@pytest.fixture
def model() -> Skipping:
    return skipping()


@pytest.fixture
def stream(model: Skipping) -> Iterator[Stream]:
    size = model.stages[0].linear.in_features
    batches = [{"x": batch["x"][:, :size]} for batch in BATCHES]
    with Activations() as store:
        yield Stream("original", Replay(model, find_blocks(model), batches), store, {}, None)


def inputs_of(model: Skipping, x: Tensor) -> list[Tensor]:
    """What each block is called with, by hooks in a pass of the model."""
    inputs: list[Tensor] = []
    hooks = [stage.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone())) for stage in model.stages]
    with torch.no_grad():
        model(x.clone())
    for hook in hooks:
        hook.remove()
    return inputs


def run(stream: Stream, blocks: list[nn.Module]) -> list[list[Tensor]]:
    """The input of each block, batch by batch, while the stream goes through all of them."""
    inputs: list[list[Tensor]] = []
    for position, block in enumerate(blocks):
        inputs.append([args[0].clone() for args, _ in (stream.call(position, batch) for batch in stream.batches)])
        stream.put(position, block)
        stream.forget(position)
    return inputs


def test_blocks_get_what_the_model_gives_them(model: Skipping, stream: Stream) -> None:
    inputs = run(stream, list(model.stages))
    for batch in stream.batches:
        expected = inputs_of(model, stream.replay.batches[batch]["x"])
        assert all(torch.equal(inputs[position][batch], x) for position, x in enumerate(expected))


def test_blocks_in_place_of_the_models_own_change_what_later_ones_see(model: Skipping, stream: Stream) -> None:
    others = [copy.deepcopy(stage) for stage in model.stages]
    with torch.no_grad():
        others[1].linear.weight.mul_(0.5)
    inputs = run(stream, others)
    changed = skipping()
    changed.stages[1] = others[1]
    for batch in stream.batches:
        expected = inputs_of(changed, stream.replay.batches[batch]["x"])
        assert all(torch.equal(inputs[position][batch], x) for position, x in enumerate(expected))


def test_outputs_are_kept_as_long_as_a_block_depends_on_them(model: Skipping, stream: Stream) -> None:
    for position, block in enumerate(model.stages):
        stream.put(position, block)
        stream.forget(position)
        needed = {j for j, last in stream.replay.last_use.items() if j <= position < last}
        assert {key[1] for key in stream.store.kept} == needed
    assert not stream.store.kept


def test_an_output_that_is_not_finite_is_told(model: Skipping, stream: Stream) -> None:
    with torch.no_grad():
        model.stages[0].linear.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the output of the original block holds NaN or infinite values in batch 0"):
        stream.put(0, model.stages[0])
