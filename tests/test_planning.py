"""Plans: the ranks under one budget, what is said about them, and their file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from support.strategies import PROPERTY, Targets, spectrum, targets
from torch import Tensor

from reparam_peft import ReparamConfig
from reparam_peft.config.fields import ALLOCATIONS, METHODS
from reparam_peft.numerics.storage import Storage, uniform_rank
from reparam_peft.planning.plan import FORMAT, ModulePlan, Plan, make_plan
from reparam_peft.planning.ranks import allocate_ranks, check_budget

Ranks = dict[str, int | None]


def stored(ranks: Ranks, storages: dict[str, Storage]) -> int:
    return sum(storages[name].dense if rank is None else storages[name].parameters(rank) for name, rank in ranks.items())


def lost(ranks: Ranks, losses: dict[str, Tensor]) -> float:
    return sum(float(losses[name][rank:].sum()) for name, rank in ranks.items() if rank is not None)


def allocated(config: ReparamConfig, storages: dict[str, Storage], losses: dict[str, Tensor], fixed: Ranks) -> Ranks:
    """The ranks, of a case whose budget can be met."""
    try:
        return allocate_ranks(config, storages, losses, fixed)
    except ValueError as error:
        if "the least that can be stored" in str(error):
            reject()
        raise


@PROPERTY
@given(targets(), st.floats(0.2, 1), st.integers(1, 8), st.data())
def test_ranks_keep_the_budget_and_those_that_are_fixed(case: Targets, keep: float, multiple: int, data: st.DataObject) -> None:
    storages, losses = case
    fixed: Ranks = {}
    for name, storage in storages.items():
        if data.draw(st.integers(0, 3)) == 0:
            fixed[name] = data.draw(st.none() | st.integers(1, min(storage.out_features, storage.in_features)))
    config = ReparamConfig(keep=keep, rank_multiple=multiple)
    ranks = allocated(config, storages, losses, fixed)
    assert list(ranks) == list(storages), "in the order of the model"
    assert stored(ranks, storages) <= keep * sum(storage.dense for storage in storages.values()) * (1 + 1e-11)
    for name, rank in ranks.items():
        if name in fixed:
            assert rank == fixed[name]
        elif rank is not None:
            assert storages[name].saves(rank), "a product that is larger than the matrix"


@PROPERTY
@given(targets(), st.floats(0.2, 1))
def test_ranks_by_loss_are_never_worse_than_uniform_ones(case: Targets, keep: float) -> None:
    storages, losses = case
    ranks = allocated(ReparamConfig(keep=keep), storages, losses, {})
    uniform = {name: uniform_rank(keep, storage) for name, storage in storages.items()}
    within = [
        rank is not None and storages[name].parameters(rank) <= keep * storages[name].dense for name, rank in uniform.items()
    ]
    if all(within):
        assert lost(ranks, losses) <= lost(uniform, losses) * (1 + 1e-9)


@PROPERTY
@given(targets(), st.floats(0.3, 1), st.data())
def test_floor_and_ceiling_hold_for_each_matrix(case: Targets, keep: float, data: st.DataObject) -> None:
    storages, losses = case
    floor, ceiling = data.draw(st.floats(0, keep, exclude_max=True)), data.draw(st.floats(keep, 1))
    ranks = allocated(ReparamConfig(keep=keep, floor=floor, ceiling=ceiling, rank_multiple=1), storages, losses, {})
    for name, rank in ranks.items():
        storage = storages[name]
        possible = [r for r in range(1, min(storage.out_features, storage.in_features) + 1) if storage.saves(r)]
        if any(floor * storage.dense <= storage.parameters(r) <= ceiling * storage.dense for r in possible):
            taken = storage.dense if rank is None else storage.parameters(rank)
            assert floor * storage.dense <= taken <= ceiling * storage.dense


def test_uniform_ranks_that_floor_or_ceiling_forbid_are_no_candidate() -> None:
    """Of the small matrix rank 1 stores 29 % and rank 2 57 %; all would be gained by the large one."""
    storages = {"small": Storage(7, 7), "large": Storage(64, 64)}
    losses = {"small": 1e-6 * torch.ones(7), "large": torch.ones(64)}
    uniform = {name: uniform_rank(0.5, storage) for name, storage in storages.items()}
    assert uniform == {"small": 1, "large": 16}
    options = {"keep": 0.5, "rank_multiple": 1}
    assert allocate_ranks(ReparamConfig(**options, floor=0.4), storages, losses, {}) == {"small": None, "large": 15}
    assert allocate_ranks(ReparamConfig(**options), storages, losses, {}) == uniform


def test_small_matrices_gain_nothing_by_aligned_ranks() -> None:
    for size, multiple in ((63, 1), (64, 8)):
        storages = {"a": Storage(size, 64), "b": Storage(size, 64)}
        losses = {"a": torch.ones(size), "b": torch.ones(size)}
        ranks = allocate_ranks(ReparamConfig(keep=0.45), storages, losses, {})
        assert math.gcd(*ranks.values()) % multiple == 0
        assert any(rank % 8 for rank in ranks.values()) == (multiple == 1)


@pytest.mark.parametrize("rank_multiple", [None, 4])
def test_ranks_are_multiples(rank_multiple: int | None) -> None:
    storages = {str(index): Storage(64, 96, "pivot") for index in range(6)}
    losses = {name: spectrum("polynomial", 64) * 4 ** int(name) for name in storages}
    ranks = allocate_ranks(ReparamConfig(keep=0.6, rank_multiple=rank_multiple), storages, losses, {})
    assert all(rank is None or rank % (rank_multiple or 8) == 0 for rank in ranks.values())
    assert sorted(ranks.values(), key=lambda rank: 99 if rank is None else rank) == list(ranks.values()), (
        "more where more is lost"
    )
    assert len(set(ranks.values())) > 1


def test_a_budget_that_cannot_be_met_says_what_takes_it() -> None:
    storages = {"held": Storage(100, 100), "free": Storage(100, 100)}
    losses = {name: torch.ones(100) for name in storages}
    message = (
        r"`keep=0.5` allows 10,000 parameters, and the least that can be stored is 11,600: 10,000 for the 1 targets that "
        "`dense_modules` and `rank_pattern` fix, .* Raise `keep`, or lower `floor` or `rank_multiple`"
    )
    with pytest.raises(ValueError, match=message):
        allocate_ranks(ReparamConfig(keep=0.5), storages, losses, {"held": None})
    assert allocate_ranks(ReparamConfig(keep=0.58), storages, losses, {"held": None}) == {"held": None, "free": 8}


@PROPERTY
@given(targets(), st.floats(0.05, 1), st.data())
def test_a_budget_is_checked_against_what_is_stored(case: Targets, keep: float, data: st.DataObject) -> None:
    storages, _ = case
    ranks = {name: data.draw(st.none() | st.integers(1, min(s.out_features, s.in_features))) for name, s in storages.items()}
    share = stored(ranks, storages) / sum(storage.dense for storage in storages.values())
    assume(not math.isclose(share, keep))
    if share < keep:
        check_budget(keep, ranks, storages)
    else:
        dense = sum(storages[name].dense for name, rank in ranks.items() if rank is None)
        message = (
            rf"allows .* parameters, and these ranks store {stored(ranks, storages):,}, of which {dense:,} are in matrices"
        )
        with pytest.raises(ValueError, match=message):
            check_budget(keep, ranks, storages)
    check_budget(share, ranks, storages)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan as `make_plan` makes it, with or without statistics."""
    storages, losses = draw(targets(12))
    form = next(iter(storages.values())).form
    ranks = {
        name: draw(st.none() | st.integers(1, min(storage.out_features, storage.in_features)))
        for name, storage in storages.items()
    }
    config = ReparamConfig(keep=draw(st.floats(0.01, 1)), form=form)
    config.method, config.allocation = draw(st.sampled_from(METHODS)), draw(st.sampled_from(ALLOCATIONS))
    config.moved_bias = draw(st.booleans())
    provenance = {name: draw(st.integers(0, 2**40)) for name in ("calibration_tokens", "gradient_tokens", "seed")}
    known = losses if draw(st.booleans()) else {}
    return make_plan(config, storages, ranks, known, **(provenance if known else {}))


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
    assert header.split() == ["module", "shape", "rank", "stored", "kept", "loss"]
    assert len(lines) == len(plan.modules)
    assert len({len(line.rstrip()) for line in lines}) == 1, "columns are aligned"
    for line, module in zip(lines, plan.modules, strict=True):
        name, out_features, _, in_features, rank, stored_, kept, *_ = line.split()
        assert float(kept.rstrip("%")) == pytest.approx(100 * module.stored_parameters / module.dense_parameters, abs=0.051)
        assert (name, int(out_features), int(in_features)) == (module.name, *module.shape)
        assert rank == ("dense" if module.rank is None else str(module.rank))
        assert int(stored_.replace(",", "")) == module.stored_parameters
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
    "a loss that is NaN": (with_module(predicted_loss=math.nan), "a.b: `predicted_loss` and `spectrum` must be finite"),
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
    with pytest.raises(ValueError, match=rf"plan\.json does not hold a plan: .*{message}"):
        Plan.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[1, 2]", "3", '"plan"', "null", "{}"])
def test_refuses_a_file_that_holds_something_else(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json does not hold a plan"):
        Plan.load(path)
