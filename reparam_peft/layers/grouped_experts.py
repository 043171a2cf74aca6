"""The experts of a layer computed together: by grouped products of their stacked factors, in place of a loop over experts.

Factors stay parameters of their own, each with its rank. For each pass those of the experts that are computed are copied into
one tensor, filled up with zeros to the largest rank and number of neurons, and `torch.nn.functional.grouped_mm` multiplies the
rows of all experts by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .calling import is_seen
from .factor_linear import FactorLinear
from .factorized import FactorizedModule, weight_of
from .factorized_kinds import FactorizedLinear
from .pivot_expansion import PivotExpansion
from .wrapper import Wrapper

# Where one call for many experts can win. On a CPU it has no kernel for all of them but a loop of its own, while the copies
# alone take as long as the products of few rows: slower in every case that was measured (`tests/benchmarks/expert_speed.py`).
DEVICES = frozenset({"cuda"})
LOOPS = (None, "eager")  # transformers' names of ways to compute that go from expert to expert
# Bytes of an expert's parameters beyond which copies take longer than products of one expert after the other: on an H200 it was
# 1.3 to 2.2 times as fast together at 9 MiB, and 0.5 to 0.9 times at 336 (`tests/benchmarks/expert_speed.py`). Nothing between
# them was measured.
LARGEST = 48 * 2**20
ALIGNED = 16  # bytes, to a multiple of which the kernels want rows of matrices to be long


class Parts(NamedTuple):
    """What an expert's layer multiplies rows x (…, in) by, and adds: A (B x) + b.

    Attributes:
        A: shape (out, r); None where B is the whole matrix.
        B: shape (r, in), or (out, in).
        bias: shape (out,), or None.
    """

    A: Tensor | None
    B: Tensor
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        """out."""
        return len(self.B if self.A is None else self.A)


def computes_together(x: Tensor, implementation: str | None) -> bool:
    """Whether experts of these rows may be computed together.

    Args:
        x: rows of a layer of experts, (tokens, hidden).
        implementation: the way that transformers computes experts in the model, its `config._experts_implementation`.
    """
    if implementation in LOOPS or x.device.type not in DEVICES or not hasattr(F, "grouped_mm"):
        return False
    # As transformers asks; the function takes part in no autocast, takes no float64, and is compiled for bfloat16 alone.
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return False
    is_able = x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0)
    return is_able and x.dtype != torch.float64 and not torch.is_autocast_enabled(x.device.type)


def parts_of(layers: Sequence[nn.Module], x: Tensor) -> list[Parts] | None:
    """What each of some layers multiplies rows like x by.

    None where one must be called itself: it has hooks, is of a class that is not known here, holds numbers in few bits, has
    several adapters active, or is of another dtype or device than the others.
    """
    parts = [_parts(layer, None) for layer in layers]
    found = [part for part in parts if part is not None]
    tensors = [tensor for part in found for tensor in part if tensor is not None]
    is_alike = all(tensor.device == x.device and tensor.dtype == tensors[0].dtype for tensor in tensors)
    return found if len(found) == len(parts) and is_alike else None


def is_small(layers: Sequence[nn.Module]) -> bool:
    """Whether the layers of one expert, which stands for the others of its parameter, are small enough to be copied."""
    return sum(parameter.nbytes for layer in layers for parameter in layer.parameters()) <= LARGEST


def _parts(layer: nn.Module, bias: Tensor | None) -> Parts | None:
    """Of one layer, where `bias` is added if it has none of its own."""
    if _is_called(layer):
        return None
    if isinstance(layer, Wrapper):
        computing = layer.computing()
        return None if computing is None else _parts(computing, getattr(layer.base_layer, "bias", None))
    if type(layer) is FactorizedLinear:
        pieces = list(layer.pieces.values())
        if layer.form == "corrected" or not all(type(piece) is FactorLinear and _is_plain(piece) for piece in pieces):
            return None
        own = bias if layer.bias is None else layer.bias
        return _of_product(layer, own)
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and _is_plain(layer):
        return Parts(None, layer.weight, bias if layer.bias is None else layer.bias)
    return None


def _of_product(module: FactorizedModule, bias: Tensor | None) -> Parts:
    expansion, B = module.A, weight_of(module.B)
    if expansion is None:
        return Parts(None, B, bias)
    if not isinstance(expansion, PivotExpansion):
        return Parts(weight_of(expansion), B, bias)
    # All rows of A, the identity among them: more products than of K alone, and no order of its own for each row of outputs.
    if not expansion.is_ordered:
        expansion.refresh()
    identity = torch.eye(len(B), dtype=B.dtype, device=B.device)
    rows = identity if expansion.K is None else torch.cat([identity, weight_of(expansion.K)])
    return Parts(rows.index_select(0, expansion.order), B, bias)


def _is_plain(layer: nn.Module) -> bool:
    """Whether nobody is to see the call of a linear layer, and its weight is a plain parameter."""
    return not _is_called(layer) and type(layer._parameters.get("weight")) is nn.Parameter


def _is_called(layer: nn.Module) -> bool:
    """Whether a call of a layer does more than its class says: hooks, also those of accelerate, in place of `forward`."""
    return is_seen(layer) or "forward" in vars(layer)


def product(x: Tensor, parts: Sequence[Parts], counts: Sequence[int]) -> Tensor:
    """The products of the rows of all experts, (rows, out): of the first `counts[0]` rows by the first of `parts`, and so on.

    All have the same number of outputs; columns of B that are fewer than those of x are filled up with zeros.
    """
    y = _in_groups(x, parts, counts)
    if any(part.bias is not None for part in parts):
        biases = torch.stack([x.new_zeros(y.shape[1]) if part.bias is None else part.bias.to(y.dtype) for part in parts])
        y = y + biases.repeat_interleave(torch.tensor(counts, device=x.device), 0, output_size=len(x))
    return y.to(x.dtype)


def _in_groups(x: Tensor, parts: Sequence[Parts], counts: Sequence[int]) -> Tensor:
    """Without biases. Matrices that are stored whole are multiplied apart from factors, whose ranks are lower."""
    whole = [part.A is None for part in parts]
    if len(set(whole)) > 1:
        rows = torch.tensor(whole, device=x.device).repeat_interleave(torch.tensor(counts, device=x.device))
        order = rows.int().argsort(stable=True)
        alike = [[i for i, is_whole in enumerate(whole) if is_whole == kind] for kind in (False, True)]
        sizes = [sum(counts[i] for i in group) for group in alike]
        made = [
            _in_groups(some, [parts[i] for i in group], [counts[i] for i in group])
            for some, group in zip(x[order].split(sizes), alike, strict=True)
        ]
        return torch.cat(made)[order.argsort()]
    outputs = parts[0].out_features
    ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
    x = x.to(parts[0].B.dtype)
    y = _multiplied(x, [part.B for part in parts], ends)
    rows_of_A = [part.A.mT for part in parts if part.A is not None]
    if rows_of_A:
        stacked = _stacked(rows_of_A, y.shape[1], _rounded(outputs, x))
        y = F.grouped_mm(y, stacked, offs=ends)
    return y[:, :outputs]


def _multiplied(x: Tensor, matrices: Sequence[Tensor], ends: Tensor) -> Tensor:
    """The products of rows x with matrices (outputs, inputs), at the end of which there may be zeros."""
    inputs = _rounded(x.shape[1], x)
    stacked = _stacked(matrices, _rounded(max(map(len, matrices)), x), inputs)
    x = x if inputs == x.shape[1] else F.pad(x, (0, inputs - x.shape[1]))
    return F.grouped_mm(x.contiguous(), stacked.mT, offs=ends)


def _rounded(size: int, x: Tensor) -> int:
    """The smallest size of rows of x's dtype that is not below this one and aligned."""
    multiple = ALIGNED // x.element_size()
    return -(-size // multiple) * multiple


def _stacked(matrices: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """Matrices as one tensor (matrices, rows, columns), with zeros below and to the right of each."""
    wide = [F.pad(M, (0, columns - M.shape[1])) if M.shape[1] < columns else M for M in matrices]
    if len(wide[0]) < rows:  # to the rows of the tallest the function below fills up
        wide[0] = F.pad(wide[0], (0, 0, 0, rows - len(wide[0])))
    return pad_sequence(wide, batch_first=True)


def with_neurons(parts: Sequence[Parts], neurons: int, layout: str) -> list[Parts]:
    """What makes the neurons of experts, with rows of zeros for those that some have lost, so that all make so many.

    Args:
        parts: of the layers that read the hidden states.
        neurons: the most that an expert has.
        layout: which rows make a neuron, as `neuron_groups.rows_of` knows them.
    """

    def widened(values: Any, rows_of_each: int) -> Any:
        """Rows, or a bias, of as many neurons."""
        if values is None:
            return None
        parted = values.unflatten(0, (2, -1)) if layout == "split" else values.unflatten(0, (1, -1))
        missing = neurons * rows_of_each // len(parted) - parted.shape[1]
        return F.pad(parted, (*(0, 0) * (parted.ndim - 2), 0, missing)).flatten(0, 1)

    each = 1 if layout == "rows" else 2
    return [
        Parts(None, widened(part.B, each), widened(part.bias, each))
        if part.A is None
        else Parts(widened(part.A, each), part.B, widened(part.bias, each))
        for part in parts
    ]
