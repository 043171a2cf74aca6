"""How much layers look at the same directions: principal angles between the inputs that their factors keep."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from .layer import ReparamLayer
from .metrics import exact
from .plotting import places_of


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between the row spaces of two matrices (r, in) and (s, in), ascending, in radians; shape (min(r, s),), float64.

    Zeros for a direction that both have; π/2 for one that is orthogonal to all of the other space.

    Raises:
        ValueError: the matrices are not of the same width.

    Source: Björck & Golub 1973; sines where cosines are inaccurate.

    >>> principal_angles(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])).item()
    0.785398163397448...
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"two matrices of the same width are needed, got {tuple(first.shape)} and {tuple(second.shape)}.")
    P, Q = (_basis(matrix) for matrix in (first, second))
    P, Q = (P, Q) if P.shape[1] >= Q.shape[1] else (Q, P)
    cosines = torch.linalg.svdvals(P.mT @ Q).clamp(max=1)
    sines = torch.linalg.svdvals(Q - P @ (P.mT @ Q)).flip(0).clamp(max=1)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def input_angles(model: nn.Module, adapter_name: str | None = None) -> dict[str, dict[int, Tensor]]:
    """Principal angles between what each layer and the next one of its kind keep of their inputs.

    Args:
        model: with an adapter of this package.
        adapter_name: which; None: the active one of each layer.

    Returns:
        Module kind → depth → angles between the layer at that depth and the next one that is factorised, as from
        `principal_angles`.

    Raises:
        ValueError: the model has no such layers.
    """
    found: dict[str, dict[int, Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ReparamLayer)}
    for name, (kind, depth) in places_of(list(layers)).items():
        module = layers[name]
        active = adapter_name or next(iter(module.active_adapters))
        if active in module.reparam_factors:
            found.setdefault(kind, {})[depth] = module.reparam_factors[active].factors.B.detach()
    if not found:
        raise ValueError("the model has no factorised layers; compress it first.")
    angles: dict[str, dict[int, Tensor]] = {}
    for kind, by_depth in found.items():
        depths = sorted(by_depth)
        pairs = [(a, b) for a, b in pairwise(depths) if by_depth[a].shape[1] == by_depth[b].shape[1]]
        angles[kind] = {a: principal_angles(by_depth[a], by_depth[b]) for a, b in pairs}
    return angles


def mean_input_angles(model: nn.Module, adapter_name: str | None = None) -> dict[str, dict[int, float]]:
    """The mean of the angles that `input_angles` gives, in radians; empty where nothing is factorised."""
    try:
        found = input_angles(model, adapter_name)
    except ValueError:
        return {}
    return {kind: {depth: float(angles.mean()) for depth, angles in by_depth.items()} for kind, by_depth in found.items()}


def _basis(matrix: Tensor) -> Tensor:
    """An orthonormal basis (in, r) of the row space."""
    left, singular, _ = torch.linalg.svd(exact(matrix).mT, full_matrices=False)
    return left[:, singular > singular.max() * max(matrix.shape) * torch.finfo(torch.float64).eps]
