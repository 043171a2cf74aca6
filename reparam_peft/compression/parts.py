"""What is left of the matrices of an MLP that loses neurons."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..blockwise.anchoring import Expansion
from ..layers.neuron_groups import NeuronGroup, rows_of
from ..numerics.metrics import device_of_sums, exact
from ..numerics.neurons import refitted, regressed
from ..numerics.storage import Storage
from .weighing import Weighing


@dataclass(frozen=True)
class Part:
    """What is left of a matrix.

    Attributes:
        rows: indices of its rows, ascending; None: all.
        columns: indices of its columns, ascending; None: all.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all of the matrix is left."""
        return self.rows is None and self.columns is None

    def matrix(self, W: Tensor, gram: Tensor) -> Tensor:
        """The rows that are left of W (out, in), or its columns refitted to the inputs that are left, of Gram matrix G."""
        if self.columns is not None:
            return refitted(W, gram, self.columns).to(W.device, torch.promote_types(W.dtype, torch.float32))
        return W if self.rows is None else W[self.rows.to(W.device)]

    def expansion(self, gram: Tensor, mean: Tensor | None) -> Expansion | None:
        """The best estimate of all inputs from those S that are left, with M = C_GS C_SS⁻¹ of the others G; None: all are left.

        Args:
            gram: C of all inputs, shape (in, in); about the mean where there is one.
            mean: of all inputs, shape (in,), where a bias is moved; else None.
        """
        if self.columns is None:
            return None
        C, kept = exact(gram), self.columns.to(device_of_sums(gram.device))
        is_gone = torch.ones(len(C), dtype=torch.bool, device=kept.device)
        is_gone[kept] = False
        gone = is_gone.nonzero()[:, 0]
        matrix = regressed(C.index_select(0, gone).index_select(1, kept), C, kept)
        if mean is None:
            return Expansion(kept, gone, matrix, matrix.new_zeros(len(gone)))
        mean = mean.to(matrix)
        return Expansion(kept, gone, matrix, mean[gone] - matrix @ mean[kept])

    def of_outputs(self, vector: Tensor) -> Tensor:
        """What is left of a vector (out,)."""
        return vector if self.rows is None else vector[self.rows.to(vector.device)]

    def weighing(self, whole: Weighing) -> Weighing:
        """What errors of it are weighed by."""

        def cut(metric: Tensor, indices: Tensor | None) -> Tensor:
            if indices is None:
                return metric
            indices = indices.to(metric.device)
            return metric[indices] if metric.ndim == 1 else metric.index_select(0, indices).index_select(1, indices)

        gram = cut(whole.gram, self.columns)
        fisher = None if whole.fisher is None else cut(whole.fisher, self.rows)
        return replace(
            whole,
            # The very same tensors where the metrics are those that losses are predicted in.
            input=gram if whole.input is whole.gram else None if whole.input is None else cut(whole.input, self.columns),
            output=fisher if whole.output is whole.fisher else None if whole.output is None else cut(whole.output, self.rows),
            gram=gram,
            fisher=fisher,
            mean=whole.mean if self.columns is None else whole.mean[self.columns.to(whole.mean.device)],
        )


def parts(group: NeuronGroup, kept: Tensor) -> dict[str, Part]:
    """What is left of each matrix of an MLP, by module."""
    rows = {name: Part(rows=rows_of(layout, kept, group.neurons)) for name, layout in group.producers}
    return {**rows, group.consumer: Part(columns=kept)}


def narrow(storage: Storage, size: tuple[int, int]) -> Storage:
    """What a product takes of what is left of a matrix, `size` (out, in)."""
    return replace(storage, out_features=size[0], in_features=size[1], whole=storage.whole_shape)
