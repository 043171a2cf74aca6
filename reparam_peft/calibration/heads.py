"""The logits of a language model, which are most of what a pass holds, held back until they are wanted for some positions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.modules import forward_as


class HeldBack:
    """The last linear layer of a model, which in a pass gives zeros that take no memory, and keeps what it was to read.

    Args:
        layer: whose output is what the model returns.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._given: list[tuple[Tensor, Tensor]] = []  # inputs and what stands for logits, of the running pass

    @classmethod
    def of(cls, model: nn.Module, watched: Collection[nn.Module]) -> HeldBack | None:
        """That of a model; None where it has none, or where others watch it.

        Args:
            model: any model.
            watched: modules whose inputs and outputs are wanted.
        """
        find = getattr(model, "get_output_embeddings", None)
        try:
            layer = None if find is None else find()
        except (AttributeError, NotImplementedError):  # transformers' answer of models without one
            return None
        if type(layer) is not nn.Linear or layer in watched:
            return None
        changed = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
        return None if changed else cls(layer)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Within this block the layer computes nothing."""
        self._given.clear()

        def keep(input: Tensor) -> Tensor:
            zeros = input.new_zeros(()).expand(*input.shape[:-1], self._layer.out_features)
            self._given.append((input, zeros))
            return zeros

        with forward_as(self._layer, keep):
            yield

    @property
    def inputs(self) -> Tensor:
        """What the layer was to read, shape (…, in)."""
        return self._given[0][0]

    @property
    def ran(self) -> bool:
        """Whether the layer was called in the last pass."""
        return bool(self._given)

    def gives(self, logits: Tensor) -> bool:
        """Whether these logits are what stands for those of the layer, and nothing else was made of it."""
        return len(self._given) == 1 and logits is self._given[0][1]

    def logits(self, inputs: Tensor) -> Tensor:
        """The logits of some inputs."""
        return F.linear(inputs, self._layer.weight, self._layer.bias)

    def forget(self) -> None:
        """Release what was kept of the last pass."""
        self._given.clear()
