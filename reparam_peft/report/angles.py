"""How much layers look at the same directions: principal angles between the inputs that their factors keep."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from ..display.axes import places_of
from ..numerics.angles import principal_angles
from ..tuner.layer import ReparamLayer


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
    kept: dict[str, dict[int, Tensor]] = {}  # kind → depth → B, whose rows span what is kept of the inputs
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ReparamLayer)}
    for name, (kind, depth) in places_of(list(layers)).items():
        layer = layers[name]
        adapter = adapter_name or next(iter(layer.active_adapters))
        if adapter in layer.reparam_factors:
            factorized = layer.factorized(adapter)
            B, columns = factorized.factors.B.detach(), factorized.columns
            if columns is not None:  # as rows of the whole matrix, in which inputs that are left out are zero
                B = B.new_zeros(len(B), layer.in_features).index_copy(1, columns, B)
            kept.setdefault(kind, {})[depth] = B
    if not kept:
        raise ValueError("the model has no factorised layers; compress it first.")
    angles: dict[str, dict[int, Tensor]] = {}
    for kind, by_depth in kept.items():
        # Neighbours whose inputs differ in width have no angles between them.
        neighbours = [(a, b) for a, b in pairwise(sorted(by_depth)) if by_depth[a].shape[1] == by_depth[b].shape[1]]
        angles[kind] = {a: principal_angles(by_depth[a], by_depth[b]) for a, b in neighbours}
    return angles


def mean_input_angles(model: nn.Module, adapter_name: str | None = None) -> dict[str, dict[int, float]]:
    """The mean of the angles that `input_angles` gives, in radians; empty where nothing is factorised."""
    try:
        all_angles = input_angles(model, adapter_name)
    except ValueError:
        return {}
    return {kind: {depth: float(angles.mean()) for depth, angles in by_depth.items()} for kind, by_depth in all_angles.items()}
