"""Pictures of plans, searches and runs, by matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..display.axes import grid_of, heat_map, new_axes
from ..planning.plan import Plan


def plot_effective_ranks(plan: Plan, axes: Any = None) -> Any:
    """How many directions of each target count, as a fraction of all: a heat map of module kinds over depth.

    Args:
        plan: to show.
        axes: matplotlib's, to draw on; None: new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the plan was made without statistics.
    """
    _check_spectra(plan)
    fractions = {module.name: module.effective_rank / min(module.shape) for module in plan.modules}
    axes = heat_map(fractions, "effective rank / full rank", None, axes)
    axes.set_title("directions that count")
    return axes


def plot_spectra(plan: Plan, figure: Any = None) -> Any:
    """What each direction of each target is predicted to cost: for each module kind, a heat map of directions over depth.

    Directions are in the order in which they are kept. A line shows the rank that was chosen. Of more than 16 kinds the first
    16 are shown.

    Args:
        plan: to show.
        figure: matplotlib's, to draw on; None: a new one.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the plan was made without statistics.
    """
    _check_spectra(plan)
    place, kinds, depths = grid_of(module.name for module in plan.modules)
    shown = kinds[:16]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    if figure is None:
        figure = new_axes(3 * columns, 1 + 2.2 * rows).figure
        figure.clear()
    grid = figure.subplots(rows, columns, squeeze=False)
    costs = sorted(math.log10(value) for module in plan.modules for value in module.spectrum if value > 0) or [0.0]
    # Without the few that would take up most of the colours: some hundred times larger ones, and rounding.
    least, most = costs[len(costs) // 50], costs[-1 - len(costs) // 1000]
    for index, axes in enumerate(grid.flat):
        if index >= len(shown):
            axes.set_axis_off()
            continue
        modules = [module for module in plan.modules if place[module.name][0] == shown[index]]
        width = max(len(module.spectrum) for module in modules)
        cells = [[math.nan] * width for _ in depths]
        for module in modules:
            row = depths.index(place[module.name][1])
            cells[row][: len(module.spectrum)] = [math.log10(value) if value > 0 else least for value in module.spectrum]
        image = axes.imshow(cells, aspect="auto", vmin=least, vmax=most, interpolation="nearest")
        ranks = [len(module.spectrum) if module.rank is None else module.rank for module in modules]
        places = [depths.index(place[module.name][1]) for module in modules]
        axes.plot([rank - 0.5 for rank in ranks], places, color="red", linewidth=1, marker=".", markersize=3)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_title(shown[index], fontsize="small")
        step = math.ceil(len(depths) / 6)
        axes.set_yticks(range(0, len(depths), step), depths[::step])
    figure.colorbar(image, ax=grid.ravel().tolist(), label="log10 of nats per token")
    figure.supxlabel("direction; red: the rank that was chosen")
    figure.supylabel("depth")
    return figure


def plot_predictions(points: Sequence[tuple[str, float, float]], axes: Any = None) -> Any:
    """Predicted against measured increase of the loss, with the line on which the two are equal.

    Args:
        points: (label, predicted, measured), nats per token.
        axes: matplotlib's, to draw on; None: new ones. They are returned.
    """
    axes = new_axes(5, 4) if axes is None else axes
    for label in dict.fromkeys(label for label, _, _ in points):
        pairs = [(predicted, measured) for name, predicted, measured in points if name == label]
        axes.plot([predicted for predicted, _ in pairs], [measured for _, measured in pairs], "o", label=label)
    ends = [value for _, *pair in points for value in pair]
    low, high = min([0.0, *ends]), max(ends)
    axes.plot([low, high], [low, high], ":", color="gray", label="equal")
    axes.set(xlabel="predicted, nats per token", ylabel="measured, nats per token", title="increase of the loss")
    axes.legend()
    return axes


def plot_blocks(entries: Sequence[Mapping[str, Any]], axes: Any = None) -> Any:
    """Relative errors of the blocks over depth: what earlier blocks left, with the block factorised, and refined.

    Args:
        entries: lines of a run's log, as `compress` keeps them in `run_folder`.
        axes: matplotlib's, to draw on; None: new ones. They are returned.
    """
    axes = new_axes(8, 4) if axes is None else axes
    labels = {"original": "original block on the compressed stream", "before": "factorised", "after": "refined"}
    for key, label in labels.items():
        errors = [(block, entry[key]) for block, entry in enumerate(entries) if entry.get(key) is not None]
        if errors:
            axes.plot([block for block, _ in errors], [error for _, error in errors], ".-", label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="block", ylabel="relative error of its output", title="errors of the blocks")
    axes.set_ylim(bottom=0)
    axes.legend()
    return axes


def plot_angles(angles: Mapping[str, Mapping[int, float]], axes: Any = None) -> Any:
    """Mean principal angle between what neighbouring layers keep of their inputs, over depth, one line for each kind.

    Args:
        angles: module kind → depth → angle, in radians.
        axes: matplotlib's, to draw on; None: new ones. They are returned.
    """
    axes = new_axes(8, 4) if axes is None else axes
    for kind, by_depth in angles.items():
        if by_depth:
            axes.plot(list(by_depth), list(by_depth.values()), ".-", label=kind)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axhline(math.pi / 2, color="gray", linestyle=":", label="nothing shared")
    axes.set(
        xlabel="depth", ylabel="mean angle to the next layer, radians", title="kept input directions of neighbouring layers"
    )
    axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
    return axes


def plot_losses(losses: Sequence[float], axes: Any = None) -> Any:
    """The training loss of tenths of a run."""
    axes = new_axes(8, 3) if axes is None else axes
    axes.plot(range(1, len(losses) + 1), losses, ".-")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="tenth of the training", ylabel="loss", title="training")
    return axes


def _check_spectra(plan: Plan) -> None:
    if not all(module.spectrum for module in plan.modules):
        raise ValueError("the plan has no spectra, since it was made without statistics; use `allocation='loss'`.")
