"""Pictures of plans, searches and runs, by matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .planning import ModulePlan, Plan
    from .searching import SearchResult


def plot_plan(plan: Plan, axes: Any = None) -> Any:
    """What is kept of each target: a heat map of module kinds over depth. Dense matrices are marked.

    Args:
        plan: to show.
        axes: matplotlib's, to draw on; None: new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes = _heat_map(plan, lambda module: module.stored_parameters / module.dense_parameters, "stored / dense", 1.0, axes)
    places, kinds, depths = _grid(plan.modules)
    for module in plan.modules:
        if module.rank is None:
            kind, depth = places[module.name]
            axes.text(depths.index(depth), kinds.index(kind), "×", ha="center", va="center", color="black")
    axes.set_title(f"keep = {plan.keep:g}; × stays dense")
    return axes


def plot_effective_ranks(plan: Plan, axes: Any = None) -> Any:
    """How many directions of each target count, as a fraction of all: a heat map of module kinds over depth.

    Args, Returns, Raises: as for `plot_plan`; and `ValueError` where the plan was made without statistics.
    """
    _check_spectra(plan)
    axes = _heat_map(plan, lambda module: module.effective_rank / min(module.shape), "effective rank / full rank", None, axes)
    axes.set_title("directions that count")
    return axes


def plot_search(result: SearchResult, axes: Any = None) -> Any:
    """Size against metric: all trials, the Pareto front, the dense model, the limit, and the chosen one.

    Args, Returns, Raises: as for `plot_plan`.
    """
    axes = new_axes() if axes is None else axes
    for method in dict.fromkeys(trial.method for trial in result.trials):
        own = [trial for trial in result.trials if trial.method == method and math.isfinite(trial.metric)]
        axes.plot([_kept(trial, result) for trial in own], [trial.metric for trial in own], "o", label=method)
    front = [trial for trial in result.front if math.isfinite(trial.metric)]
    axes.plot([_kept(trial, result) for trial in front], [trial.metric for trial in front], "-", color="gray", label="front")
    axes.plot([1.0], [result.dense_metric], "k*", label="dense")
    axes.axhline(result.limit, color="gray", linestyle=":", label="limit")
    if result.chosen is not None:
        axes.plot([_kept(result.chosen, result)], [result.chosen.metric], "o", ms=14, mfc="none", color="black", label="chosen")
    axes.set(xlabel="stored / dense parameters of the targets", ylabel=result.metric)
    if not result.higher_is_better and min([result.dense_metric, *(trial.metric for trial in result.trials)]) > 0:
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter("{x:g}")
    axes.legend()
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
    place, kinds, depths = _grid(plan.modules)
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
        own = [module for module in plan.modules if place[module.name][0] == shown[index]]
        width = max(len(module.spectrum) for module in own)
        cells = [[math.nan] * width for _ in depths]
        for module in own:
            row = depths.index(place[module.name][1])
            cells[row][: len(module.spectrum)] = [math.log10(value) if value > 0 else least for value in module.spectrum]
        image = axes.imshow(cells, aspect="auto", vmin=least, vmax=most, interpolation="nearest")
        ranks = [len(module.spectrum) if module.rank is None else module.rank for module in own]
        places = [depths.index(place[module.name][1]) for module in own]
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
        axes: as for `plot_plan`.
    """
    axes = new_axes(5, 4) if axes is None else axes
    for label in dict.fromkeys(label for label, _, _ in points):
        own = [(predicted, measured) for name, predicted, measured in points if name == label]
        axes.plot([x for x, _ in own], [y for _, y in own], "o", label=label)
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
        axes: as for `plot_plan`.
    """
    axes = new_axes(8, 4) if axes is None else axes
    labels = {"original": "original block on the compressed stream", "before": "factorised", "after": "refined"}
    for key, label in labels.items():
        known = [(i, entry[key]) for i, entry in enumerate(entries) if entry.get(key) is not None]
        if known:
            axes.plot([i for i, _ in known], [value for _, value in known], ".-", label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="block", ylabel="relative error of its output", title="errors of the blocks")
    axes.set_ylim(bottom=0)
    axes.legend()
    return axes


def plot_angles(angles: Mapping[str, Mapping[int, float]], axes: Any = None) -> Any:
    """Mean principal angle between what neighbouring layers keep of their inputs, over depth, one line for each kind.

    Args:
        angles: module kind → depth → angle, in radians.
        axes: as for `plot_plan`.
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


def table_html(rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table for notebooks, the first row of which is the head."""
    head, *body = [[html.escape(str(cell)) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    top = "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"
    return f"<table><thead>{top}</thead><tbody>{''.join(lines)}</tbody></table><p>{html.escape(caption)}</p>"


def place_of(name: str) -> tuple[str, int]:
    """What kind of module a name is of, and at which depth: what is left of the name without its first number, and that.

    >>> place_of("model.layers.12.self_attn.q_proj"), place_of("lm_head")
    (('self_attn.q_proj', 12), ('lm_head', 0))
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return (name, 0) if number is None else (".".join(parts[number + 1 :]) or name, int(parts[number]))


def _check_spectra(plan: Plan) -> None:
    if not all(module.spectrum for module in plan.modules):
        raise ValueError("the plan has no spectra, since it was made without statistics; use `allocation='loss'`.")


def places_of(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Kind and depth of each module, as `place_of` gives them; kinds with what is before the number, where two would be one.

    >>> places_of(["encoder.0.q", "decoder.0.q"])
    {'encoder.0.q': ('encoder.q', 0), 'decoder.0.q': ('decoder.q', 0)}
    """
    places = {name: place_of(name) for name in names}
    if len(set(places.values())) < len(places):
        for name, (kind, depth) in places.items():
            before = name.removesuffix(kind).rstrip(".").removesuffix(str(depth)).rstrip(".")
            places[name] = (f"{before}.{kind}".lstrip("."), depth)
    return places


def _kept(trial: Any, result: SearchResult) -> float:
    return trial.stored_parameters / result.dense_parameters


def _grid(modules: Sequence[ModulePlan]) -> tuple[dict[str, tuple[str, int]], list[str], list[int]]:
    """The place of each module, all kinds, and all depths."""
    places = places_of([module.name for module in modules])
    return places, list(dict.fromkeys(kind for kind, _ in places.values())), sorted({depth for _, depth in places.values()})


def _heat_map(plan: Plan, value: Callable[[ModulePlan], float], label: str, most: float | None, axes: Any) -> Any:
    places, kinds, depths = _grid(plan.modules)
    cells = [[math.nan] * len(depths) for _ in kinds]
    for module in plan.modules:
        kind, depth = places[module.name]
        cells[kinds.index(kind)][depths.index(depth)] = value(module)
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
