"""Choose ranks under a budget. `keep` is the fraction of a matrix's parameters that is stored."""

from __future__ import annotations

import math


def factor_parameters(rank: int, out_features: int, in_features: int) -> int:
    """Parameters that factors A (out, r) and B (r, in) hold: r (out + in).

    >>> factor_parameters(2, 10, 20)
    60
    """
    return rank * (out_features + in_features)


def uniform_rank(keep: float, out_features: int, in_features: int) -> int | None:
    """The largest rank whose factors hold at most `keep` of the matrix's parameters, or None for a matrix that stays dense.

    r = ⌊keep · out · in / (out + in)⌋, at least 1. Factors at r ≥ out · in / (out + in) would be no smaller than the matrix.
    `keep` = 1 keeps the matrix: truncating it would lose accuracy and save nothing that was asked for.

    Args:
        keep: fraction of out · in that is stored, 0 < keep ≤ 1.
        out_features: rows of the matrix.
        in_features: columns of the matrix.

    >>> uniform_rank(0.8, 576, 576)
    230
    >>> uniform_rank(1.0, 576, 1536) is None
    True
    >>> uniform_rank(0.5, 1, 10) is None
    True
    """
    if keep >= 1:
        return None
    # The correction keeps a product that is whole in exact arithmetic (0.6 · 400 / 40 = 6) from being floored to 5.
    rank = max(1, math.floor(keep * out_features * in_features / (out_features + in_features) * (1 + 1e-12)))
    return rank if saves_parameters(rank, out_features, in_features) else None


def saves_parameters(rank: int, out_features: int, in_features: int) -> bool:
    """Whether factors of this rank hold fewer parameters than the matrix.

    >>> saves_parameters(5, 10, 10), saves_parameters(4, 10, 10)
    (False, True)
    """
    return factor_parameters(rank, out_features, in_features) < out_features * in_features
