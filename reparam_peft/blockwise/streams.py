"""What flows through the blocks of a model: in the original, and in the compressed part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..runtime.modules import input_device, replaced
from .activations import Activations
from .blocks import Call, Replay, hollowed, main_tensor


class Stream:
    """The outputs of a model's blocks so far, and with them the inputs of the next block, for each batch.

    A later block depends on few of the earlier outputs. Of the others only shapes are kept, as hollow tensors: the model's own
    code between the blocks still runs on them, and what it makes of their NaN reaches no input that counts.

    Args:
        name: of the stream, for messages and for the keys in `store`.
        replay: of the model.
        store: where outputs are kept.
        outside: modules that stand in place of the model's own outside of the blocks, by name; may grow.
        device: where blocks are computed; None: where the model is.
    """

    def __init__(
        self,
        name: str,
        replay: Replay,
        store: Activations,
        outside: Mapping[str, nn.Module],
        device: str | torch.device | None,
    ) -> None:
        self.name, self.replay, self.store, self.outside, self.device = name, replay, store, outside, device
        self.home = input_device(replay.model)
        self.hollow: dict[tuple[int, int], Any] = {}

    @property
    def batches(self) -> range:
        """Numbers of the batches."""
        return range(len(self.replay.batches))

    def call(self, position: int, batch: int, played: Mapping[int, Any] | None = None) -> Call:
        """What the block at a position is called with.

        Args:
            position: of the block.
            batch: number of the batch.
            played: outputs of the blocks that this one depends on, to which gradients flow; None: those that are kept.
        """
        given = {j: self.output(j, batch) for j in self.replay.depends[position]} if played is None else played
        outputs = {j: given[j] if j in given else self.hollow[j, batch] for j in range(position)}
        with replaced(self.replay.model, self.outside):
            call = self.replay.inputs(position, batch, outputs, gradients=played is not None)
        return call if self.device is None else send_to_device(call, self.device)

    def output(self, position: int, batch: int) -> Any:
        """What the block at a position has made."""
        return send_to_device(self.store.get((self.name, position, batch)), self.home)

    def main(self, position: int, batch: int) -> Tensor:
        """The main tensor of what the block at a position has made, where it is kept."""
        return main_tensor(self.store.get((self.name, position, batch)))

    def put(self, position: int, block: nn.Module) -> None:
        """Run a block, which is the model's own or stands in its place, on all batches, and keep what it makes.

        Raises:
            ValueError: its output holds NaN or inf.
        """
        for batch in self.batches:
            with torch.no_grad():
                args, kwargs = self.call(position, batch)
                output = block(*args, **kwargs)
            if not torch.isfinite(main_tensor(output)).all():
                raise ValueError(f"the output of the {self.name} block holds NaN or infinite values in batch {batch}.")
            self.store.put((self.name, position, batch), send_to_device(output, torch.device("cpu")))
            self.hollow[position, batch] = send_to_device(hollowed(output), self.home)

    def forget(self, position: int) -> None:
        """Drop outputs that no block after a position depends on."""
        for earlier, last in self.replay.last_use.items():
            if earlier <= position and last <= position:
                for batch in self.batches:
                    self.store.drop((self.name, earlier, batch))
