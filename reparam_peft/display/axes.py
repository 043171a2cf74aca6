"""Axes and heat maps, by matplotlib, imported only when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def place_of(name: str) -> tuple[str, int]:
    """What kind of module a name is of, and at which depth: what is left of the name without its first number, and that.

    >>> place_of("model.layers.12.self_attn.q_proj"), place_of("lm_head")
    (('self_attn.q_proj', 12), ('lm_head', 0))
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return (name, 0) if number is None else (".".join(parts[number + 1 :]) or name, int(parts[number]))


def places_of(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Kind and depth of each module, by `place_of`; kinds with what is before the number, where two modules had one place.

    >>> places_of(["encoder.0.q", "decoder.0.q"])
    {'encoder.0.q': ('encoder.q', 0), 'decoder.0.q': ('decoder.q', 0)}
    """
    places = {name: place_of(name) for name in names}
    if len(set(places.values())) < len(places):
        for name, (kind, depth) in places.items():
            before = name.removesuffix(kind).rstrip(".").removesuffix(str(depth)).rstrip(".")
            places[name] = (f"{before}.{kind}".lstrip("."), depth)
    return places


def grid_of(names: Iterable[str]) -> tuple[dict[str, tuple[str, int]], list[str], list[int]]:
    """The place of each module, by `places_of`; all kinds, in the order of the names; and all depths, ascending."""
    places = places_of(list(names))
    return places, list(dict.fromkeys(kind for kind, _ in places.values())), sorted({depth for _, depth in places.values()})


def heat_map(values: Mapping[str, float], label: str, most: float | None = None, axes: Any = None) -> Any:
    """A heat map of numbers of modules, their kinds over their depth, from 0 on.

    Args:
        values: name of a module → number. The name says kind and depth, as for `places_of`.
        label: of the colours.
        most: the number of the last colour; None: the largest of the values.
        axes: matplotlib's, to draw on; None: new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    places, kinds, depths = grid_of(values)
    cells = [[math.nan] * len(depths) for _ in kinds]
    for name, value in values.items():
        kind, depth = places[name]
        cells[kinds.index(kind)][depths.index(depth)] = value
    axes = new_axes(2 + 0.3 * len(depths), 1.5 + 0.35 * len(kinds)) if axes is None else axes
    image = axes.imshow(cells, aspect="auto", vmin=0.0, vmax=most)
    axes.set(xlabel="depth", yticks=range(len(kinds)), yticklabels=kinds)
    step = math.ceil(len(depths) / 16)
    axes.set_xticks(range(0, len(depths), step), depths[::step])
    axes.figure.colorbar(image, ax=axes, label=label)
    return axes


def new_axes(width: float = 6.4, height: float = 4.8) -> Any:
    """Axes on a new figure of pyplot's, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'reparam_peft[plot]'") from error
    _, axes = pyplot.subplots(figsize=(max(6.4, width), max(2.4, height)), layout="constrained")
    return axes
