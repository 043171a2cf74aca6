"""The result of a search: its front, its table and its picture."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from support.results import result_of_a_search

from reparam_peft import SearchResult
from reparam_peft.searching.result import Trial

matplotlib.use("Agg")


@pytest.fixture
def result() -> SearchResult:
    return result_of_a_search()


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


def test_the_front_and_the_table() -> None:
    def trial(stored: int, metric: float) -> Trial:
        return Trial("whitened", stored / 100, stored, metric, metric <= 2, None, 1.0)

    trials = (trial(50, 2.0), trial(30, 5.0), trial(40, 6.0), trial(60, 2.0))
    result = SearchResult(trials, trials[0], "loss", 1.0, 100, 2.0, False)
    assert result.front == [trials[1], trials[0]]
    assert [row[0] for row in result.rows()] == ["", "dense", "within", "chosen", "", ""]
    assert "loss at most 2 was asked for" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["chosen"]["keep"] == 0.5
    endless = SearchResult((trial(50, math.inf),), None, "loss", 1.0, 100, 2.0, False)
    assert endless.to_dict()["trials"][0]["metric"] is None
