"""Fields that say how many bits numbers have: what is accepted, and what is told where it cannot be honoured."""

from __future__ import annotations

from typing import Any

import pytest

from reparam_peft import ReparamConfig
from reparam_peft.config.few_bits import check_one_shot


def test_widths_are_ordered_so_that_equal_configs_are_equal() -> None:
    config = ReparamConfig(budget="bytes", bits=[4, 16])
    assert config.bits == (16, 4) == ReparamConfig(**config.to_dict()).bits
    assert (config.least_bits, ReparamConfig(r=2, form="corrected").least_bits) == (4, 4)


def test_a_budget_of_parameters_is_what_none_means() -> None:
    assert not ReparamConfig(budget="parameters", keep=0.5).chooses_bits
    check_one_shot(ReparamConfig(budget="parameters"), "`search`")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "`form='corrected'` needs `r`, the rank of the correction, got None"),
        ({"keep": 0.5}, "so that `keep` says nothing"),
        ({"r": "full"}, "needs `r`, the rank of the correction, got 'full'"),
        ({"r": 8, "bits": [16]}, r"`form='corrected'` needs one of \(8, 4\) among `bits`"),
        ({"keep": 0.3, "budget": "bytes", "bits": [4]}, "needs 8 or 16 among `bits`, for the factors beside a matrix"),
        ({"r": 8, "init_weights": False}, "`init_weights=False` has no meaning with `form='corrected'`"),
        ({"r": 8, "neurons": True}, "`neurons=True` and `form='corrected'` cannot be used together"),
    ],
)
def test_a_corrected_matrix_needs_a_rank_and_few_bits(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReparamConfig(form="corrected", **fields)


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"budget": "bytes"}, "`budget='bytes'`"),
        ({"form": "corrected", "r": 2}, "`form='corrected'`"),
        ({"rank_pattern": {"q": 4}, "bit_pattern": {"q": 8}}, "`bit_pattern`"),
    ],
)
def test_routes_that_do_not_know_few_bits_refuse(fields: dict[str, Any], given: str) -> None:
    with pytest.raises(ValueError, match=f"{given} has numbers stored in few bits, which `search` does not do"):
        check_one_shot(ReparamConfig(**fields), "`search`")


def test_a_matrix_as_it_is_is_in_few_bits() -> None:
    with pytest.raises(ValueError, match="`form_pattern` must hold 'dense' of modules of `bit_pattern` only, got 'q'"):
        ReparamConfig(rank_pattern={"q": 4}, form_pattern={"q": "dense"})
