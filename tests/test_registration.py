"""PEFT knows REPARAM as it knows its own methods, and a method of that name from elsewhere is left in place."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from reparam_peft import ReparamConfig, ReparamModel
from reparam_peft.registration import extend_peft_types, register

MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)


def test_peft_knows_the_method() -> None:
    assert [mapping["REPARAM"] for mapping in MAPPINGS] == [ReparamConfig, ReparamModel, "reparam_"]
    assert type(get_peft_config({"peft_type": "REPARAM", "task_type": None, "r": 3})) is ReparamConfig


def test_registering_again_changes_nothing() -> None:
    before = [dict(mapping) for mapping in MAPPINGS], list(PeftType), dict(PeftType.__members__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()
        register()
    assert ([dict(mapping) for mapping in MAPPINGS], list(PeftType), dict(PeftType.__members__)) == before


def test_the_member_is_a_member_like_the_others() -> None:
    """What holds for LORA, which the class body defines, holds for REPARAM."""
    for name in ("LORA", "REPARAM"):
        member = getattr(PeftType, name)
        assert isinstance(member, PeftType)
        assert isinstance(member, str)
        assert (member.name, member.value, str.__str__(member)) == (name, name, name)
        assert PeftType(name) is PeftType[name] is member
        assert name in PeftType.__members__
        assert member in PeftType
        assert list(PeftType).count(member) == 1
        assert member == name
        assert name == member
        assert hash(member) == hash(name)
        assert {name: 1}[member] == {member: 1}[name] == 1
        assert member != PeftType.IA3
        assert copy.copy(member) is copy.deepcopy(member) is member
        assert json.dumps(member) == f'"{name}"'
        assert repr(member) == f"<PeftType.{name}: '{name}'>"
        assert getattr(peft.PeftType, name) is member
        with pytest.raises(AttributeError):
            setattr(PeftType, name, "other")
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert list(reversed(PeftType)) == list(PeftType)[::-1]
    # An enum formats and prints in one way, whatever way that is in this version of Python.
    assert str(PeftType.REPARAM) == str(PeftType.LORA).replace("LORA", "REPARAM")
    assert f"{PeftType.REPARAM}" == f"{PeftType.LORA}".replace("LORA", "REPARAM")


def test_a_member_that_exists_is_left_alone() -> None:
    before, member = list(PeftType), PeftType.LORA
    extend_peft_types("LORA")
    assert list(PeftType) == before
    assert PeftType.LORA is member


def test_other_names_are_still_unknown() -> None:
    with pytest.raises(ValueError, match="'NEVER' is not a valid PeftType"):
        PeftType("NEVER")


class ForeignConfig(PeftConfig):
    """What a later PEFT might bring."""


def test_yields_to_a_method_of_that_name_in_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForeignConfig, "__module__", "peft.tuners.reparam.config")
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.REPARAM, ForeignConfig)
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.REPARAM, object)
    message = r"PEFT already has a method REPARAM \(peft.tuners.reparam.config\); reparam_peft leaves it in place"
    with pytest.warns(UserWarning, match=message):
        register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.REPARAM] is ForeignConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.REPARAM] is object


def test_registers_where_the_member_exists_but_no_method(monkeypatch: pytest.MonkeyPatch) -> None:
    for mapping in MAPPINGS:
        monkeypatch.delitem(mapping, PeftType.REPARAM)
    register()
    assert [mapping[PeftType.REPARAM] for mapping in MAPPINGS] == [ReparamConfig, ReparamModel, "reparam_"]
