"""Targets in groups whose statistics fit into memory together."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import convert_file_size_to_int

from ..arguments import check_int
from ..calibration.sums import output_shape
from ..layers.kinds import layer_kind
from ..layers.neuron_groups import NeuronGroup
from ..numerics.grams import packed_shape
from ..runtime.blocks import block_of
from ..runtime.memory import free_memory
from ..runtime.processes import first_of, processes
from ..tuner.targets import Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaxMemory:
    """How much statistics may take at a time.

    Attributes:
        bytes: at most so many.
        is_asked_for: whether the user named them; else a target that takes more has a pass of its own.
        by_block: when each block is in a group of its own, from the last to the first: where they do not fit together, or else.
    """

    bytes: int
    is_asked_for: bool
    by_block: Literal["never", "if needed", "always"] = "never"

    @classmethod
    def of(cls, asked_for: int | str | None, device: torch.device) -> MaxMemory:
        """What was asked for; without that, half of what is free, shared out among the processes of a run.

        All processes call this together, and have what the first of them finds.

        Args:
            asked_for: bytes, also as text such as "1GB" or "500MiB".
            device: that holds the statistics.

        Raises:
            ValueError, TypeError: no number of bytes was given.
        """
        if asked_for is None:
            world, _ = processes()
            return cls(int(first_of(free_memory(device) // 2 // world)), is_asked_for=False)
        most: Any = asked_for
        if isinstance(asked_for, str):
            try:
                most = convert_file_size_to_int(asked_for)
            except ValueError as error:
                raise ValueError(
                    f"`max_memory` must be a number of bytes, or text such as '1GB' or '500MiB', got {asked_for!r}."
                ) from error
        check_int("max_memory", most, "a positive number of bytes, text such as '1GB', or None", least=1)
        return cls(most, is_asked_for=True)


def passes_within(
    targets: Mapping[str, Target],
    max_memory: MaxMemory,
    blocks: Sequence[str],
    mlps: Sequence[NeuronGroup],
    parameters: Collection[str] = (),
) -> list[list[str]]:
    """Targets in groups whose statistics take at most so many bytes even where they share no inputs.

    They are in order, or by block in that of a backward pass: targets outside of blocks, and the blocks from the last on.

    Modules that read the neurons of an MLP come before those that make them, whose rows they choose; experts of a layer, whose
    parameters are named, are together.

    Raises:
        ValueError: those of one target, or of the targets in one block, take more than was asked for.
    """
    passes, apart = _groups(targets, max_memory, blocks, mlps, parameters)
    sizes = [bytes_of_statistics(targets, names) for names in passes]
    logger.info("Statistics of %d targets take at most %s bytes.", len(targets), f"{sum(sizes):,}")
    if len(passes) > 1 and not apart:
        logger.info(
            "%s bytes of them may be held at a time: the data are read for %d groups of targets to plan, and for %d again to "
            "factorise, where their statistics cannot wait on disk.", f"{max_memory.bytes:,}", len(passes), len(passes) - 1,
        )  # fmt: skip
    return passes


def _groups(
    targets: Mapping[str, Target],
    max_memory: MaxMemory,
    blocks: Sequence[str],
    mlps: Sequence[NeuronGroup],
    parameters: Collection[str],
) -> tuple[list[list[str]], bool]:
    """`passes_within`, and whether they are by block."""
    limit = max_memory.bytes
    consumers = [mlp.consumer for mlp in mlps]
    units: dict[str, list[str]] = {}
    for name in dict.fromkeys([*consumers, *targets]):
        layer = name.rpartition(".")[0]  # whose experts share statistics
        units.setdefault(block_of(name, blocks) or (layer if layer in parameters else name), []).append(name)
    needs = {unit: bytes_of_statistics(targets, names) for unit, names in units.items()}
    apart = {"never": False, "if needed": sum(needs.values()) > limit, "always": True}[max_memory.by_block]
    if apart:
        within = [unit for unit in units if unit in blocks]
        units = {unit: units[unit] for unit in (*(unit for unit in units if unit not in within), *reversed(within))}
    passes: list[list[str]] = [[]]
    left = limit
    for unit, names in units.items():
        needed = needs[unit]
        if needed > limit and max_memory.is_asked_for:
            which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            raise ValueError(f"{which}: its statistics take {needed:,} bytes, and `max_memory` is {limit:,}; raise it.")
        if (needed > left or (apart and unit in blocks)) and passes[-1]:
            passes.append([])
            left = limit
        passes[-1] += names
        left -= needed
    return passes, apart


def passes_by_block(
    targets: Mapping[str, Target],
    max_memory: MaxMemory,
    blocks: Sequence[str],
    mlps: Sequence[NeuronGroup],
    parameters: Collection[str] = (),
) -> list[list[str]]:
    """Targets in groups of `passes_within`, none of which lies in several blocks: those in no block, then by block.

    Args:
        blocks: names of blocks, in the order in which they are wanted.
        targets, max_memory, mlps, parameters: as for `passes_within`.
    """
    within: dict[str | None, dict[str, Target]] = {block: {} for block in (None, *blocks)}
    for name, target in targets.items():
        within[block_of(name, blocks)][name] = target
    return [
        group
        for part in within.values()
        if part
        for group in _groups(part, max_memory, [], [mlp for mlp in mlps if mlp.consumer in part], parameters)[0]
    ]


def room_beside(passes: Sequence[Sequence[str]], targets: Mapping[str, Target], max_memory: MaxMemory | None) -> int:
    """Bytes that are left beside the statistics of any group of targets; what there is to hold, where all is allowed."""
    if max_memory is None:
        return sys.maxsize
    return max(0, max_memory.bytes - max((bytes_of_statistics(targets, names) for names in passes), default=0))


def room_for_graphs(passes: Sequence[Sequence[str]], targets: Mapping[str, Target], max_memory: MaxMemory | None) -> int | None:
    """Bytes that the graph of a pass may take: half of `room_beside`, where a number was asked for; None: any."""
    if max_memory is None or not max_memory.is_asked_for:
        return None
    return room_beside(passes, targets, max_memory) // 2


def bytes_of_statistics(targets: Mapping[str, Target], names: Iterable[str] | None = None) -> int:
    """Bytes that statistics of targets take, or of those of some names, at most: where they share no inputs."""
    return sum(_bytes_of_target(targets[name]) for name in (targets if names is None else names))


def _bytes_of_target(target: Target) -> int:
    """Two Grams of the input, or counts for a lookup, and what is kept of the output gradients, in float64."""
    size, one_hot = target.storage.in_features, layer_kind(target.module).one_hot
    inputs = size if one_hot else 2 * math.prod(packed_shape(size))
    return 8 * (inputs + math.prod(output_shape(target.storage.out_features, size)))
