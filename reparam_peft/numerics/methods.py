"""The methods of factorisation: one row for each. Configs, help texts, refusals and documents read this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # help texts name methods, and are shown without PyTorch
    from torch import Tensor

    from .decompositions import Factors

    Function = Callable[[Tensor, int, Tensor | None, Tensor | None, Factors | None], Factors]

MethodName = Literal["svd", "whitened", "autoencoder"]  # the names below, for type checkers


@dataclass(frozen=True)
class Method:
    """A way to factorise a matrix.

    Attributes:
        name: by which a config asks for it.
        needs_data: whether it uses metrics, which only calibration data give.
        nested: whether the factors of a rank are the first columns of A and the first rows of B of those of a higher rank, so
            that one decomposition serves all ranks.
        source: paper and equation.
        summary: what it minimises, in a few words.
        function: (weight, rank, gram, output_gram, start) → `Factors`, as `decompositions.factorize`; gram and output_gram are
            None without data, and `start` is None or random factors to begin with, in place of the method's own start.
    """

    name: str
    needs_data: bool
    nested: bool
    source: str
    summary: str
    function: Function


def closed_form(
    weight: Tensor,
    rank: int,
    gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    start: Factors | None = None,
) -> Factors:
    """`factorize`; what begins with given factors and has nothing to train ends with them."""
    from .decompositions import factorize

    return factorize(weight, rank, gram, output_gram) if start is None else start


def by_gradient(
    weight: Tensor,
    rank: int,
    gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    start: Factors | None = None,
) -> Factors:
    """`train_autoencoder`."""
    from .autoencoder import train_autoencoder

    return train_autoencoder(weight, rank, gram, output_gram, start)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="svd",
            needs_data=False,
            nested=True,
            source="Eckart & Young 1936",
            summary="the truncated SVD: the nearest matrix",
            function=closed_form,
        ),
        Method(
            name="whitened",
            needs_data=True,
            nested=True,
            source="SVD-LLM, arXiv:2403.07378, as Swift-SVD computes it, arXiv:2604.01609; KFAC-SVD with both metrics",
            summary="the nearest outputs on the calibration data, in closed form",
            function=closed_form,
        ),
        Method(
            name="autoencoder",
            needs_data=True,
            nested=False,
            source="Baldi & Hornik 1989",
            summary="the nearest outputs on the calibration data, trained by gradient",
            function=by_gradient,
        ),
    )
}


def method_of(name: str | None) -> Method:
    """The row of a method, of a config whose method is resolved.

    Raises:
        ValueError: there is none of this name.
    """
    if name is None or name not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {name!r}.")
    return METHODS[name]


def names_of_methods(*, needs_data: bool) -> tuple[str, ...]:
    """Names of the methods that need data, or of those that need none."""
    return tuple(method.name for method in METHODS.values() if method.needs_data == needs_data)
