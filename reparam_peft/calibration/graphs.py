"""How many tokens go through a model at a time, where the graph of a pass may take so many bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..runtime.batches import REFUSALS, parts_of_tokens
from ..runtime.modules import input_device, without_cache
from .recorder import Recorder
from .statistics import Statistics

# Tokens of a pass, by the kind of device: as few as keep it busy, since the graph of a pass takes as much memory for each.
TOKENS_AT_A_TIME = {"cpu": 512}
MOST_TOKENS = 4096  # on all others


def tokens_at_a_time(device: torch.device) -> int:
    """So many as keep a device busy."""
    return TOKENS_AT_A_TIME.get(device.type, MOST_TOKENS)


def tokens_within(
    room: int, model: nn.Module, batches: Any, starts: Collection[nn.Module], blocks: Collection[nn.Module] = ()
) -> int:
    """The tokens whose graph takes at most so many bytes, by that of the first row, and that keep the device busy.

    Args:
        room: bytes.
        model: as it is calibrated.
        batches: of which the first is looked at, where they are in a list, and it can be run in parts of its rows.
        starts: modules from whose outputs on gradients flow, and whose inputs are kept.
        blocks: modules of the model that are run one at a time; none: the whole model is.
    """
    most = tokens_at_a_time(input_device(model))
    first = batches[0] if isinstance(batches, Sequence) and batches else None
    if not isinstance(first, Mapping):
        return most
    rows = parts_of_tokens(first, 1)
    if len(rows) == len(parts_of_tokens(first, most)):  # which are run one at a time
        return most
    try:
        of_row = _bytes_of_graph(model, rows[0], starts, blocks)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS:  # the passes themselves will tell
        return most
    return min(most, room * rows[0]["input_ids"].numel() // max(1, of_row))


@torch.enable_grad()
def _bytes_of_graph(
    model: nn.Module, batch: Mapping[str, Any], starts: Collection[nn.Module], blocks: Collection[nn.Module]
) -> int:
    """What the graph of a pass holds, or that of the block that holds most; no more than that is held here."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    held: dict[int, Tensor] = {}
    most = [0]

    def hold(tensor: Tensor) -> None:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in owned:
            held[storage] = tensor

    def hold_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values())[:1]:
            if isinstance(value, Tensor):
                hold(value)

    def count(*of_hook: Any) -> None:
        most[0] = max(most[0], sum(tensor.untyped_storage().nbytes() for tensor in held.values()))
        held.clear()

    recorder = Recorder(Statistics(seed=0), {}, gradients=True)
    with ExitStack() as stack:
        stack.enter_context(saved_tensors_hooks(hold, lambda nothing: nothing))
        stack.enter_context(recorder.hooks(model, set(starts)))
        for start in starts:
            stack.callback(start.register_forward_pre_hook(hold_input, with_kwargs=True).remove)
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(lambda *of_hook: held.clear()).remove)
            stack.callback(block.register_forward_hook(count).remove)
        model(**without_cache(model, send_to_device(dict(batch), input_device(model))))
    if not blocks:
        count()
    return most[0]
