"""Whether a subclass computes as its base class does: tried on a small stand-in, which real weights need not be there for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # of the largest number in a row; float32 rounds to 1e-6
FAILURES = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError, AssertionError)


def random_tensor(*shape: int) -> Tensor:
    """Normal numbers, float32, in memory, the same at each call, whatever the default device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu", dtype=torch.float32)


def computes_as(
    layer: nn.Module,
    parameters: Mapping[str, Tensor | None],
    attributes: Mapping[str, object],
    x: Tensor,
    expected: Callable[[Tensor], Tensor],
) -> bool:
    """Whether the `forward` of a layer's class gives an expected output, in training and in evaluation.

    Args:
        layer: which is neither run nor changed.
        parameters: of the stand-in, in place of the layer's own.
        attributes: of the stand-in, such as its sizes.
        x: what it is called with.
        expected: computes what a plain layer of these parameters returns for it, shape (…, features).

    Returns:
        False also where the layer has parameters or modules that a plain one lacks, or the stand-in cannot be run.
    """
    if any(True for _ in layer.children()) or {*layer._parameters} - {*parameters}:
        return False
    stand_in = copy.copy(layer)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        vars(stand_in).update(_parameters=dict(parameters), _buffers=dict(layer._buffers))
        for name, value in attributes.items():
            held: dict[str, Any] = stand_in._buffers if name in stand_in._buffers else vars(stand_in)
            held[name] = value
        for training in (True, False):
            stand_in.training = training
            try:
                output = type(layer).forward(stand_in, x)
            except FAILURES:
                return False
            if not isinstance(output, Tensor) or not _close(output, expected(x)):
                return False
    return True


def _close(output: Tensor, expected: Tensor) -> bool:
    """Whether rows agree, each to the precision of its largest number."""
    if output.shape != expected.shape or output.device != expected.device:
        return False
    largest = expected.abs().amax(-1, keepdim=True)
    return bool(((output - expected).abs() <= TOLERANCE * largest).all())
