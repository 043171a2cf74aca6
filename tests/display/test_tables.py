"""Tables for notebooks."""

from __future__ import annotations

import matplotlib
import pytest
from support.results import plan_of_a_llama, result_of_a_search

from reparam_peft import Plan, SearchResult
from reparam_peft.display.tables import html_table

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan_of_a_llama()


@pytest.fixture
def result() -> SearchResult:
    return result_of_a_search()


def test_tables_for_notebooks(made: Plan, result: SearchResult) -> None:
    assert made._repr_html_().count("<tr>") == len(made.modules) + 1
    assert "model.layers.1.mlp.up_proj" in made._repr_html_()
    assert "perplexity at most 30 was asked for" in result._repr_html_()
    assert html_table([("a",), ("<script>",)], "<b>") == (
        "<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;script&gt;</td></tr></tbody></table><p>&lt;b&gt;</p>"
    )
