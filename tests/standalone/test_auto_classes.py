"""Which of transformers' Auto classes loads a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.models import bert, llama, t5
from transformers import PreTrainedModel

from reparam_peft.standalone.auto_classes import auto_class


@pytest.mark.parametrize(
    ("make", "expected"),
    [(llama, "AutoModelForCausalLM"), (bert, "AutoModelForSequenceClassification"), (t5, "AutoModelForSeq2SeqLM")],
)
def test_the_class_that_loads_it(make: Callable[[], PreTrainedModel], expected: str) -> None:
    assert auto_class(make()) == expected
