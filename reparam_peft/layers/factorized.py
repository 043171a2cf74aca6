"""The module of a product W ≈ A B in any form, whatever the kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.types import Device

from ..numerics.decompositions import Corrected, Factors, Whole
from ..numerics.pivoting import PivotFactors, pivot
from ..numerics.storage import mask_size
from .base_codes import BaseCodes
from .calling import call
from .coded import CodedLinear, Widths
from .computed_weight import ComputedWeight, Replaced
from .dequantizing import dequantized_matrix, quant_state
from .masks import packed, spread, unpacked
from .pivot_expansion import PivotExpansion
from .product import NONE, Stored

Dtype: TypeAlias = torch.dtype | None
# What the layers of a factorised module have, by their names in it, in each form: matrices as `numerics.storage` calls them.
PIECES = {
    "factors": {"B": "B", "A": "A"},
    "pivot": {"B": "P", "A.K": "K"},
    "dense": {"B": "W"},
    "corrected": {"Q": "Q", "B": "B", "A": "A"},
}
MARKER = "weight"  # in checkpoints of standalone models, of one element, where a dense layer has its matrix
NESTED = (
    "factorised layers take no nested tensors, which nn.TransformerEncoder makes of padded ones outside of training. Make it "
    "with `enable_nested_tensor=False`."
)


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, which torch's types take for a tensor or a module.

    No check at run time: under FSDP it may be a plain tensor, in quantised layers a subclass, in a LoRA's layers a property.
    """
    return cast(Tensor, layer.weight)


def numbers_of(layer: nn.Module) -> Tensor:
    """The numbers of a factor's weight, dequantised where they are in few bits: in float32 or wider, which loses nothing."""
    if isinstance(layer, BaseCodes):
        return layer.matrix()
    if isinstance(layer, CodedLinear):
        return layer.matrix(torch.promote_types(layer.dtype, torch.float32))
    weight = weight_of(layer)
    in_few_bits = not weight.is_floating_point() or type(weight).__module__.startswith("torchao.")
    return dequantized_matrix(layer) if in_few_bits else weight


class FactorizedModule(nn.Module):
    """B, then A: the layer of a matrix W (out, in) ≈ A B, without W.

    Where rows or columns of W were left out (`leave_out`), it is the layer of what is left, with fewer outputs or inputs. An
    index says which these are; it plays no part in computing.

    A matrix in few bits that is corrected is one more layer, whose outputs are added: Q x + A (B x).

    Args:
        B: maps the input to r features.
        expand: makes the map of r features to the number of outputs that it is given.
        rank: r.
        out_features: out.
        form: "factors"; "pivot", where A is the identity in the pivot rows (`pivoting.PivotFactors`); "dense", where B is the
            matrix itself, and r = min(out, in); or "corrected".
        bias: whether the module has a bias of its own, in place of that of the layer.
        dim: the dimension of the features, counted from the end.
        device: of the mask and of the bias; B and what `expand` makes have theirs already.
        dtype: of the bias.
        Q: in the form "corrected", maps the input to the output; else None.

    Attributes:
        rank: r.
        A: maps r features to the output: of the class that `expand` makes, or a `PivotExpansion` of it; or None.
        bias: shape (out,), or None.
        feature_mean: mean of B x, shape (r,), by which the bias is moved where the product is cut to a lower rank; or None.
        whole: (out, in) of the matrix of which rows or columns were left out; None where all are there.
        size: (out, in) of what is left of it; None where all are there.
        kept_rows: one bit for each row of the whole matrix, set where it is left, packed into bytes, uint8; None: all are.
        kept_columns: the same of columns.
        replaced: the layer that it stands in place of in a standalone model, whose checkpoints have `MARKER` for it; or None.
    """

    feature_mean: Tensor | None
    kept_rows: Tensor | None
    kept_columns: Tensor | None
    whole: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
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
        Q: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (form == "corrected") != (Q is not None):
            raise ValueError(f"`Q` is a part of the form 'corrected' and of no other, got {form!r} and {Q!r}.")
        if Q is not None:
            self.Q = Q
        self.B, self.rank = B, rank
        self.A: nn.Module | None
        if form == "dense":
            self.A = None
        elif form == "pivot":
            K = expand(out_features - rank) if out_features > rank else None
            self.A = PivotExpansion(K, rank, out_features, dim, device)
        else:
            self.A = expand(out_features)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        for name in ("feature_mean", "kept_rows", "kept_columns"):
            self.register_buffer(name, None)

    def leave_out(self, size: tuple[int, int], whole: tuple[int, int], device: Device) -> None:
        """Have an index of the rows and columns, so many, that are left of a whole matrix; yet to be filled in."""
        self.size, self.whole = size, whole
        for name, (_, features) in self._index.items():
            setattr(self, name, torch.zeros(mask_size(features), dtype=torch.uint8, device=device))

    @property
    def _index(self) -> dict[str, tuple[int, int]]:
        """How many rows or columns are left, and there were, by the name of the buffer that says which."""
        if self.size is None or self.whole is None:
            return {}
        counts = zip(self.size, self.whole, strict=True)
        return {
            name: (left, features)
            for name, (left, features) in zip(("kept_rows", "kept_columns"), counts, strict=True)
            if left < features
        }

    @property
    def masks(self) -> dict[str, tuple[int, int]]:
        """The masks in its state dict: how many bits of each are set, out of how many."""
        pivots = {"A.mask": (self.rank, len(self.A.order))} if isinstance(self.A, PivotExpansion) else {}
        return pivots | self._index

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """A (B x) + b, where b, of shape (out,), is the module's own bias if it has one, else `bias`."""
        if x.is_nested:
            raise ValueError(NESTED)
        B, A = cast(nn.Module, self._modules["B"]), self._modules.get("A")  # to look attributes up would take ten times as long
        y = call(B, x)
        y = y if A is None else call(A, y)
        Q = self._modules.get("Q")
        y = y if Q is None else call(Q, x) + y
        bias = bias if self.bias is None else self.bias
        return y if bias is None else y + self.shaped_bias(bias).to(y.dtype)

    @property
    def form(self) -> str:
        """How the product is stored: "factors", "pivot", "dense" or "corrected"."""
        if self.A is None:
            return "dense"
        if "Q" in self._modules:
            return "corrected"
        return "pivot" if isinstance(self.A, PivotExpansion) else "factors"

    @property
    def pieces(self) -> dict[str, nn.Module]:
        """The layers that it consists of, without bias, under their names: B, and A or the K of the pivot form if any; Q."""
        modules = {"Q": self._modules.get("Q"), "B": self.B, "A": self.A}
        if isinstance(self.A, PivotExpansion):
            modules = {"B": self.B, "A.K": self.A.K}
        return {name: module for name, module in modules.items() if module is not None}

    @property
    def coded(self) -> dict[str, CodedLinear]:
        """Those of the pieces whose numbers are stored in few bits, by the same names."""
        return {name: piece for name, piece in self.pieces.items() if isinstance(piece, CodedLinear)}

    @property
    def widths(self) -> Widths:
        """The bits of the matrices that are stored in few bits, by name, as of `Storage.widths`."""
        return {PIECES[self.form][name]: piece.bits for name, piece in self.coded.items()}

    @property
    def scales(self) -> dict[str, Tensor]:
        """The scales of these matrices, as of `Product.scales`."""
        return {PIECES[self.form][name]: piece.scales for name, piece in self.coded.items()}

    @property
    def filled_in(self) -> list[Tensor]:
        """What a loader fills in, and is NaN before: parameters, and scales of numbers in few bits."""
        return [*self.parameters(), *self.scales.values()]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that inputs are cast to."""
        weight: Any = weight_of(cast(nn.Module, self._modules["B"]))
        if weight.is_floating_point():
            return weight.dtype
        if isinstance(self.B, CodedLinear):  # others may train in a wider dtype than that of the model around it
            weights = [weight_of(piece) for piece in self.pieces.values() if not isinstance(piece, CodedLinear)]
            return weights[0].dtype if weights else self.B.dtype
        return quant_state(self._modules["B"]).dtype

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
        placeholder = torch.empty((), dtype=self.dtype, device=weight_of(self.B).device)
        return ComputedWeight.of(placeholder, self.replaced.shape, self._computed_weight, self.replaced.name)

    def _computed_weight(self) -> Tensor:
        if self.replaced is None:
            raise ValueError("it is not known in which shape this matrix would be stored.")
        return self.replaced.kind.weight(self.matrix(self.dtype), self.replaced.shape)

    def matrix(self, dtype: Dtype) -> Tensor:
        """A B (out, in), or Q + A B, multiplied in float32 or wider and rounded to a dtype; computed anew at each call.

        Of the whole matrix, with zeros in the rows and columns that are left out.
        """
        if self.A is None:
            matrix = numbers_of(self.B).to(dtype)
        else:
            A, B = self._pair
            precision = torch.promote_types(A.dtype, torch.float32)
            product = A.to(precision) @ B.to(precision)
            Q = self._modules.get("Q")
            matrix = (product if Q is None else numbers_of(Q).to(precision) + product).to(dtype)
        if self.whole is None:
            return matrix
        rows, columns = self.kept_rows, self.kept_columns
        matrix = matrix if rows is None else spread(matrix, unpacked(rows, self.whole[0]))
        return matrix if columns is None else spread(matrix, unpacked(columns, self.whole[1]), 1)

    def whole_bias(self) -> Tensor | None:
        """The module's own bias, of all rows of the whole matrix: zero in those that are left out; None without one."""
        if self.bias is None or self.whole is None or self.kept_rows is None:
            return self.bias
        return spread(self.bias, unpacked(self.kept_rows, self.whole[0]))

    def mark(self, replaced: Replaced) -> None:
        """Have a marker in checkpoints, in place of the weight of a layer: one element, as a buffer until `unmark`."""
        self.register_buffer(MARKER, torch.zeros(1, dtype=self.dtype, device=weight_of(self.B).device))
        self.replaced = replaced

    def unmark(self) -> None:
        """Have the marker in checkpoints only, so that a model that reads the weight gets the product."""
        self._buffers.pop(MARKER, None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.replaced is not None and MARKER not in self._buffers:
            destination[prefix + MARKER] = torch.zeros(1, dtype=self.dtype, device=weight_of(self.B).device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.replaced is not None and MARKER not in self._buffers:
            state_dict.pop(prefix + MARKER, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def stored(self) -> Stored:
        """The product in the form in which it is stored, without what is left out; views of the parameters.

        Numbers in few bits are in the dtype of the module, and on the grids of `scales`.
        """
        B = self.matrix_of_B(self._as_given(self.B))
        if self.A is None:
            return Whole(B)
        if not isinstance(self.A, PivotExpansion):
            A, Q = self._as_given(self.A).flatten(1), self._modules.get("Q")
            return Factors(A, B) if Q is None else Corrected(self._as_given(Q), A, B)
        K = B.new_empty(0, len(B)) if self.A.K is None else self._as_given(self.A.K).flatten(1)
        return PivotFactors(B, K, self.A.pivots)

    def _as_given(self, piece: nn.Module) -> Tensor:
        """The numbers of a piece as `set_factors` got them."""
        return piece.matrix(self.dtype) if isinstance(piece, CodedLinear) else numbers_of(piece)

    @property
    def factors(self) -> Factors:
        """A (out, r) and B (r, in), without what is left out; views of the parameters, but for A of the pivot form and I.

        Of a corrected matrix they are of full rank; where numbers are in few bits, they are computed.
        """
        Q = self._modules.get("Q")
        return self._pair if Q is None else Corrected(numbers_of(Q), *self._pair).factors()

    @property
    def _pair(self) -> Factors:
        """A and B, whatever is beside them."""
        B = self.matrix_of_B(numbers_of(self.B))
        if self.A is None:
            return Whole(B).factors()
        if not isinstance(self.A, PivotExpansion):
            return Factors(numbers_of(self.A).flatten(1), B)
        if not torch.compiler.is_compiling():
            _ = self.A.pivots  # refuses a damaged mask
            if not self.A.is_ordered:
                self.A.refresh()
        identity = torch.eye(len(B), dtype=B.dtype, device=B.device)
        rows = [identity] if self.A.K is None else [identity, numbers_of(self.A.K).flatten(1)]
        # By `order`, as outputs are, and not by indices of pivots, whose number a graph of PyTorch's exporter cannot know.
        return Factors(torch.cat(rows).index_select(0, self.A.order), B)

    def set_factors(self, factors: Stored, scales: Mapping[str, Tensor] = NONE) -> None:
        """Make a product the parameters, in their dtype; copied only where needed. Works on meta.

        The pivot form is computed where `factors` are A and B.

        Args:
            factors: in the form of the module.
            scales: of those matrices that the module stores in few bits, whose numbers are on the grids of these scales.

        Raises:
            TypeError: `factors` are in another form than the module.
            ValueError: `scales` are of other matrices than the module has in few bits.
        """
        corrects = self.form == "corrected"
        if isinstance(factors, Corrected) != corrects or isinstance(factors, Whole) != (self.A is None):
            raise TypeError(f"`factors` are {type(factors).__name__}, and this module stores the form {self.form!r}.")
        if scales.keys() != self.widths.keys():
            raise ValueError(f"`scales` must be those of {sorted(self.widths)}, got {sorted(scales)}.")
        if isinstance(self.A, PivotExpansion) and isinstance(factors, Factors):
            factors = pivot(factors, dtype=self.dtype)
        if isinstance(factors, PivotFactors):
            if not isinstance(self.A, PivotExpansion):
                raise TypeError("`factors` are in pivot form, and this module stores A and B; give it `factors.factors()`.")
            self.A.set_pivots(factors.pivots)
        names = PIECES[self.form]
        for name, piece in self.pieces.items():
            matrix = cast(Tensor, getattr(factors, names[name]))
            if isinstance(piece, BaseCodes):
                continue
            if isinstance(piece, CodedLinear):
                piece.set_matrix(matrix, scales[names[name]])
            else:
                _set_weight(piece, self.matrix_of_B(matrix) if name == "B" else matrix)

    @property
    def rows(self) -> Tensor | None:
        """Indices of the rows of the whole matrix that are left, int64, ascending; None: all are."""
        return self._indices("kept_rows")

    @property
    def columns(self) -> Tensor | None:
        """Indices of the columns of the whole matrix that are left, int64, ascending; None: all are."""
        return self._indices("kept_columns")

    def _indices(self, name: str) -> Tensor | None:
        mask = cast("Tensor | None", getattr(self, name))
        return None if mask is None else unpacked(mask, self._index[name][1]).nonzero()[:, 0]

    def set_kept(self, rows: Tensor | None, columns: Tensor | None) -> None:
        """Fill in which rows and columns of the whole matrix are left. Works on meta.

        Args:
            rows: their indices, ascending; None where none is left out.
            columns: likewise.

        Raises:
            ValueError: they are not as many as the module has, or not ascending indices of the whole matrix.
        """
        for name, indices in (("kept_rows", rows), ("kept_columns", columns)):
            left, features = self._index.get(name, (0, 0))
            count = 0 if indices is None else len(indices)
            if count != left:
                raise ValueError(f"`{name.removeprefix('kept_')}` must be {left or None} indices, got {count or None}.")
            if indices is None:
                continue
            if count and not (indices[0] >= 0 and indices[-1] < features and (indices.diff() > 0).all()):
                raise ValueError(f"`{name.removeprefix('kept_')}` must be ascending indices below {features}.")
            device = weight_of(self.B).device
            setattr(self, name, packed(indices if device.type == "meta" else indices.to(device), features))

    def set_bias(self, bias: Tensor) -> None:
        """Make a vector (out,) the module's own bias, in its dtype. Works on meta.

        Raises:
            ValueError: the module was made without one.
        """
        if self.bias is None:
            raise ValueError("this module was made without a bias of its own; make it with `bias=True`.")
        _set(self, "bias", self.bias, bias.detach().to(self.bias.dtype))

    def keep_first(self) -> None:
        """Have it that the first rows and columns of the whole matrix are those that are left."""
        for name, (left, features) in self._index.items():
            setattr(self, name, packed(torch.arange(left, device=weight_of(self.B).device), features))

    def refresh(self) -> None:
        """Take the masks and the numbers in few bits that a loader has filled in.

        Raises:
            ValueError: that of the pivot form does not fit the rank, or one of the index does not fit the size; or scales and
                codes of numbers in few bits are none.
        """
        for piece in self.coded.values():
            if not piece.weight.is_meta:
                piece.scheme.check(piece.tensors)
        for name, (left, features) in self._index.items():
            mask = cast(Tensor, getattr(self, name))
            if not mask.is_meta and (marked := int(unpacked(mask, features).sum())) != left:
                raise ValueError(f"the mask `{name}` has {marked} bits set, and {left} of {features} are left.")
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
