"""Pictures and tables of plans and searches, and the numbers in them."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import llama
from matplotlib.figure import Figure
from peft import get_peft_model

from reparam_peft import (
    Plan,
    ReparamConfig,
    SearchResult,
    Trial,
    input_angles,
    plan,
    plot_effective_ranks,
    plot_spectra,
    principal_angles,
)
from reparam_peft.display.axes import place_of
from reparam_peft.display.tables import html_table
from reparam_peft.report.plots import plot_angles, plot_blocks, plot_losses, plot_predictions

matplotlib.use("Agg")
BATCHES = [{"input_ids": torch.arange(3, 51).reshape(2, 24)}]


@pytest.fixture(scope="module")
def made() -> Plan:
    dense = ["model.layers.1.mlp.up_proj"]
    return plan(llama(), ReparamConfig(target_modules="all-linear", keep=0.6, dense_modules=dense), BATCHES, progress=False)


@pytest.fixture
def result() -> SearchResult:
    trials = tuple(Trial("whitened", keep, int(1000 * keep), 20 / keep, keep > 0.6, None, 1.0) for keep in (0.5, 0.7, 0.9))
    return SearchResult(trials, trials[1], "perplexity", 20.0, 1000, 30.0, False)


def test_a_plan_is_drawn_as_it_is(made: Plan, tmp_path: Path) -> None:
    axes = made.plot()
    cells = axes.images[0].get_array()
    assert cells.shape == (7, 2)
    kinds = [label.get_text() for label in axes.get_yticklabels()]
    for module in made.modules:
        kind, depth = place_of(module.name)
        assert cells[kinds.index(kind), depth] == pytest.approx(module.stored_parameters / module.dense_parameters)
    marked = {text.get_position() for text in axes.texts}
    places = [place_of(name) for name in made.dense_modules]
    assert (1, kinds.index("mlp.up_proj")) in marked == {(depth, kinds.index(kind)) for kind, depth in places}
    axes.figure.savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert made.plot(axes) is axes


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


def test_encoder_and_decoder_are_kinds_of_their_own(made: Plan) -> None:
    names = ("encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q", "decoder.block.1.q")
    both = replace(made, modules=tuple(replace(made.modules[0], name=name) for name in names))
    kinds = [label.get_text() for label in both.plot().get_yticklabels()]
    assert kinds == ["encoder.block.q", "decoder.block.q"]
    assert [len(axes.lines[0].get_xdata()) for axes in plot_spectra(both).axes if axes.get_title()] == [2, 2]


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


def test_effective_rank_and_energy(made: Plan) -> None:
    module = made.modules[0]
    assert replace(module, spectrum=(1.0,) * 8).effective_rank == pytest.approx(8)
    assert replace(module, spectrum=(3.0, 0.0, 0.0)).effective_rank == pytest.approx(1)
    assert replace(module, spectrum=()).effective_rank == 0
    assert replace(module, spectrum=(3.0, 1.0)).energy(1) == 0.75
    assert replace(module, spectrum=(0.0, 0.0)).energy(1) == 1
    assert made.modules[0].energy(10**6) == pytest.approx(1)
    hardest = made.resistant(3)
    parts = [module.effective_rank / min(module.shape) for module in made.modules]
    assert [m.effective_rank / min(m.shape) for m in hardest] == sorted(parts, reverse=True)[:3]


def test_a_search_is_drawn(result: SearchResult, tmp_path: Path) -> None:
    axes = result.plot()
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert points["whitened"] == [[0.5, 40.0], [0.7, pytest.approx(20 / 0.7)], [0.9, pytest.approx(20 / 0.9)]]
    assert points["dense"] == [[1.0, 20.0]]
    assert points["chosen"] == [[0.7, pytest.approx(20 / 0.7)]]
    axes.figure.savefig(tmp_path / "search.png")


def test_what_is_not_finite_is_left_out(result: SearchResult) -> None:
    broken = replace(result.trials[0], metric=math.inf)
    axes = replace(result, trials=(broken, *result.trials[1:])).plot()
    assert all(math.isfinite(y) for line in axes.lines for y in line.get_ydata())


def test_tables_for_notebooks(made: Plan, result: SearchResult) -> None:
    assert made._repr_html_().count("<tr>") == len(made.modules) + 1
    assert "model.layers.1.mlp.up_proj" in made._repr_html_()
    assert "perplexity at most 30 was asked for" in result._repr_html_()
    assert html_table([("a",), ("<script>",)], "<b>") == (
        "<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;script&gt;</td></tr></tbody></table><p>&lt;b&gt;</p>"
    )


def test_without_matplotlib(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"reparam_peft\[plot\]"):
        made.plot()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([[1.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]], [math.pi / 2]),
        ([[1.0, 0.0, 0.0]], [[1.0, 1.0, 0.0]], [math.pi / 4]),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 5.0, 0.0], [0.0, 0.0, 1.0]], [0.0, math.pi / 2]),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 0.0, 1e-9]], [1e-9]),
    ],
)
def test_principal_angles(first: list[list[float]], second: list[list[float]], expected: list[float]) -> None:
    for one, other in ((first, second), (second, first)):
        got = principal_angles(torch.tensor(one), torch.tensor(other))
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-6)


def test_angles_do_not_depend_on_the_basis() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(4, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    mixed = torch.randn(4, 4, dtype=torch.float64) @ A
    torch.testing.assert_close(principal_angles(mixed, B), principal_angles(A, B))
    assert principal_angles(A, mixed).max() < 1e-7


def test_matrices_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="same width"):
        principal_angles(torch.ones(1, 2), torch.ones(1, 3))


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_angles_of_a_model(form: str) -> None:
    model = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", keep=0.5, form=form))
    angles = input_angles(model)
    assert set(angles) == {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    factors = [layer.self_attn.q_proj.reparam_factors["default"].factors.B for layer in model.base_model.model.model.layers]
    torch.testing.assert_close(angles["self_attn.q_proj"][0], principal_angles(*factors))
    with pytest.raises(ValueError, match="no factorised layers"):
        input_angles(llama())
