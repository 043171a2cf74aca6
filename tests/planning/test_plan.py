"""Plans: what is said about them, their picture and their file."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.results import plan_of_a_llama
from support.strategies import PROPERTY, targets

from reparam_peft import ReparamConfig
from reparam_peft.config.fields import ALLOCATIONS
from reparam_peft.display.axes import place_of
from reparam_peft.numerics.methods import METHODS
from reparam_peft.planning.module_plan import ModulePlan
from reparam_peft.planning.neurons import Allotment
from reparam_peft.planning.plan import FORMAT, Plan, make_plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan as `make_plan` makes it, with or without statistics."""
    storages, losses = draw(targets(12))
    form = next(iter(storages.values())).form
    ranks = {
        name: draw(st.none() | st.integers(1, min(storage.out_features, storage.in_features)))
        for name, storage in storages.items()
    }
    config = ReparamConfig(keep=draw(st.floats(0.01, 1)), form=form, r=1 if form == "corrected" else None)
    config.method, config.allocation = draw(st.sampled_from(sorted(METHODS))), draw(st.sampled_from(ALLOCATIONS))
    config.moved_bias = draw(st.booleans())
    provenance: dict[str, Any] = {
        name: draw(st.integers(0, 2**40)) for name in ("calibration_tokens", "gradient_tokens", "seed")
    }
    known = losses if draw(st.booleans()) else {}
    provenance["tokens"] = {name: draw(st.integers(0, 2)) for name in storages}
    return make_plan(config, config.keep, storages, Allotment(ranks), known, {}, **(provenance if known else {}))


@PROPERTY
@given(plans())
def test_totals_are_sums_over_the_modules(plan: Plan) -> None:
    assert plan.dense_parameters == sum(math.prod(module.shape) for module in plan.modules)
    assert plan.stored_parameters == sum(module.stored_parameters for module in plan.modules)
    assert plan.ranks.keys() | set(plan.dense_modules) == {module.name for module in plan.modules}
    assert not plan.ranks.keys() & set(plan.dense_modules)
    if any(module.spectrum for module in plan.modules):
        total = sum(math.fsum(m.spectrum[m.rank :]) for m in plan.modules if m.rank is not None)
        assert plan.predicted_loss == pytest.approx(total, rel=1e-9, abs=1e-15)
    else:
        assert plan.predicted_loss is None
    for module in plan.modules:
        if module.rank is None:
            assert module.stored_parameters == module.dense_parameters
            assert module.predicted_loss in (None, 0)


@PROPERTY
@given(plans())
def test_file_round_trip(plan: Plan) -> None:
    assert Plan.from_dict(plan.to_dict()) == plan
    with TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        plan.save(path)
        loaded = Plan.load(str(path))
        assert loaded == plan
        assert hash(loaded) == hash(plan)
        written = path.read_bytes()
        loaded.save(path)
        assert path.read_bytes() == written
        assert json.loads(written)["format"] == FORMAT


@PROPERTY
@given(plans())
def test_prints_one_line_per_module_and_the_totals(plan: Plan) -> None:
    header, *lines, summary = str(plan).splitlines()
    routed = len({module.tokens for module in plan.modules}) > 1
    assert header.split() == ["module", "shape", "rank", "stored", "kept", "loss", *(["tokens"] if routed else [])]
    assert len(lines) == len(plan.modules)
    assert len({len(line.rstrip()) for line in lines}) == 1, "columns are aligned"
    for line, module in zip(lines, plan.modules, strict=True):
        name, out_features, _, in_features, rank, stored_, kept, *_ = line.split()
        assert float(kept.rstrip("%")) == pytest.approx(100 * module.stored_parameters / module.dense_parameters, abs=0.051)
        assert (name, int(out_features), int(in_features)) == (module.name, *module.shape)
        assert rank == ("dense" if module.rank is None else str(module.rank))
        assert int(stored_.replace(",", "")) == module.stored_parameters
        assert not routed or line.split()[-1] == str(module.tokens)
    assert summary.startswith(f"{plan.stored_parameters:,} of {plan.dense_parameters:,} parameters stored")
    assert f"{len(plan.dense_modules)} of {len(plan.modules)} matrices dense; {plan.method}" in summary
    assert ("predicted loss" in summary) == (plan.predicted_loss is not None)


def test_a_plan_is_a_value() -> None:
    plan = Plan((ModulePlan("a", (4, 5), 2, 18),), 0.9, "svd", "uniform", "factors")
    with pytest.raises(dataclasses.FrozenInstanceError, match="keep"):
        plan.keep = 0.5
    assert "0 of 0 matrices dense" in str(Plan((), 0.9, "svd", "uniform", "factors"))


GOOD = Plan((ModulePlan("a.b", (4, 5), 2, 18, 0.5, (1.0, 0.5)),), 0.9, "whitened", "loss", "factors").to_dict()


def with_module(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "modules": [{**GOOD["modules"][0], **changes}]}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no format": (without("format"), f"`format` must be '{FORMAT}'"),
    "another format": ({**GOOD, "format": "reparam_peft plan 0"}, f"`format` must be '{FORMAT}'"),
    "no modules": (without("modules"), "a field is missing, unknown or wrong: 'modules'"),
    "no keep": (without("keep"), "a field is missing, unknown or wrong: .*keep"),
    "an unknown field": ({**GOOD, "speed": 1}, "a field is missing, unknown or wrong: .*'speed'"),
    "a module without a name": ({**GOOD, "modules": [{"shape": [4, 5]}]}, "a field is missing, unknown or wrong"),
    "an unknown field of a module": (with_module(speed=1), "a field is missing, unknown or wrong: .*'speed'"),
    "keep of the wrong type": ({**GOOD, "keep": "much"}, "`keep` must be a number"),
    "keep out of range": ({**GOOD, "keep": 0}, "`keep` must be in"),
    "an unknown method": ({**GOOD, "method": "pca"}, "`method` must be one of"),
    "an unknown form": ({**GOOD, "form": "cube"}, "`form` must be one of"),
    "a null method": ({**GOOD, "method": None}, "a field is missing, or a module is there twice"),
    "a module twice": ({**GOOD, "modules": 2 * GOOD["modules"]}, "a field is missing, or a module is there twice"),
    "a bias flag that is none": ({**GOOD, "moved_bias": 1}, "`moved_bias` must be True or False"),
    "tokens that are no count": ({**GOOD, "calibration_tokens": -1}, "`calibration_tokens` is filled in .* a count"),
    "stored numbers that are no count": (with_module(stored_parameters=1.5), "a.b: `stored_parameters` must be a positive int"),
    "tokens of a module that are no count": (with_module(tokens=-1), "a.b: `tokens` must be a count or None, got -1"),
    "a loss that is NaN": (with_module(predicted_loss=math.nan), "a.b: `predicted_loss` and `spectrum` must be finite"),
    "a loss beyond floats": (with_module(predicted_loss=10**400), "a.b: `predicted_loss` and `spectrum` must be finite"),
    "a loss that is False": (with_module(predicted_loss=False), "a.b: `predicted_loss` and `spectrum` must be finite"),
    "a sum beyond floats": (with_module(spectrum=[1e308, 1e308]), "a.b: `predicted_loss` and `spectrum` must be finite"),
    "too long a spectrum": (with_module(spectrum=[0.0] * 5), "a.b: .* at most 4 of them"),
    "a name that is a number": (with_module(name=5), "`name` must be text that can be printed, got 5"),
    "a name for the terminal": (with_module(name="\x1b[2J"), "`name` must be text that can be printed"),
    "a spectrum of words": (with_module(spectrum=["1"]), "a.b: `predicted_loss` and `spectrum` must be finite"),
    "a rank above the shape": (with_module(rank=5), r"a.b: `rank` must be None or in \[1, 4\], got 5"),
    "rank 0": (with_module(rank=0), r"a.b: `rank` must be None or in \[1, 4\], got 0"),
    "half a rank": (with_module(rank=1.5), r"a.b: `rank` must be None or in \[1, 4\], got 1.5"),
    "a rank that is a bool": (with_module(rank=True), r"a.b: `rank` must be None or in \[1, 4\], got True"),
    "a shape of one size": (with_module(shape=[4]), r"a.b: `shape` must be two positive ints, got \(4,\)"),
    "an empty shape": (with_module(shape=[0, 4]), r"a.b: `shape` must be two positive ints, got \(0, 4\)"),
    "a shape that is none": (with_module(shape="45"), r"a.b: `shape` must be two positive ints, got \('4', '5'\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_is_no_plan(name: str, tmp_path: Path) -> None:
    fields, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Plan.from_dict(fields)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"plan\.json (does not hold a plan: .*{message}|holds no JSON .* too large)"):
        Plan.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[1, 2]", "3", '"plan"', "null", "{}"])
def test_refuses_a_file_that_holds_something_else(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json (does not hold a plan|holds no JSON)"):
        Plan.load(path)


matplotlib.use("Agg")


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan_of_a_llama()


def test_a_plan_is_drawn_as_it_is(made: Plan, tmp_path: Path) -> None:
    axes = made.plot()
    cells = axes.images[0].get_array()
    assert cells.shape == (7, 2)
    kinds = [label.get_text() for label in axes.get_yticklabels()]
    for module in made.modules:
        kind, depth = place_of(module.name)
        assert cells[kinds.index(kind), depth] == pytest.approx(module.stored_parameters / module.dense_parameters)
    marked = {text.get_position() for text in axes.texts}
    places = [place_of(module.name) for module in made.modules if module.rank is None or module.size is not None]
    assert (1, kinds.index("mlp.up_proj")) in marked == {(depth, kinds.index(kind)) for kind, depth in places}
    axes.figure.savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert made.plot(axes) is axes


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
