"""The factorised modules of the kinds, as modules; what they compute is tested with the kinds."""

from __future__ import annotations

import torch

from reparam_peft.layers.factorized_kinds import FactorizedLinear
from reparam_peft.numerics.decompositions import Factors


def test_set_factors_keeps_the_parameters_that_an_optimiser_holds() -> None:
    module = FactorizedLinear(5, 4, 2)
    held = list(module.parameters())
    module.set_factors(Factors(torch.ones(4, 2), torch.ones(2, 5)))
    assert all(a is b for a, b in zip(module.parameters(), held, strict=True))
