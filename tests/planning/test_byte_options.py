"""What a matrix can be stored as in bytes, and its curve."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from reparam_peft import ReparamConfig
from reparam_peft.numerics.storage import FORMS, Storage
from reparam_peft.planning.byte_options import ByteOption, Bytes, byte_options, is_dense
from reparam_peft.planning.neurons import Losses
from reparam_peft.planning.ranks import RankChooser

MATRIX = Storage(160, 64, bias=True)


def options(**changes: object) -> list[ByteOption]:
    words = {"forms": FORMS, "bits": (16, 8, 4), "multiple": 8, **changes}
    return byte_options(MATRIX, 4, **words)  # type: ignore[arg-type]


def test_costs_are_the_bytes_that_are_stored_and_grow() -> None:
    offered = options()
    assert {option.form for option in offered} == {*FORMS, "dense"}
    assert {option.bits for option in offered if option.form == "dense"} == {16, 8, 4}
    assert all(option.cost == option.storage.bytes(option.rank, 4) for option in offered)
    assert all(one.cost < other.cost for one, other in itertools.pairwise(offered))
    dense = {option.bits: option.cost for option in offered if option.form == "dense"}
    for option in offered:
        if option.form == "corrected":
            assert (option.bits, option.storage.correction_bits) == (4, 8)
            assert dense[4] < option.cost < dense[8]
        elif option.form != "dense":
            assert option.cost < dense[option.bits]


@pytest.mark.parametrize(
    ("changes", "forms", "bits"),
    [
        ({"bits": (16, 8)}, {"dense", "factors", "pivot", "corrected"}, {16, 8}),
        ({"bits": (8,), "forms": ("pivot",)}, {"dense", "pivot"}, {8}),
        ({"bits": (4,)}, {"dense", "factors", "pivot"}, {4}),  # no width that a correction may have
        ({"bits": (4,), "is_linear": False}, {"dense", "factors", "pivot"}, {16}),  # few bits cannot hold it
        ({"rank": 12}, {"factors", "pivot"}, {16, 8, 4}),
        ({"least": 160 * 64 * 4}, {"dense"}, {16, 8, 4}),  # what is stored as it is, is always offered
        ({"least": math.inf, "rank": 12}, {"factors"}, {16}),
    ],
)
def test_offers_what_is_allowed(changes: dict[str, object], forms: set[str], bits: set[int]) -> None:
    offered = options(**changes)
    assert {option.form for option in offered} == forms
    assert {option.bits for option in offered} == bits


@pytest.mark.parametrize("bits", [(16, 8, 4), (8, 4), (4,)])
def test_codes_that_arrived_are_offered_whatever_is_allowed_and_nothing_that_takes_more(bits: tuple[int, ...]) -> None:
    arrived = Storage(160, 64, "dense", bits=8).bytes(64, 4)
    offered = byte_options(replace(MATRIX, arrived=arrived), 4, forms=FORMS, bits=bits, multiple=8)
    assert (offered[-1].rank, offered[-1].cost) == (None, arrived)
    assert all(option.bits == 4 or option.form != "dense" for option in offered[:-1])
    assert all(option.cost < arrived for option in offered[:-1])
    config = ReparamConfig(target_modules=["a"], budget="bytes", keep=0.3, dense_modules=["a"])
    made = Bytes.of(config, FORMS, {"a": replace(MATRIX, arrived=arrived)}, {"a": 4}, {"a": True})
    assert (made.dense["a"], made.arrived["a"]) == (160 * 64 * 4, arrived)


def two(keep: float, **options: object) -> RankChooser:
    storages = {"a": Storage(64, 64), "b": Storage(64, 64)}
    config = ReparamConfig(target_modules=["a", "b"], budget="bytes", keep=keep, **options)  # type: ignore[arg-type]
    config.allocation, config.form = "loss", "pivot"
    of_bytes = Bytes.of(config, None, storages, dict.fromkeys(storages, 2), dict.fromkeys(storages, True))
    return RankChooser.of(config, storages, of_bytes=of_bytes)


def losses(chooser: RankChooser, of_low_rank: float) -> Losses:
    """In which low rank loses so many times what a matrix as it is does in 4 bits."""
    assert chooser.bytes is not None
    of_bits = {16: 0.0, 8: 0.01, 4: 1.0}
    values = {
        name: [of_bits[o.bits] if o.form == "dense" else of_low_rank * 1000 / o.cost for o in offered]
        for name, offered in chooser.bytes.options.items()
    }
    return Losses(
        {name: torch.ones(64) for name in values}, options={name: torch.tensor(each) for name, each in values.items()}
    )


@pytest.mark.parametrize("of_low_rank", [0.2, 5.0])
@pytest.mark.parametrize("keep", [0.15, 0.29, 0.4, 0.8, 1.0])
def test_never_predicts_worse_than_matrices_as_they_are(keep: float, of_low_rank: float) -> None:
    chooser = two(keep)
    chooser.check()
    made = chooser.ranks(losses(chooser, of_low_rank))
    assert sum(point.cost for point in made.points.values()) <= chooser.budget == int(keep * 2 * 64 * 64 * 2)
    costs = {4: 2304, 8: 4352, 16: 8192}
    alone = [
        {16: 0.0, 8: 0.01, 4: 1.0}[one] + {16: 0.0, 8: 0.01, 4: 1.0}[other]
        for one, other in itertools.product(costs, costs)
        if costs[one] + costs[other] <= chooser.budget
    ]
    assert sum(point.loss for point in made.points.values()) <= min(alone, default=math.inf) + 1e-6


def test_matrices_as_they_are_are_known_where_a_product_is_better() -> None:
    of_bytes = two(1.0).bytes
    assert of_bytes is not None
    offered = of_bytes.options["a"]
    values = torch.tensor([0.0 if o.rank is None else 0.5 if o is offered[0] else 1.0 for o in offered])
    assert [point.loss for point in of_bytes.curve("a", values, 1.0)] == [0.5, 0.0]
    alone = of_bytes.curve_alone("a", values, 1.0)
    assert [(point.cost, point.loss) for point in alone] == [(2304, 1.0), (8192, 0.0)]
    assert all(is_dense(point) for point in alone)
    fixed = two(0.5, rank_pattern={"a": 16}).bytes
    assert fixed is not None
    assert fixed.curve_alone("a", torch.ones(len(fixed.options["a"])), 0.5) == []


def test_what_no_gradient_reaches_stays_as_it_is_in_the_widest_numbers_that_fit() -> None:
    chooser = two(0.6)
    assert chooser.bytes is not None
    nothing = Losses({}, options={name: torch.zeros(len(o)) for name, o in chooser.bytes.options.items()})
    (a, *_), (b, *_) = (chooser.bytes.curve(name, nothing.options[name], 0.6) for name in "ab")
    assert is_dense(a)
    assert a == b
    assert a.storage is not None
    assert a.storage.bits == 8


def test_says_what_the_least_is() -> None:
    with pytest.raises(ValueError, match=r"`keep=0.02` allows 327 bytes, and the least .* allow a lower width in `bits`"):
        two(0.02).check()
    fixed = two(0.7, dense_modules=["a"])
    fixed.check()
    assert fixed.prescribed == {"a": None}
