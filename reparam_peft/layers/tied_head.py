"""A head whose weight is the table of the embedding, in one product for both ends."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TiedHead(nn.Module):
    """`nn.Linear` whose weight (tokens, features) is the table of a factorised embedding, to which it owns no tensor.

    Args:
        layer: the linear layer that it stands in place of, which loses its weight.
        table: what stands in the place of the embedding: its `transposed(x)` multiplies rows by the table's transpose.

    Attributes:
        bias: of the layer, or None.
    """

    _layer: nn.Linear
    _table: Any

    def __init__(self, layer: nn.Linear, table: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        # Not children, so that the tensors of the table have one name.
        vars(self).update(_layer=layer, _table=table, _is_hf_initialized=True)
        layer._parameters["weight"] = None

    @property
    def table(self) -> nn.Module:
        """What stands in the place of the embedding."""
        table: nn.Module = self._table
        return table

    @property
    def weight(self) -> Tensor:
        """The table, as the embedding has it.

        Raises:
            AttributeError: a checkpoint is being loaded, and the table has its marker only, by whose shape transformers would
                cut the bias.
        """
        weight: Tensor = self._table.weight
        if weight.ndim < 2:
            raise AttributeError("the table is being loaded.")
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._table.transposed(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def untied(self, weight: nn.Parameter) -> nn.Linear:
        """The linear layer again, with this weight."""
        self._layer.weight, self._layer.bias = weight, self.bias
        return self._layer.train(self.training)
