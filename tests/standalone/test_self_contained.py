"""Writing self-contained checkpoints: the class that loads one, and what cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import bert, llama, t5
from transformers import PreTrainedModel

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
