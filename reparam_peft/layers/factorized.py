"""The module of a product W ≈ A B in either form, whatever the kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.types import Device

from ..numerics.decompositions import Factors
from ..numerics.pivoting import PivotFactors, pivot
from ..numerics.storage import mask_size
from .computed_weight import ComputedWeight

Dtype: TypeAlias = torch.dtype | None
# The operator that PyTorch's compiler emits for linear layers on a CPU; None in builds without oneDNN.
SINGLE_ROW_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
MARKER = "weight"  # in checkpoints of standalone models, of one element, where a dense layer has its matrix
SINGLE_ROW_LEAST = 2**18  # parameters below which starting the operator costs more than it saves


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, which torch's types take for a tensor or a module.

    No check at run time: under FSDP it may be a plain tensor, in quantised layers a subclass, in a LoRA's layers a property.
    """
    return cast(Tensor, layer.weight)


class MatrixInShape(Protocol):
    """What knows how a kind of layer stores its matrix."""

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """W (out, in) in the `shape` of a layer's weight."""


@dataclass(frozen=True)
class Replaced:
    """The layer that a factorised module stands in place of, without a wrapper around it.

    Attributes:
        name: in the model.
        kind: of the layer.
        shape: of its weight.
    """

    name: str
    kind: MatrixInShape
    shape: torch.Size


class PivotExpansion(nn.Module):
    """z (..., r) → y (..., out) of the pivot form: y is z itself in the pivot rows and K z in the others.

    Args:
        K: maps r features to out − r; None at rank r = out.
        rank: r.
        out_features: out.
        dim: the dimension of the features, counted from the end.

    Attributes:
        mask: one bit for each output, set for pivots, packed into bytes; shape (⌈out / 8⌉,), uint8. What a checkpoint holds.
        order: the position of each output among the pivots and then the others, shape (out,); follows from `mask`.
    """

    mask: Tensor
    order: Tensor

    def __init__(self, K: nn.Module | None, rank: int, out_features: int, dim: int, device: Device) -> None:
        super().__init__()
        self.K, self.rank, self.dim = K, rank, dim
        self.register_buffer("mask", torch.zeros(mask_size(out_features), dtype=torch.uint8, device=device))
        self.register_buffer("order", torch.arange(out_features, device=device), persistent=False)
        self.is_ordered = False

    def forward(self, z: Tensor) -> Tensor:
        if not self.is_ordered:  # the mask was offloaded, and is here for this pass
            self.refresh()
        # One copy in place of two scatters: [z, K z] has the pivots first, and `order` says where each output stands in it.
        return z if self.K is None else torch.cat([z, self.K(z)], self.dim).index_select(self.dim, self.order)

    @property
    def is_pivot(self) -> Tensor:
        """Which outputs are pivots, bool, shape (out,)."""
        bits = self.mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=self.mask.device)
        return (bits & 1).bool().flatten()[: len(self.order)]

    @property
    def pivots(self) -> Tensor:
        """Indices of the pivots, ascending.

        Raises:
            ValueError: the mask does not have r bits set.
        """
        pivots = self.is_pivot.nonzero()[:, 0]
        if len(pivots) != self.rank:
            raise ValueError(f"the mask of the pivot form has {len(pivots)} bits set, and the rank is {self.rank}.")
        return pivots

    def set_pivots(self, pivots: Tensor) -> None:
        """Make the rows with these indices the pivots."""
        bits = torch.zeros(8 * mask_size(len(self.order)), dtype=torch.uint8, device=pivots.device)
        bits[pivots] = 1
        self.mask = (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)
        self.refresh()

    def refresh(self) -> None:
        """Derive `order` from `mask`; where a loader has yet to bring the mask, any order within range."""
        # Only the mask is in a checkpoint: an eighth of a byte for each row, where the order would take eight. On meta there is
        # nothing to derive it from yet. A mask that no loader has filled in has the wrong number of bits, so that positions
        # would run past the end: they are clamped, and `pivots` raises where the mask is used.
        if self.mask.device.type != "meta":
            is_pivot = self.is_pivot
            order = torch.where(is_pivot, is_pivot.cumsum(0), self.rank + (~is_pivot).cumsum(0)) - 1
            self.order = order.clamp(0, len(order) - 1)
            self.is_ordered = True

    def train(self, mode: bool = True) -> PivotExpansion:
        self.refresh()  # every loader ends with `eval()`
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()


class FactorizedModule(nn.Module):
    """B, then A: the layer of a matrix W (out, in) ≈ A B, without W.

    Args:
        B: maps the input to r features.
        expand: makes the map of r features to the number of outputs that it is given.
        rank: r.
        out_features: out.
        form: "factors", or "pivot", where A is the identity in the pivot rows (`pivoting.PivotFactors`).
        bias: whether the module has a bias of its own, in place of that of the layer.
        dim: the dimension of the features, counted from the end.
        device: of the mask and of the bias; B and what `expand` makes have theirs already.
        dtype: of the bias.

    Attributes:
        rank: r.
        A: maps r features to the output: of the class that `expand` makes, or a `PivotExpansion` of it.
        bias: shape (out,), or None.
        feature_mean: mean of B x, shape (r,), by which the bias is moved where the product is cut to a lower rank; or None.
        replaced: the layer that it stands in place of in a standalone model, whose checkpoints have `MARKER` for it; or None.
    """

    feature_mean: Tensor | None
    replaced: Replaced | None = None

    def __init__(
        self,
        B: nn.Module,
        expand: Callable[[int], nn.Module],
        rank: int,
        out_features: int,
        form: str = "factors",
        bias: bool = False,
        dim: int = -1,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        self.B, self.rank = B, rank
        self.A: nn.Module
        if form == "pivot":
            K = expand(out_features - rank) if out_features > rank else None
            self.A = PivotExpansion(K, rank, out_features, dim, device)
        else:
            self.A = expand(out_features)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("feature_mean", None)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """A (B x) + b, where b, of shape (out,), is the module's own bias if it has one, else `bias`."""
        y = self.A(self.B(x))
        bias = bias if self.bias is None else self.bias
        return y if bias is None else y + self.shaped_bias(bias).to(y.dtype)

    @property
    def form(self) -> str:
        """How the product is stored: "factors" or "pivot"."""
        return "pivot" if isinstance(self.A, PivotExpansion) else "factors"

    @property
    def pieces(self) -> dict[str, nn.Module]:
        """The layers that it consists of, without bias, under their names: B, and A or the K of the pivot form."""
        if not isinstance(self.A, PivotExpansion):
            return {"B": self.B, "A": self.A}
        return {"B": self.B} if self.A.K is None else {"B": self.B, "A.K": self.A.K}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that inputs are cast to."""
        return weight_of(self.B).dtype

    @property
    def weight(self) -> Tensor:
        """Of a standalone model, A B in the shape of the weight that it replaces, for models that read that themselves.

        While a checkpoint is loaded, it is the marker in the place of that weight.

        Raises:
            AttributeError: the module is a part of an adapter, whose layer has the weight.
        """
        marker = self._buffers.get(MARKER)
        if marker is not None:
            return marker
        if self.replaced is None:
            raise AttributeError(f"a {type(self).__name__} of an adapter has no `{MARKER}`; its layer has.")
        if torch.compiler.is_compiling():  # which leaves out what is not used
            return self._computed_weight()
        of_B = weight_of(self.B)
        return ComputedWeight.of(of_B.new_empty(()), self.replaced.shape, self._computed_weight, self.replaced.name)

    def _computed_weight(self) -> Tensor:
        if self.replaced is None:
            raise ValueError("it is not known in which shape this matrix would be stored.")
        return self.replaced.kind.weight(self.matrix(self.dtype), self.replaced.shape)

    def matrix(self, dtype: Dtype) -> Tensor:
        """A B (out, in), multiplied in float32 or wider and rounded to a dtype; computed anew at each call."""
        A, B = self.factors
        precision = torch.promote_types(A.dtype, torch.float32)
        return (A.to(precision) @ B.to(precision)).to(dtype)

    def mark(self, replaced: Replaced) -> None:
        """Have a marker in checkpoints, in place of the weight of a layer: one element, as a buffer until `unmark`."""
        self.register_buffer(MARKER, weight_of(self.B).detach().new_zeros(1))
        self.replaced = replaced

    def unmark(self) -> None:
        """Have the marker in checkpoints only, so that a model that reads the weight gets the product."""
        self._buffers.pop(MARKER, None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.replaced is not None and MARKER not in self._buffers:
            destination[prefix + MARKER] = weight_of(self.B).detach().new_zeros(1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.replaced is not None and MARKER not in self._buffers:
            state_dict.pop(prefix + MARKER, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def stored(self) -> Factors | PivotFactors:
        """The product in the form in which it is stored; views of the parameters."""
        if not isinstance(self.A, PivotExpansion):
            return self.factors
        B = self.matrix_of_B(weight_of(self.B))
        K = B.new_empty(0, len(B)) if self.A.K is None else weight_of(self.A.K).flatten(1)
        return PivotFactors(B, K, self.A.pivots)

    @property
    def factors(self) -> Factors:
        """A (out, r) and B (r, in); views of the parameters, but for the A of the pivot form."""
        B = self.matrix_of_B(weight_of(self.B))
        if not isinstance(self.A, PivotExpansion):
            return Factors(weight_of(self.A).flatten(1), B)
        if not torch.compiler.is_compiling():
            _ = self.A.pivots  # refuses a damaged mask
            if not self.A.is_ordered:
                self.A.refresh()
        identity = torch.eye(len(B), dtype=B.dtype, device=B.device)
        rows = [identity] if self.A.K is None else [identity, weight_of(self.A.K).flatten(1)]
        # By `order`, as outputs are, and not by indices of pivots, whose number a graph of PyTorch's exporter cannot know.
        return Factors(torch.cat(rows).index_select(0, self.A.order), B)

    def set_factors(self, factors: Factors | PivotFactors) -> None:
        """Make a product the parameters, in their dtype; copied only where needed. Works on meta.

        The pivot form is computed where `factors` are not in it.

        Raises:
            TypeError: `factors` are in pivot form, and the module is not.
        """
        if isinstance(self.A, PivotExpansion):
            P, K, pivots = factors if isinstance(factors, PivotFactors) else pivot(factors, dtype=self.dtype)
            self.A.set_pivots(pivots)
            _set_weight(self.B, self.matrix_of_B(P))
            if self.A.K is not None:
                _set_weight(self.A.K, K)
        elif isinstance(factors, PivotFactors):
            raise TypeError("`factors` are in pivot form, and this module stores A and B; give it `factors.factors()`.")
        else:
            _set_weight(self.B, self.matrix_of_B(factors.B))
            _set_weight(self.A, factors.A)

    def set_bias(self, bias: Tensor) -> None:
        """Make a vector (out,) the module's own bias, in its dtype. Works on meta.

        Raises:
            ValueError: the module was made without one.
        """
        if self.bias is None:
            raise ValueError("this module was made without a bias of its own; make it with `bias=True`.")
        _set(self, "bias", self.bias, bias.detach().to(self.bias.dtype))

    def refresh(self) -> None:
        """Take the mask of the pivot form that a loader has filled in.

        Raises:
            ValueError: it does not fit the rank.
        """
        if isinstance(self.A, PivotExpansion):
            self.A.refresh()
            if not self.A.mask.is_meta:
                _ = self.A.pivots

    def shaped_bias(self, bias: Tensor) -> Tensor:
        """A bias in a shape that is added to the output."""
        return bias

    def matrix_of_B(self, weight: Tensor) -> Tensor:
        """B (r, in) of the weight of the child `B`, and the other way round."""
        return weight.flatten(1)


def _set_weight(layer: nn.Module, matrix: Tensor) -> None:
    """Make a matrix, in the shape of the weight, the weight of a layer."""
    weight = cast(nn.Parameter, weight_of(layer))
    _set(layer, "weight", weight, matrix.detach().reshape(weight.shape).to(weight.dtype).contiguous())


def _set(owner: nn.Module, name: str, parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter a value: on meta, where it cannot hold one, by another parameter in its place."""
    if parameter.device.type == "meta":
        setattr(owner, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    else:
        parameter.data = value  # the same parameter: an optimiser may hold it


class FactorLinear(nn.Linear):
    """An `nn.Linear` that multiplies single rows, as in decoding, by oneDNN where PyTorch's own product is slow.

    For one row PyTorch calls a matrix–vector product that runs on one core and is slow on the short rows of factors. It is
    replaced in float32 on a CPU, outside of autograd, autocast and tracing; results agree to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        if SINGLE_ROW_PRODUCT is not None and x.numel() == self.in_features and self._is_slow(x):
            return SINGLE_ROW_PRODUCT(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)

    def _is_slow(self, x: Tensor) -> bool:
        """Whether PyTorch's own product of a single row is slow, and nothing around the call needs to see it."""
        plain = type(x) is Tensor and type(self.weight) is nn.Parameter and x.device.type == "cpu" and x.dim() > 0
        return (
            plain
            and x.dtype == self.weight.dtype == torch.float32
            and self.weight.numel() >= SINGLE_ROW_LEAST
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )
