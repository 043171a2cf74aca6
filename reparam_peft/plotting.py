"""Pictures of plans and searches, by matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
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
    kinds, depths = _grid(plan.modules)
    for module in plan.modules:
        if module.rank is None:
            kind, depth = place_of(module.name)
            axes.text(depths.index(depth), kinds.index(kind), "×", ha="center", va="center", color="black")
    axes.set_title(f"keep = {plan.keep:g}; × stays dense")
    return axes


def plot_effective_ranks(plan: Plan, axes: Any = None) -> Any:
    """How many directions of each target count, as a fraction of all: a heat map of module kinds over depth.

    Args, Returns, Raises: as for `plot_plan`; and `ValueError` where the plan was made without statistics.
    """
    if not all(module.spectrum for module in plan.modules):
        raise ValueError("the plan has no spectra, since it was made without statistics; use `allocation='loss'`.")
    axes = _heat_map(plan, lambda module: module.effective_rank / min(module.shape), "effective rank / full rank", None, axes)
    axes.set_title("directions that count")
    return axes


def plot_search(result: SearchResult, axes: Any = None) -> Any:
    """Size against metric: all trials, the Pareto front, the dense model, the limit, and the chosen one.

    Args, Returns, Raises: as for `plot_plan`.
    """
    axes = _axes() if axes is None else axes
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


def _kept(trial: Any, result: SearchResult) -> float:
    return trial.stored_parameters / result.dense_parameters


def _grid(modules: Sequence[ModulePlan]) -> tuple[list[str], list[int]]:
    places = [place_of(module.name) for module in modules]
    return list(dict.fromkeys(kind for kind, _ in places)), sorted({depth for _, depth in places})


def _heat_map(plan: Plan, value: Callable[[ModulePlan], float], label: str, most: float | None, axes: Any) -> Any:
    kinds, depths = _grid(plan.modules)
    cells = [[math.nan] * len(depths) for _ in kinds]
    for module in plan.modules:
        kind, depth = place_of(module.name)
        cells[kinds.index(kind)][depths.index(depth)] = value(module)
    axes = _axes(2 + 0.3 * len(depths), 1.5 + 0.35 * len(kinds)) if axes is None else axes
    image = axes.imshow(cells, aspect="auto", vmin=0.0, vmax=most)
    axes.set(xlabel="depth", yticks=range(len(kinds)), yticklabels=kinds)
    step = math.ceil(len(depths) / 16)
    axes.set_xticks(range(0, len(depths), step), depths[::step])
    axes.figure.colorbar(image, ax=axes, label=label)
    return axes


def _axes(width: float = 6.4, height: float = 4.8) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'reparam_peft[plot]'") from error
    _, axes = pyplot.subplots(figsize=(max(6.4, width), max(2.4, height)), layout="constrained")
    return axes
