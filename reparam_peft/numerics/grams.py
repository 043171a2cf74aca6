"""Gram matrices, added up in float64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .metrics import device_of_sums

# At most so many rows of a Gram matrix are computed at a time, of which the lower triangle is left out. Other devices than the
# processor take longer to start a small product than to compute it.
BLOCK, WIDE_BLOCK = 256, 2048
PIECE = 32  # rows of float32 that are added to float64 at a time, so that what is converted stays in the processor's cache


def wide_rows(X: Tensor, mask: Tensor | None) -> Tensor:
    """The rows that count, in float32 or wider, where they can be added up in float64."""
    X = X if mask is None else X[mask]
    return X.to(device_of_sums(X.device), torch.promote_types(X.dtype, torch.float32))


def packed_shape(size: int) -> tuple[int, int]:
    """The shape in which the n (n + 1) / 2 numbers of a symmetric matrix of this size are kept, which tells the size.

    It is the rectangular full packed format (Gustavson et al. 2010, ACM TOMS 37:18): the upper rows of the upper triangle
    where they are and, in the place that the lower triangle leaves there, what remains of the upper one, transposed.

    >>> packed_shape(4), packed_shape(5)
    ((2, 5), (3, 5))
    """
    return (size // 2, size + 1) if size % 2 == 0 else ((size + 1) // 2, size)


def packed_size(packed: Tensor) -> int:
    """n of a symmetric matrix (n, n) that is packed.

    Raises:
        ValueError: no matrix is packed into that shape.
    """
    if packed.ndim == 2:
        size = packed.shape[1] - (packed.shape[1] == 2 * packed.shape[0] + 1)
        if packed_shape(size) == tuple(packed.shape):
            return size
    raise ValueError(f"no symmetric matrix is packed into the shape {tuple(packed.shape)}")


def packed_zeros(size: int, device: torch.device) -> Tensor:
    """A packed matrix (n, n) of zeros, float64."""
    return torch.zeros(packed_shape(size), dtype=torch.float64, device=device)


def pack(matrix: Tensor) -> Tensor:
    """A symmetric matrix (n, n), packed."""
    packed = matrix.new_zeros(packed_shape(len(matrix)))
    _, half = _layout(len(matrix))
    for rows in _blocks(len(matrix), matrix.device):
        _add_block(packed, rows, matrix[rows, rows.start :] if rows.start < half else matrix[rows.start :, rows])
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The symmetric matrix (n, n) that is packed.

    >>> unpack(pack(torch.tensor([[1.0, 2.0], [2.0, 3.0]])))
    tensor([[1., 2.],
            [2., 3.]])
    """
    size = packed_size(packed)
    shift, half = _layout(size)
    matrix = packed.new_empty(size, size)
    matrix[:half] = packed[:, shift:]
    matrix[half:, half:] = packed[1 - shift :, : size - half].mT
    for rows in _blocks(size, packed.device):
        block = matrix[rows, rows]
        block.copy_(block.triu() + block.triu(1).mT)
        matrix[rows.stop :, rows] = matrix[rows, rows.stop :].mT
    return matrix


def packed_diagonal(packed: Tensor) -> Tensor:
    """The diagonal (n,) of a matrix that is packed."""
    shift, _ = _layout(packed_size(packed))
    return torch.cat([packed.diagonal(shift), packed.diagonal(shift - 1)])


def _layout(size: int) -> tuple[int, int]:
    """By how many columns the upper rows are shifted to the right, and how many they are."""
    return (size + 1) % 2, (size + 1) // 2


def block_rows(device: torch.device) -> int:
    """How many rows of a matrix of sums are computed at a time."""
    return BLOCK if device.type == "cpu" else WIDE_BLOCK


def _blocks(size: int, device: torch.device) -> Iterator[slice]:
    """The rows of a matrix in blocks of about the same height, of which none is in both halves."""
    _, half = _layout(size)
    for start, end in ((0, half), (half, size)):
        height = -(-(end - start) // max(1, -(-(end - start) // block_rows(device))))
        yield from (slice(first, min(first + height, end)) for first in range(start, end, max(1, height)))


def _add_block(packed: Tensor, rows: slice, block: Tensor) -> None:
    """Add some rows of a symmetric matrix, from the diagonal on, to one that is packed; those below the middle transposed.

    Args:
        packed: changed in place.
        rows: as of `_blocks`.
        block: shape (rows, n − first row); transposed where the rows are below the middle.
    """
    shift, half = _layout(packed_size(packed))
    count = rows.stop - rows.start
    if rows.start < half:
        _add(packed[rows, rows.start + shift : rows.stop + shift], block[:, :count].triu())
        _add(packed[rows, rows.stop + shift :], block[:, count:])
        return
    columns = slice(rows.start - half, rows.stop - half)
    first = 1 - shift
    _add(packed[columns.start + first : columns.stop + first, columns], block[:count].tril())
    _add(packed[columns.stop + first :, columns], block[count:])


def _add(total: Tensor, summand: Tensor) -> None:
    """Add to float64, in place, on the processor piece by piece."""
    rows = PIECE if total.device.type == "cpu" else max(1, len(total))
    for start in range(0, len(total), rows):
        total[start : start + rows] += summand[start : start + rows]


def add_gram(total: Tensor, X: Tensor, sums: Tensor | None = None, weights: Tensor | None = None) -> None:
    """Add Σ w x xᵀ to a packed total of an (in, in), float64, in place.

    The weights w, shape (rows,), float64, are 1 if None.

    With `sums`, Σ w x in float64, x − c is multiplied, with c near the mean, and the rest added in float64: then the rounding
    of float32 products is relative to the variance of a channel and not to its mean square.
    """
    if not len(X):
        return
    if sums is not None:
        # Σ w x xᵀ = Σ w (x − c)(x − c)ᵀ + c sᵀ + s cᵀ + (Σ w) c cᵀ with s = Σ w (x − c), for any c. With c near the mean the
        # float32 product sees small numbers only; the terms in c are float64. Without this, channels of large mean and small
        # variance, of which transformers have some, would lose their covariance in rounding.
        whole = sums.new_tensor(len(X)) if weights is None else weights.sum()
        centre = (sums / whole.clamp(min=1e-300)).to(X.dtype)
        c = centre.double()
        s = sums - whole * c  # of w (x − c), before that is rounded
        X = X - centre
    if weights is not None:
        X = X * weights.sqrt().to(X)[:, None]
    _, half = _layout(X.shape[1])
    for rows in _blocks(X.shape[1], X.device):
        some, others = X[:, rows], X[:, rows.start :]
        _add_block(total, rows, cross_product(some, others) if rows.start < half else cross_product(others, some))
        if sums is not None:
            terms = torch.outer(c[rows], whole * c[rows.start :] + s[rows.start :]) + torch.outer(s[rows], c[rows.start :])
            _add_block(total, rows, terms if rows.start < half else terms.mT)


def add_squares(total: Tensor, X: Tensor) -> None:
    """Add Σ x², the diagonal of Σ x xᵀ, to a total (in,), float64, in place; without a wider copy of the rows."""
    total += torch.linalg.vector_norm(X, dim=0, dtype=torch.float64).square()


def cross_product(Y: Tensor, X: Tensor) -> Tensor:
    """Σ y xᵀ over rows, in the dtype of the rows and at its full precision."""
    with _full_precision(X.device):
        return Y.mT @ X


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products as such: neither half precision (autocast) nor TF32 or bfloat16 in their place."""
    _precision.enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _precision.leave()


class _Precision:
    """PyTorch's settings of float32 products, which all threads share: full while any thread needs that, then as before.

    Were each thread to put back what it found, the last one could put back the full precision that another had set.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[tuple[Any, str]] = []
        self._before_of_all: str | None = None

    def enter(self) -> None:
        with self._lock:
            if not self._users:
                candidates: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
                backends = [backend for backend in candidates if hasattr(backend, "fp32_precision")]  # since PyTorch 2.9
                self._before = [(backend, backend.fp32_precision) for backend in backends]
                self._before_of_all = None if backends else torch.get_float32_matmul_precision()
            self._users += 1
            for backend, _ in self._before:
                backend.fp32_precision = "ieee"
            if self._before_of_all is not None:
                torch.set_float32_matmul_precision("highest")

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                for backend, value in self._before:
                    backend.fp32_precision = value
                if self._before_of_all is not None:
                    torch.set_float32_matmul_precision(self._before_of_all)


_precision = _Precision()
