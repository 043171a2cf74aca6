"""Pictures of plans and runs, and the numbers in them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from support.results import plan_of_a_llama

from reparam_peft import Plan, plot_effective_ranks, plot_spectra
from reparam_peft.display.axes import place_of
from reparam_peft.report.plots import plot_angles, plot_blocks, plot_losses, plot_predictions

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan_of_a_llama()


def test_effective_ranks_are_drawn(made: Plan) -> None:
    cells = plot_effective_ranks(made).images[0].get_array()
    values = {module.effective_rank / min(module.shape) for module in made.modules}
    assert {round(float(cell), 9) for cell in cells.flatten()} == {round(value, 9) for value in values}


def test_spectra_are_drawn_with_the_ranks(made: Plan, tmp_path: Path) -> None:
    figure = plot_spectra(made)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert set(panels) == {place_of(module.name)[0] for module in made.modules}
    for module in made.modules:
        kind, depth = place_of(module.name)
        row = panels[kind].images[0].get_array()[depth]
        assert float(row[0]) == pytest.approx(math.log10(module.spectrum[0]))
        (line,) = panels[kind].lines
        rank = len(module.spectrum) if module.rank is None else module.rank
        assert (line.get_xdata()[depth], line.get_ydata()[depth]) == (rank - 0.5, depth)
    figure.savefig(tmp_path / "spectra.png")
    assert plot_spectra(made, figure=Figure()) is not figure


def test_many_kinds_and_one_kind_fit(made: Plan) -> None:
    one = replace(made, modules=made.modules[:1])
    assert len([axes for axes in plot_spectra(one).axes if axes.get_title()]) == 1
    many = tuple(replace(made.modules[0], name=f"layers.0.expert{i}") for i in range(20))
    assert len([axes for axes in plot_spectra(replace(made, modules=many)).axes if axes.get_title()]) == 16


def test_predictions_blocks_angles_and_losses_are_drawn() -> None:
    axes = plot_predictions([("a", 0.1, 0.2), ("b", 0.3, 0.1)])
    assert [tuple(line.get_xydata()[0]) for line in axes.lines[:2]] == [(0.1, 0.2), (0.3, 0.1)]
    entries = [{"block": "0", "original": 0.0, "before": 0.2, "after": None}, {"block": "1", "original": 0.1, "before": 0.3}]
    assert [list(line.get_ydata()) for line in plot_blocks(entries).lines] == [[0.0, 0.1], [0.2, 0.3]]
    assert list(plot_angles({"q": {0: 0.5, 2: 0.7}, "k": {}}).lines[0].get_xdata()) == [0, 2]
    assert list(plot_losses([2.0, 1.0]).lines[0].get_ydata()) == [2.0, 1.0]


def test_a_plan_without_spectra_says_so(made: Plan) -> None:
    bare = replace(made, modules=tuple(replace(module, spectrum=()) for module in made.modules))
    with pytest.raises(ValueError, match="no spectra"):
        plot_effective_ranks(bare)
    with pytest.raises(ValueError, match="no spectra"):
        plot_spectra(bare)
