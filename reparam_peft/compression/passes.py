"""Targets in groups whose statistics fit into memory together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..layers.kinds import layer_kind
from ..layers.neuron_groups import NeuronGroup
from ..runtime.blocks import block_of
from ..tuner.targets import Target


def passes_within(
    targets: Mapping[str, Target],
    max_memory: int,
    blocks: Sequence[str],
    mlps: Sequence[NeuronGroup],
    parameters: Collection[str] = (),
) -> list[list[str]]:
    """Targets in order, in groups whose statistics take at most so many bytes even where they share no inputs.

    Modules that read the neurons of an MLP come before those that make them, whose rows they choose; experts of a layer, whose
    parameters are named, are together.

    Raises:
        ValueError: those of one target, or of the targets in one block, take more.
    """
    consumers = [mlp.consumer for mlp in mlps]
    units: dict[str, list[str]] = {}
    for name in dict.fromkeys([*consumers, *targets]):
        layer = name.rpartition(".")[0]  # whose experts share statistics
        units.setdefault(block_of(name, blocks) or (layer if layer in parameters else name), []).append(name)
    passes: list[list[str]] = [[]]
    left = max_memory
    for names in units.values():
        needed = sum(_bytes_of_statistics(targets[name]) for name in names)
        if needed > max_memory:
            which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            raise ValueError(f"{which}: its statistics take {needed:,} bytes, and `max_memory` is {max_memory:,}; raise it.")
        if needed > left:
            passes.append([])
            left = max_memory
        passes[-1] += names
        left -= needed
    return passes


def _bytes_of_statistics(target: Target) -> int:
    """Two Grams of the input, or counts for a lookup, and one of the output gradients, in float64."""
    size, one_hot = target.storage.in_features, layer_kind(target.module).one_hot
    return 8 * ((size if one_hot else 2 * size**2) + target.storage.out_features**2)
