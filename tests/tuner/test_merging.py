"""What cannot be merged or undone is refused before the first layer is changed."""

from __future__ import annotations

import pytest
from peft import PeftModel, get_peft_model
from support.models import llama
from torch import nn

from reparam_peft import ReparamConfig
from reparam_peft.tuner.merging import check_base_weights, check_mergeable


def small(**options: bool) -> PeftModel:
    return get_peft_model(llama(), ReparamConfig(target_modules=["q_proj", "k_proj"], keep=0.5, **options))


def test_a_weight_that_is_gone_needs_an_adapter_with_factors() -> None:
    model = small()
    check_mergeable(model.get_base_model(), None, safe_merge=True)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: none of the adapters \['other'\] has factors"):
        check_mergeable(model.get_base_model(), ["other"], safe_merge=False)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: it goes"):
        check_base_weights(model.get_base_model(), "it goes")


def test_a_weight_that_was_shared_since_would_be_changed_elsewhere() -> None:
    model = small(keep_base=True)
    base = model.get_base_model()
    check_base_weights(base, "nothing")
    base.model.extra = nn.Linear(64, 64)
    base.model.extra.weight = base.model.layers[1].self_attn.q_proj.base_layer.weight
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: the weight is shared \(.*extra\.weight"):
        check_mergeable(base, None, safe_merge=False)
