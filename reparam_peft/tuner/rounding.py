"""Factors in few bits whose outputs, and not whose numbers, stay near: rounded with what calibration saw of their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..calibration.statistics import Statistics
from ..layers.factorized import PIECES, FactorizedModule, weight_of
from ..layers.product import Stored
from ..layers.schemes import Scheme
from ..numerics.decompositions import Corrected, Factors, Whole
from ..numerics.metrics import exact
from ..numerics.pivoting import PivotFactors
from ..numerics.rounding import Rounded, rounded_product
from ..standalone.quantization import linears_of


@dataclass(frozen=True)
class CalibratedRounding:
    """Rounds the matrices of factorised modules in the metric of their inputs; a `Rounding` of `standalone.quantization`.

    Where a module has a bias, it makes up for the mean error, and only the variance of the inputs counts.

    Attributes:
        statistics: of the model, by the names of its modules. Those that no batch reached are rounded to nearest, and so is
            what is beside numbers that are in few bits already.
    """

    statistics: Statistics

    def check(self, model: nn.Module) -> None:
        """Raise `ValueError`, before any work, unless the statistics hold all factorised modules, with as many inputs."""
        for name, module in model.named_modules():
            if isinstance(module, FactorizedModule):
                self.check_module(name, module)

    def check_module(self, name: str, module: FactorizedModule) -> None:
        """Raise `ValueError` unless the statistics hold this module, with as many inputs."""
        if module.coded:
            return
        if not self.statistics.is_reached(name):
            if name not in self.statistics.weight_norms:
                raise ValueError(f"{name}: `statistics` do not hold this module; gather them with the same targets.")
            return
        size = self.statistics.inputs[self.statistics.reads[name]].size
        inputs = module.matrix_of_B(weight_of(module.B)).shape[1] if module.whole is None else module.whole[1]
        if size != inputs:
            raise ValueError(f"{name}: `statistics` are of {size} inputs, and it has {inputs}; they are of another model.")

    def __call__(self, name: str, module: FactorizedModule, scheme: Scheme) -> dict[str, dict[str, Tensor]]:
        names = [part for part, _ in linears_of(module)]
        are_linear = all(isinstance(piece, nn.Linear) for piece in module.pieces.values())
        if module.coded or not self.statistics.is_reached(name) or "B" not in names or not are_linear:
            return {}
        moments = self.statistics.moments(name, centred=module.bias is not None)
        device = module.stored[0].device
        gram, mean = moments.gram.to(device), moments.mean.to(device)
        if module.columns is not None:
            gram, mean = gram[module.columns][:, module.columns], mean[module.columns]
        before, after, matrices = module.stored, *_rounded(module.stored, gram, scheme, names)
        if module.bias is not None:
            module.set_bias(exact(module.bias) + _outputs(before, mean) - _outputs(after, mean))
        module.set_factors(after)
        return {part: scheme.packed(numbers, grid) for part, (numbers, grid) in matrices.items() if grid is not None}


def _rounded(stored: Stored, gram: Tensor, scheme: Scheme, names: Sequence[str]) -> tuple[Stored, dict[str, Rounded]]:
    """A product with its matrices of these names in its module rounded, and these by their names; in float64.

    Raises:
        TypeError: it is in few bits already.
    """
    if isinstance(stored, Corrected):
        raise TypeError("a corrected matrix is stored in few bits already.")
    form = "dense" if isinstance(stored, Whole) else "pivot" if isinstance(stored, PivotFactors) else "factors"
    pieces = {matrix: piece for piece, matrix in PIECES[form].items()}
    after, matrices = rounded_product(stored, gram, {matrix: scheme.grid for matrix, piece in pieces.items() if piece in names})
    return after, {pieces[matrix]: made for matrix, made in matrices.items()}


def _outputs(stored: Stored, x: Tensor) -> Tensor:
    """What a product gives for an input x (in,), float64."""
    A, B = map(exact, stored if isinstance(stored, Factors) else stored.factors())
    return A @ (B @ x)
