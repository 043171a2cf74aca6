"""Places of modules in pictures, and pictures where there is no matplotlib."""

from __future__ import annotations

import sys
from dataclasses import replace

import matplotlib
import pytest
from support.results import plan_of_a_llama

from reparam_peft import Plan, plot_spectra

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan_of_a_llama()


def test_encoder_and_decoder_are_kinds_of_their_own(made: Plan) -> None:
    names = ("encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q", "decoder.block.1.q")
    both = replace(made, modules=tuple(replace(made.modules[0], name=name) for name in names))
    kinds = [label.get_text() for label in both.plot().get_yticklabels()]
    assert kinds == ["encoder.block.q", "decoder.block.q"]
    assert [len(axes.lines[0].get_xdata()) for axes in plot_spectra(both).axes if axes.get_title()] == [2, 2]


def test_without_matplotlib(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"reparam_peft\[plot\]"):
        made.plot()
