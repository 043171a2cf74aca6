"""Sums over the rows that a module saw. Records of them add up: over batches, processes, and runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import is_int, is_number
from ..numerics.grams import add_gram, add_squares, packed_diagonal, packed_shape, packed_size, packed_zeros, unpack

if TYPE_CHECKING:
    from typing_extensions import Self

# Second moments of gradients at an output are kept whole where they take at most so many bytes, or at most so many times what
# the weight takes in float32, which is where there are no more than 8 outputs for each input, as in all MLPs. Of what is wider,
# such as heads over a vocabulary, the diagonal is kept: the squares of a matrix of low rank would be most of the memory, and
# there the gradients of different outputs are nearly uncorrelated, E[diag(p) − p pᵀ] of probabilities p.
WHOLE_BYTES = 2**30
WHOLE_TIMES_WEIGHT = 8


@dataclass(eq=False)
class Sums:
    """A record whose fields are sums: numbers, float64 tensors, other such records, and None where nothing was added up.

    Gram matrices are kept packed, as by `numerics.grams.pack`: half of them.
    """

    def __add__(self, other: Self) -> Self:
        """The sums over the rows of both, on this one's devices; neither is changed."""
        return replace(self, **{f.name: _added(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors with their names, those of a record within this one as `weighted.gram`."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Sums):
                yield from ((f"{field.name}.{name}", tensor) for name, tensor in value.tensors())
            elif isinstance(value, Tensor):
                yield field.name, value

    def check(self) -> None:
        """Raise `ValueError` unless counts are counts, and tensors finite, float64, and of shapes that fit each other."""
        for name, tensor in self.tensors():
            if tensor.dtype != torch.float64 or not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds other than finite float64 numbers")


@dataclass(eq=False)
class WeightedSums(Sums):
    """Sums over the rows x (in,) of an input, weighed by the gradients h (in,) there.

    Attributes:
        weight: Σ |h|².
        gram: Σ |h|² x xᵀ of (in, in), packed, float64.
        sum: Σ |h|² x, shape (in,), float64.
    """

    weight: float
    gram: Tensor
    sum: Tensor

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> WeightedSums:
        """Sums over no rows of an input of this size."""
        return cls(0.0, packed_zeros(size, device), _zeros(device, size))

    def check(self) -> None:
        super().check()
        if not is_number(self.weight) or not 0 <= self.weight < math.inf:
            raise ValueError(f"the weight is {self.weight!r}")
        _check_shape("weighted gram", self.gram, packed_shape(len(self.sum)))


@dataclass(eq=False)
class InputSums(Sums):
    """Sums over the rows x (in,) of an input, padding left out.

    Attributes:
        rows: their number.
        gram: Σ x xᵀ of (in, in), packed, float64; for embeddings, whose rows are one-hot, its diagonal (in,).
        sum: Σ x, shape (in,), float64.
        weighted: the same sums weighed by gradients; None for inputs that no gradient reaches, such as those of the first
            layers, and for embeddings.
    """

    rows: int
    gram: Tensor
    sum: Tensor
    weighted: WeightedSums | None = None

    @classmethod
    def zeros(cls, size: int, device: torch.device, one_hot: bool) -> InputSums:
        """Sums over no rows of an input of this size."""
        return cls(0, _zeros(device, size) if one_hot else packed_zeros(size, device), _zeros(device, size))

    @property
    def size(self) -> int:
        """in."""
        return len(self.sum)

    def matrix(self) -> Tensor:
        """Σ x xᵀ, shape (in, in), or its diagonal (in,) for embeddings: a copy."""
        return unpack(self.gram) if self.gram.ndim == 2 else self.gram.clone()

    def check(self) -> None:
        super().check()
        if not is_int(self.rows) or self.rows < 1:
            raise ValueError(f"the number of rows is {self.rows!r}")
        _check_shape("sum", self.sum, (self.size,))
        _check_shape("gram", self.gram, packed_shape(self.size) if self.gram.ndim == 2 else (self.size,))
        if self.weighted is not None:
            self.weighted.check()
            _check_shape("weighted sum", self.weighted.sum, (self.size,))


@dataclass(eq=False)
class OutputSums(Sums):
    """Sums over the gradients g (out,) at the output of a module, as rows, and the inputs x (in,) that they belong to.

    Attributes:
        rows: number of gradients, padding left out.
        gram: Σ g gᵀ of (out, out), packed, float64; of very wide outputs (`output_shape`) its diagonal (out,).
        energies: Σ |x|² |g|² and Σ |x|², shape (2,), float64.
        gradient_tokens: labels sampled from the model in the passes that the gradients are of, one for each position that
            predicts: not the number of rows for a module that sees other rows, such as an expert or a pooler.
    """

    rows: int
    gram: Tensor
    energies: Tensor
    gradient_tokens: int = 0

    @classmethod
    def zeros(cls, out_features: int, in_features: int, device: torch.device) -> OutputSums:
        """Sums over no gradients at the output of a module whose matrix is (out, in)."""
        return cls(0, _zeros(device, *output_shape(out_features, in_features)), _zeros(device, 2))

    def __add__(self, other: OutputSums) -> OutputSums:
        if self.gram.ndim == other.gram.ndim:
            return super().__add__(other)
        return replace(self, gram=self.diagonal()) + replace(other, gram=other.diagonal())

    @property
    def size(self) -> int:
        """out."""
        return len(self.gram) if self.gram.ndim == 1 else packed_size(self.gram)

    def add(self, Y: Tensor) -> None:
        """Add gradients (rows, out), in float32 or wider, to `gram` and `rows`, in place."""
        (add_squares if self.gram.ndim == 1 else add_gram)(self.gram, Y)
        self.rows += len(Y)

    def matrix(self) -> Tensor:
        """Σ g gᵀ, shape (out, out), or its diagonal (out,) where only that is kept: a copy."""
        return self.gram.clone() if self.gram.ndim == 1 else unpack(self.gram)

    def diagonal(self) -> Tensor:
        """Σ g², shape (out,)."""
        return self.gram if self.gram.ndim == 1 else packed_diagonal(self.gram)

    def check(self) -> None:
        super().check()
        for count in (self.rows, self.gradient_tokens):
            if not is_int(count) or count < 0:
                raise ValueError(f"the number of gradients or labels is {count!r}")
        _check_shape("gram", self.gram, packed_shape(self.size) if self.gram.ndim == 2 else (self.size,))
        _check_shape("energies", self.energies, (2,))


def output_shape(out_features: int, in_features: int) -> tuple[int, ...]:
    """In which shape second moments of the gradients at the output of a matrix (out, in) are kept: packed, or their diagonal.

    >>> output_shape(4096, 16), output_shape(30522, 768), output_shape(53248, 16384)
    ((2048, 4097), (30522,), (26624, 53249))
    """
    packed = packed_shape(out_features)
    whole = 8 * math.prod(packed)
    return packed if whole <= max(WHOLE_BYTES, WHOLE_TIMES_WEIGHT * 4 * out_features * in_features) else (out_features,)


def _added(one: Any, two: Any) -> Any:
    if one is None or two is None:
        return two if one is None else one
    return one + two.to(one.device) if isinstance(one, Tensor) else one + two


def _zeros(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} and not {shape}")
