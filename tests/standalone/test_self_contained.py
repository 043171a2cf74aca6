"""Writing self-contained checkpoints: what cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import get_peft_model
from support.models import llama, qwen_moe
from transformers import PreTrainedModel

from reparam_peft import ReparamConfig
from reparam_peft.standalone.onnx_export import save_onnx
from reparam_peft.standalone.self_contained import save_self_contained


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
