"""The factorised modules of linear layers and embeddings."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from .coded import ALL_AS_THE_MODEL, Widths, linear
from .factorized import PIECES, Dtype, FactorizedModule


class FactorizedLinear(FactorizedModule):
    """`nn.Linear` (or GPT-2's `Conv1D`) of a product: x (..., in) → A (B x) (..., out), with the features that are left.

    Args:
        in_features, out_features: that are left.
        widths: of the matrices that are in few bits, as of `Storage.widths`.
        rank, form, bias, device, dtype: as for `FactorizedModule`.
        Q: in the form "corrected", what maps the input to the output where that exists; None: made here.
        whole: (out, in) of the matrix of which rows or columns are left out; None: all are there.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        form: str = "factors",
        bias: bool = False,
        device: Device = None,
        dtype: Dtype = None,
        whole: tuple[int, int] | None = None,
        widths: Widths = ALL_AS_THE_MODEL,
        Q: nn.Module | None = None,
    ) -> None:
        def layer(piece: str, features: int, outputs: int) -> nn.Module:
            return linear(features, outputs, widths.get(PIECES[form].get(piece, "")), device, dtype)

        B = layer("B", in_features, out_features if form == "dense" else rank)
        expand = partial(layer, "A.K" if form == "pivot" else "A", rank)
        Q = layer("Q", in_features, out_features) if form == "corrected" and Q is None else Q
        super().__init__(B, expand, rank, out_features, form, bias, device=device, dtype=dtype, Q=Q)
        self.in_features, self.out_features = in_features, out_features
        if whole is not None:
            self.leave_out((out_features, in_features), whole, device)


class FactorizedEmbedding(FactorizedModule):
    """`nn.Embedding` of a product: the table's transpose W (embedding_dim, num_embeddings) is A B."""

    def __init__(
        self,
        layer: nn.Embedding,
        rank: int,
        form: str = "factors",
        bias: bool = False,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        B = nn.Embedding(
            layer.num_embeddings,
            rank,
            padding_idx=layer.padding_idx,
            scale_grad_by_freq=layer.scale_grad_by_freq,
            sparse=layer.sparse,
            device=device,
            dtype=dtype,
        )
        expand = partial(nn.Linear, rank, bias=False, device=device, dtype=dtype)
        super().__init__(B, expand, rank, layer.embedding_dim, form, bias, device=device, dtype=dtype)
        self.scale = embedding_scale(layer, B.weight.dtype)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().forward(x, bias)
        return y if self.scale == 1.0 else y * self.scale

    def transposed(self, x: Tensor) -> Tensor:
        """Bᵀ (Aᵀ x), for a head that shares the table: (…, embedding_dim) → (…, num_embeddings)."""
        A, B = self.factors
        return F.linear(F.linear(x, A.mT), B.mT)

    def matrix_of_B(self, weight: Tensor) -> Tensor:
        return weight.mT


def embedding_scale(layer: nn.Embedding, dtype: torch.dtype) -> float:
    """What an embedding multiplies its rows by: BART a number, Gemma a tensor in the table's dtype, which may be on meta."""
    scale = getattr(layer, "embed_scale", 1.0)
    if isinstance(scale, Tensor):
        scale = torch.tensor(float(getattr(layer, "scalar_embed_scale", scale)), dtype=dtype, device="cpu")
    return float(scale)
