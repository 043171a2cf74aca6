"""The kinds of layers: for each, its matrix, its input rows and its factorised module.

A kind is one class, below or in `convolutions.py`, and one entry in `KINDS`; factorised modules of the kinds below are in
`factorized_kinds.py`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device
from transformers.pytorch_utils import Conv1D

from .alike import computes_as, random_tensor
from .base_codes import BaseCodes
from .coded import ALL_AS_THE_MODEL, Widths
from .convolutions import ConvKind, GroupedConvKind, TransposedConvKind
from .dequantizing import dequantized_matrix, holds_codes, quant_state
from .factorized import Dtype, weight_of
from .factorized_kinds import FactorizedEmbedding, FactorizedLinear, embedding_scale
from .kind import LayerKind


class LinearKind(LayerKind[Any]):
    """`nn.Linear`: the weight is the matrix.

    The kinds derived from it are of classes that share what they compute, and no base class: hence `Any`.
    """

    layer_class: type[nn.Module] = nn.Linear
    linear = has_positions = True
    sides = ("out_features", "in_features")  # attributes that hold the shape of the matrix

    @property
    def name(self) -> str:
        return nn.Linear.__name__

    def tried_alike(self, layer: Any) -> bool:
        out_features, in_features = 5, 7
        weight = self.weight(random_tensor(out_features, in_features), torch.Size())
        bias = None if getattr(layer, "bias", None) is None else random_tensor(out_features)
        # Numbers of several sizes, so that one that is clipped is found.
        x = random_tensor(1, 4, in_features) * torch.tensor([[1e-3], [1.0], [30.0], [1e3]], device="cpu")
        attributes = dict(zip(self.sides, (out_features, in_features), strict=True))
        parameters = {"weight": weight, "bias": bias}
        return computes_as(layer, parameters, attributes, x, lambda x: F.linear(x, self.matrix(weight), bias))

    def shape(self, layer: Any) -> tuple[int, int]:
        out_features, in_features = (int(getattr(layer, side)) for side in self.sides)  # some models have tensors there
        return out_features, in_features

    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.contiguous()

    def rows(self, layer: Any, inputs: Tensor) -> Tensor:
        return inputs.reshape(-1, inputs.shape[-1])

    def factorized(
        self,
        layer: Any,
        rank: int,
        form: str = "factors",
        bias: bool = False,
        size: tuple[int, int] | None = None,
        device: Device = None,
        dtype: Dtype = None,
        widths: Widths = ALL_AS_THE_MODEL,
    ) -> FactorizedLinear:
        self.check_size(layer, size)
        out_features, in_features = self.shape(layer) if size is None else size
        whole = None if size is None else self.shape(layer)
        Q = self.own_codes(layer) if form == "corrected" and "Q" not in widths else None
        return FactorizedLinear(in_features, out_features, rank, form, bias, device, dtype, whole, widths, Q)

    def own_codes(self, layer: Any) -> BaseCodes | None:
        """The layer as the matrix that is corrected, where that has arrived in few bits."""
        return None


class QuantizedLinearKind(LinearKind):
    """A linear layer of bitsandbytes, torchao or HQQ. Its weight is dequantised whenever it is read."""

    def fits(self, layer: nn.Module) -> bool:
        if hasattr(layer, "W_q") or not isinstance(layer, nn.Linear):
            return hasattr(layer, "W_q")
        weight = layer._parameters.get("weight")
        quantized = type(weight).__name__ in ("Params4bit", "Int8Params") or type(weight).__module__.startswith("torchao.")
        return quantized or holds_codes(layer)

    def check(self, layer: nn.Module) -> None:
        """Anything that PEFT can dequantise will do."""

    def dtype(self, layer: Any) -> torch.dtype:
        if hasattr(layer, "W_q"):
            return layer.compute_dtype
        state = quant_state(layer)
        # On a CPU bitsandbytes may have turned the scales, not the model, to bfloat16.
        dtype = layer.weight.dtype if state is None else getattr(state, "original_dtype", state.dtype)
        return dtype if dtype.is_floating_point else getattr(layer, "dtype_around", torch.get_default_dtype())

    def own_codes(self, layer: Any) -> BaseCodes:
        return BaseCodes(layer, self)

    def own_matrix(self, layer: Any) -> Tensor:
        if hasattr(layer, "state"):  # 8 bits, which PEFT's function leaves in a state that does not compute
            largest = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # of each row
            return (layer.weight.detach() * (largest / 127)[:, None]).to(self.dtype(layer))
        self.put_in_order(layer)
        return dequantized_matrix(layer).to(self.dtype(layer))

    def put_in_order(self, layer: Any) -> None:
        """Undo the faster order in which bitsandbytes keeps numbers in 4 bits on some CPUs, in place.

        Scales that bitsandbytes itself has brought into a wrong order, by two such passes with a state dict between, stay so.

        Raises:
            ValueError: the numbers are in that order, and their scales are not.
        """
        state = quant_state(layer)
        if state is None:
            return
        in_rows = layer.weight.shape == (state.shape[0], state.shape[1] // 2) and state.shape[1] > 2
        if in_rows and not getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "its numbers in 4 bits are in the order of bitsandbytes for CPUs, and its `quant_state` does not know of it: "
                "they were put into a copy of their layer; load the model anew."
            )
        if getattr(state, "packing_format_for_cpu", False):
            layer.weight.quant_state = state  # where bitsandbytes looks for it; others may have replaced the weight
            layer.state_dict()
            state = layer.weight.quant_state
        # bitsandbytes brings back the order of the numbers whenever a state dict is made, but not of their scales.
        if state.absmax.ndim > 1:
            state.absmax = state.absmax.T.flatten().float()

    def shell(self, layer: Any) -> nn.Linear:
        """A plain layer with the bias, and with NaN in place of W, which takes no memory."""
        out_features, in_features = self.shape(layer)
        shell = nn.Linear(in_features, out_features, bias=False, device="meta")
        # One number, expanded: the weight has the shape, dtype and device that models ask for, and strides of 0, so that it
        # takes no memory. It is NaN lest anything computes with it unnoticed; on meta it would look like one yet to be loaded.
        nothing = torch.full((), torch.nan, dtype=self.dtype(layer), device=next(layer.parameters()).device)
        shell.weight = nn.Parameter(nothing.expand(out_features, in_features), requires_grad=False)
        shell.bias = layer.bias
        return shell.train(layer.training)


class Conv1DKind(LinearKind):
    """transformers' `Conv1D`: a linear layer whose weight is stored transposed, (in, out)."""

    layer_class = Conv1D
    sides = ("nf", "nx")

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.mT.contiguous()


class EmbeddingKind(LayerKind[nn.Embedding]):
    """`nn.Embedding`: the transposed table (embedding_dim, num_embeddings), the input as one-hot rows."""

    layer_class = nn.Embedding
    one_hot = has_positions = True

    def tried_alike(self, layer: nn.Embedding) -> bool:
        """A subclass that only multiplies by a constant, as Gemma's, is a plain embedding with a scale."""
        rows = 8 + (layer.padding_idx or 0)
        weight, ids = random_tensor(rows, 7), torch.tensor([[0, 3, rows - 1, 3]], device="cpu")
        scale = embedding_scale(layer, weight.dtype)
        attributes: dict[str, object] = {"num_embeddings": rows, "embedding_dim": 7}
        if isinstance(getattr(layer, "embed_scale", None), Tensor):
            attributes["embed_scale"] = torch.tensor(scale, device="cpu")  # the layer's own may be on meta
        parameters = {"weight": weight}
        takes_numbers = computes_as(layer, parameters, attributes, random_tensor(4, rows), lambda x: x @ weight)
        return not takes_numbers and computes_as(layer, parameters, attributes, ids, lambda x: F.embedding(x, weight) * scale)

    def check(self, layer: nn.Embedding) -> None:
        super().check(layer)
        if layer.max_norm is not None:
            raise ValueError(
                f"`max_norm` of an Embedding must be None, got {layer.max_norm}: it rescales rows of the table, which factors "
                "do not have; leave it out with `exclude_modules`."
            )

    def shape(self, layer: nn.Embedding) -> tuple[int, int]:
        return layer.embedding_dim, layer.num_embeddings

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.mT.contiguous()

    def rows(self, layer: nn.Embedding, inputs: Tensor) -> Tensor:
        return F.one_hot(inputs.flatten(), layer.num_embeddings).to(layer.weight.dtype)

    def gradient_rows(self, layer: nn.Embedding, gradients: Tensor) -> Tensor:
        return super().gradient_rows(layer, gradients) * embedding_scale(layer, gradients.dtype)

    def row_counts(self, layer: nn.Embedding, inputs: Tensor) -> Tensor:
        return torch.bincount(inputs.flatten(), minlength=layer.num_embeddings)

    def factorized(
        self,
        layer: nn.Embedding,
        rank: int,
        form: str = "factors",
        bias: bool = False,
        size: tuple[int, int] | None = None,
        device: Device = None,
        dtype: Dtype = None,
        widths: Widths = ALL_AS_THE_MODEL,
    ) -> FactorizedEmbedding:
        self.check_size(layer, size)
        return FactorizedEmbedding(layer, rank, form, bias, device=device, dtype=dtype)


QUANTIZED = QuantizedLinearKind()
# The first that fits counts: quantised layers are subclasses of `nn.Linear`.
KINDS: tuple[LayerKind[Any], ...] = (
    *(QUANTIZED, LinearKind(), Conv1DKind(), EmbeddingKind()),
    *(kind(layer_class) for kind in (GroupedConvKind, ConvKind) for layer_class in (nn.Conv1d, nn.Conv2d)),
    TransposedConvKind(),
)


def layer_kind(layer: nn.Module) -> LayerKind[Any]:
    """The kind of a layer, checked: a layer for which this returns can be factorised.

    Raises:
        TypeError: no kind fits, or the layer is a variant that computes or stores something else.
        ValueError: an option of the layer (groups, max_norm) rules it out.

    >>> layer_kind(nn.Linear(3, 2)).shape(nn.Linear(3, 2))
    (2, 3)
    """
    for kind in KINDS:
        if kind.fits(layer):
            kind.check(layer)
            return kind
    supported = ", ".join(dict.fromkeys(kind.layer_class.__name__ for kind in KINDS))
    raise TypeError(
        f"a {type(layer).__name__} cannot be factorised, only {supported} can; choose other `target_modules`, or leave it out "
        "with `exclude_modules`."
    )


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight has to be dequantised to be read."""
    return QUANTIZED.fits(layer)


def stored_weight(layer: nn.Module) -> Tensor:
    """The numbers of a layer's weight as they are stored, quantised or not."""
    return cast(Tensor, layer.W_q) if hasattr(layer, "W_q") else weight_of(layer)
