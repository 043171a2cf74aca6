"""The product of one matrix: factorised, brought into its form, and rounded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.reparam_config import ReparamConfig
from ..layers.product import NONE, Product, Stored
from ..numerics.decompositions import Factors, Whole, direction_losses, narrowed, random_factors
from ..numerics.methods import Method, closed_form, method_of
from ..numerics.metrics import exact
from ..numerics.pivoting import pivot
from ..numerics.storage import Storage
from ..planning.ranks import is_nested
from .few_bits import Matrix
from .weighing import Weighing


@dataclass(frozen=True)
class Factorizer:
    """Factorises matrices as a config asks.

    Attributes:
        method: row of `numerics.methods.METHODS`.
        from_random: whether factors begin as random ones in place of a decomposition.
        nested: whether products serve lower ranks too, and keep E[B x] for biases that depend on the rank.
    """

    method: Method
    from_random: bool
    nested: bool

    @classmethod
    def of(cls, config: ReparamConfig) -> Factorizer:
        """The factorizer that a config asks for, whose method is resolved."""
        return cls(method_of(config.method), from_random=not config.init_weights, nested=is_nested(config))

    def losses(self, W: Tensor, weighing: Weighing, matrix: Matrix | None = None) -> Tensor:
        """What each direction is predicted to cost, in nats per token, shape (min(out, in),).

        Args:
            W: the matrix (out, in).
            weighing: what errors are weighed by.
            matrix: what `matrix` returns of them, whose decomposition may tell it.
        """
        if weighing.fisher is None:
            raise ValueError("losses are predicted by gradients, which these statistics do not hold.")
        q = None if matrix is None else matrix.directions
        if q is None:
            q = direction_losses(W, weighing.gram, weighing.fisher, weighing.input, weighing.output) * weighing.loss_scale
        if not q.isfinite().all():
            raise ValueError(
                "what its directions cost is too large for a number; look for outliers in its weights, inputs and gradients, "
                "or leave it out with `exclude_modules`."
            )
        return q

    def product(
        self,
        W: Tensor,
        rank: int,
        dtype: torch.dtype,
        weighing: Weighing,
        output_mean: Tensor | None,
        storage: Storage,
    ) -> Product:
        """The product of a matrix.

        Args:
            W: the matrix (out, in), in `dtype` or wider.
            rank: of the product.
            dtype: that the product is stored in.
            weighing: what errors are weighed by.
            output_mean: mean of the outputs (out,), float64, that the bias is to preserve; None where it is not moved.
            storage: how it is stored: its form, and the bits of its numbers.
        """
        wide = W.to(torch.promote_types(W.dtype, torch.float32))  # rounded once, at the end
        form, scales = storage.form_at(rank), NONE
        factors: Stored
        if widths := storage.widths(rank):
            stored, scales = self.matrix(W, weighing).made(rank, storage)
            dtypes = {name: torch.float32 if name in widths else dtype for name in storage.matrices(rank)}
            matrices = {name: getattr(stored, name).to(W.device, each).contiguous() for name, each in dtypes.items()}
            if not all(matrix.isfinite().all() for matrix in matrices.values()):
                raise ValueError(f"its numbers overflow {dtype}; scale the weight down, or convert it to a wider dtype.")
            factors = stored._replace(**matrices)
        elif form == "dense":
            factors = Whole(wide.to(dtype).contiguous())
        else:
            start = random_factors(wide, rank) if self.from_random else None
            wide_factors = self.method.function(wide, rank, weighing.input, weighing.output, start)
            factors = pivot(wide_factors, weighing.input, dtype) if form == "pivot" else narrowed(wide_factors, dtype)
        if output_mean is None:
            return Product(factors, scales=scales)
        A, B = map(exact, factors if isinstance(factors, Factors) else factors.factors())
        features = B @ weighing.mean.to(B.device)
        bias = (output_mean - A @ features).to(W.device, dtype)
        return Product(factors, bias, features.to(W.device, dtype) if self.nested else None, scales=scales)

    def matrix(self, W: Tensor, weighing: Weighing) -> Matrix:
        """A matrix, to be stored in few bits."""
        is_best = self.method.function is closed_form and weighing.input is weighing.gram and weighing.output is weighing.fisher
        if is_best and weighing.fisher is not None:
            return Matrix(W, weighing)

        def factorize(matrix: Tensor, rank: int) -> Factors:
            return self.method.function(matrix, rank, weighing.input, weighing.output, None)

        return Matrix(W, weighing, factorize, self.method.nested)
