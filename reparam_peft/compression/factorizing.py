"""The product of one matrix: factorised, brought into its form, and rounded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.reparam_config import ReparamConfig
from ..layers.product import NONE, Product, Stored
from ..numerics.decompositions import (
    Directions,
    Factors,
    Whole,
    direction_losses,
    factorize,
    find_directions,
    narrowed,
    random_factors,
)
from ..numerics.methods import Method, method_of
from ..numerics.metrics import exact
from ..numerics.pivoting import pivot
from ..numerics.storage import Storage
from ..planning.ranks import is_nested
from ..tuner.matrices import base_dtype
from ..tuner.targets import Target
from .few_bits import Matrix
from .parts import Part
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

    def directions(self, W: Tensor, weighing: Weighing) -> Directions | None:
        """What serves to predict losses and to factorise: in closed form, and where both are in the same metrics; else None."""
        gram, fisher = weighing.gram, weighing.fisher
        alike = weighing.input is gram and weighing.output is fisher and self.method.nested and not self.from_random
        return find_directions(W, gram, fisher) if alike and fisher is not None else None

    def losses(self, W: Tensor, weighing: Weighing, directions: Directions | None = None) -> Tensor:
        """What each direction is predicted to cost, in nats per token, shape (min(out, in),).

        Args:
            W: the matrix (out, in).
            weighing: what errors are weighed by.
            directions: of W, where they are known.
        """
        if weighing.fisher is None:
            raise ValueError("losses are predicted by gradients, which these statistics do not hold.")
        if directions is None:
            q = direction_losses(W, weighing.gram, weighing.fisher, weighing.input, weighing.output)
        else:
            q = directions.losses
        q = q * weighing.loss_scale
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
        directions: Directions | None = None,
    ) -> Product:
        """The product of a matrix.

        Args:
            W: the matrix (out, in), in `dtype` or wider.
            rank: of the product.
            dtype: that the product is stored in.
            weighing: what errors are weighed by.
            output_mean: mean of the outputs (out,), float64, that the bias is to preserve; None where it is not moved.
            storage: how it is stored: its form, and the bits of its numbers.
            directions: of W, where they are known.
        """
        wide = W.to(torch.promote_types(W.dtype, torch.float32))  # rounded once, at the end
        form, scales = storage.form_at(rank), NONE
        factors: Stored
        if widths := storage.widths(rank):
            stored, scales = self.matrix(W, weighing, directions).made(rank, storage)
            dtypes = {name: torch.float32 if name in widths else dtype for name in storage.matrices(rank)}
            matrices = {name: getattr(stored, name).to(W.device, each).contiguous() for name, each in dtypes.items()}
            if not all(matrix.isfinite().all() for matrix in matrices.values()):
                raise ValueError(f"its numbers overflow {dtype}; scale the weight down, or convert it to a wider dtype.")
            factors = stored._replace(**matrices)
        elif form == "dense":
            factors = Whole(wide.to(dtype).contiguous())
        else:
            start = random_factors(wide, rank) if self.from_random else None
            wide_factors = self._factors(wide, rank, weighing, directions, start)
            factors = pivot(wide_factors, weighing.input, dtype) if form == "pivot" else narrowed(wide_factors, dtype)
        if output_mean is None:
            return Product(factors, scales=scales)
        A, B = map(exact, factors if isinstance(factors, Factors) else factors.factors())
        features = B @ weighing.mean.to(B.device)
        bias = (output_mean - A @ features).to(W.device, dtype)
        return Product(factors, bias, features.to(W.device, dtype) if self.nested else None, scales=scales)

    def product_of_part(
        self,
        part: Part,
        target: Target,
        W: Tensor,
        weighing: Weighing,
        output_mean: Tensor | None,
        directions: Directions | None = None,
    ) -> Product:
        """The product of what is left of a target's matrix.

        Args:
            part: what is left.
            target: with its rank and storage.
            W: what is left of the matrix.
            weighing: of what is left.
            output_mean: mean of the outputs that are left, that the bias is to preserve; None where it is not moved.
            directions: of the whole matrix, where they are known.
        """
        if target.rank is None:
            raise ValueError("a target that stays dense has no product.")
        known = directions if part.is_whole else None
        dtype = base_dtype(target.module)
        made = self.product(W, target.rank, dtype, weighing, output_mean, target.storage, known)
        return made._replace(rows=part.rows, columns=part.columns)

    def matrix(self, W: Tensor, weighing: Weighing, directions: Directions | None = None) -> Matrix:
        """A matrix, to be stored in few bits; with its directions, where they are known."""
        known = directions

        def factors(matrix: Tensor, rank: int) -> Factors:
            nonlocal known
            if known is None:  # those of W, rounded to its dtype, as planning finds them: then products have the same bits
                known = self.directions(W, weighing)
            return self._factors(matrix, rank, weighing, known, None)

        return Matrix(W, weighing, factors, self.method.nested)

    def _factors(
        self, W: Tensor, rank: int, weighing: Weighing, directions: Directions | None, start: Factors | None
    ) -> Factors:
        """Factors by the method, of which known directions spare most of the work."""
        if directions is not None:
            return factorize(W, rank, weighing.input, weighing.output, directions)
        return self.method.function(W, rank, weighing.input, weighing.output, start)
