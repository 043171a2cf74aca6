"""Writing self-contained checkpoints: the class that loads one, and what cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import get_peft_model
from support.models import bert, llama, qwen_moe, t5
from transformers import PreTrainedModel

from reparam_peft import ReparamConfig
from reparam_peft.standalone.onnx_export import save_onnx
from reparam_peft.standalone.self_contained import auto_class, save_self_contained


@pytest.mark.parametrize(
    ("make", "expected"),
    [(llama, "AutoModelForCausalLM"), (bert, "AutoModelForSequenceClassification"), (t5, "AutoModelForSeq2SeqLM")],
)
def test_the_class_that_loads_it(make: Callable[[], PreTrainedModel], expected: str) -> None:
    assert auto_class(make()) == expected


def test_dense_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to_standalone"):
        save_self_contained(llama(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save", [save_self_contained, save_onnx])
def test_opened_parameters_are_refused(save: Callable[[PreTrainedModel, Path], None], tmp_path: Path) -> None:
    config = ReparamConfig(target_modules=[], target_parameters="all-experts", keep=0.5)
    plain = get_peft_model(qwen_moe(), config).base_model.to_standalone()
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: .*knows factorised layers only"):
        save(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()
