"""Products of matrices without data: factorised, brought into a form, and rounded to the nearest numbers in few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..numerics.decompositions import Corrected, Factors, Whole, factorize
from ..numerics.metrics import exact
from ..numerics.pivoting import pivot
from .coded import ALL_AS_THE_MODEL, Widths
from .product import Product, Stored
from .schemes import SCHEME_OF

Factorize: TypeAlias = Callable[[Tensor, int], Factors]


def nearest_product(
    matrix: Tensor, rank: int, form: str, widths: Widths = ALL_AS_THE_MODEL, function: Factorize | None = None
) -> Product:
    """The product of a matrix in a form, without a bias.

    In the form "corrected" Q is the matrix rounded to the nearest numbers, and A B a product for W − Q (LQER, Zhang et al.
    2024, arXiv:2402.02446). A matrix that is in few bits already is Q itself; then A is zero, so that A B is, too, and B random
    as in LoRA (Hu et al. 2021, arXiv:2106.09685), from torch's global generator: singular vectors of zero would be r of the
    inputs or outputs alone.

    Args:
        matrix: W, shape (out, in), in the dtype that numbers of the product are given in.
        rank: r.
        form: "factors", "pivot", "dense" or "corrected".
        widths: bits of the matrices that are to be in few bits, by name.
        function: makes factors of a rank of a matrix; None: the truncated SVD.
    """
    # Factors that are rounded before they are converted would be rounded again after it.
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    made = function or factorize
    stored: Stored
    if form == "dense":
        stored = Whole(matrix.detach().clone(memory_format=torch.contiguous_format))
    elif form == "corrected":
        if "Q" in widths:
            A, B = made(wide - nearest(wide, widths["Q"])[0].to(wide), rank)
        else:
            A, B = wide.new_zeros(len(wide), rank), torch.randn_like(wide[:1].expand(rank, -1)) / wide.shape[1] ** 0.5
        stored = Corrected(matrix.detach(), A.to(matrix.dtype), B.to(matrix.dtype))
    elif form == "pivot":
        stored = pivot(made(wide, rank), dtype=matrix.dtype)
    else:
        stored = made(matrix, rank)
    rounded = {name: nearest(getattr(stored, name), bits) for name, bits in widths.items()}
    numbers = {name: number.float() for name, (number, _) in rounded.items()}
    return Product(stored._replace(**numbers), scales={name: scales for name, (_, scales) in rounded.items()})


def nearest(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) with each number rounded to the nearest there is, float64; and the scales of these numbers."""
    W, scheme = exact(matrix), SCHEME_OF[bits]
    grid = scheme.grid(W)
    return grid.nearest(W), scheme.scales_of(grid)
