"""Gram matrices, added up in float64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .metrics import device_of_sums

BLOCK = 256  # columns of a Gram matrix that are computed at a time, of which the lower triangle is left out


def wide_rows(X: Tensor, mask: Tensor | None) -> Tensor:
    """The rows that count, in float32 or wider, where they can be added up in float64."""
    X = X if mask is None else X[mask]
    return X.to(device_of_sums(X.device), torch.promote_types(X.dtype, torch.float32))


def add_gram(total: Tensor, X: Tensor, sums: Tensor | None = None, weights: Tensor | None = None) -> None:
    """Add Σ w x xᵀ to a total (in, in), float64, in place, in the blocks on and above the diagonal.

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
    for start in range(0, len(total), BLOCK):
        rows = slice(start, start + BLOCK)
        total[rows, start:] += cross_product(X[:, rows], X[:, start:])
        if sums is not None:
            total[rows, start:] += torch.outer(c[rows], whole * c[start:] + s[start:]) + torch.outer(s[rows], c[start:])


def mirror(gram: Tensor) -> None:
    """Fill in the lower triangle of what `add_gram` added up."""
    for start in range(0, len(gram), BLOCK):
        end = start + BLOCK
        block = gram[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).mT)
        gram[end:, start:end] = gram[start:end, end:].mT


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
