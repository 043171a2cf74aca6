"""Tensor parallelism by a plan of dense layers is refused, before anything is split."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.models import llama
from support.standalone import small
from transformers import PreTrainedModel

from reparam_peft.standalone.parallel import DISTRIBUTE, check_unsplit

WHOLE = object()  # in place of a mesh, which nobody may get to


def distributed(model: PreTrainedModel, rules: Any, processes: int = 2, mesh: object | None = WHOLE) -> Any:
    if not hasattr(PreTrainedModel, DISTRIBUTE):
        pytest.skip("this version of transformers splits models elsewhere")
    return getattr(PreTrainedModel, DISTRIBUTE)(model, SimpleNamespace(tp_plan=rules, tp_size=processes), mesh)


@pytest.mark.parametrize("rules", ["auto", None, {"model.layers.*.mlp.up_proj": "colwise"}])
def test_factorised_layers_are_not_split(rules: Any) -> None:
    plain = small("factors").to_standalone()
    with pytest.raises(ValueError, match=r"14 layers, of which the first is model\.layers\.0\.\S+_proj, .* among 2 processes"):
        distributed(plain, rules)
    with pytest.raises(ValueError, match="Load the model whole in each process"):
        check_unsplit(plain, 2)


def test_experts_are_not_split_either() -> None:
    if not hasattr(PreTrainedModel, DISTRIBUTE):
        pytest.skip("this version of transformers splits models elsewhere")
    plain = small("factors").to_standalone()
    rules = {"model.layers.*.mlp": "ep_dispatch_experts"}
    config = SimpleNamespace(tp_plan=None, tp_size=1, ep_plan=rules, ep_size=2)
    with pytest.raises(ValueError, match=r"6 layers, .*`ep_plan` would split them among 2 processes"):
        getattr(PreTrainedModel, DISTRIBUTE)(plain, config, WHOLE)


def test_a_model_may_have_no_plan_for_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers 5.17."""
    if not hasattr(PreTrainedModel, DISTRIBUTE):
        pytest.skip("this version of transformers splits models elsewhere")
    for owner in PreTrainedModel.__mro__:
        if "ep_plan" in vars(owner):
            monkeypatch.delattr(owner, "ep_plan")
    plain = small("factors").to_standalone()
    config = SimpleNamespace(tp_plan=None, tp_size=1, ep_plan={"model.layers.*.mlp": "ep_dispatch_experts"}, ep_size=2)
    with pytest.raises(ValueError, match="`ep_plan` would split them among 2 processes"):
        getattr(PreTrainedModel, DISTRIBUTE)(plain, config, WHOLE)


def test_models_that_no_rule_is_for_are_left_alone() -> None:
    plain = small("factors").to_standalone()
    check_unsplit(plain, 1)
    check_unsplit(plain, 2, {"model.layers.*.mlp.act_fn": "colwise"})
    check_unsplit(llama(), 2)
    assert distributed(plain, "auto", mesh=None) is plain
