"""What type checkers are told of a compressed model is so."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from peft import get_peft_model
from support.models import llama

from reparam_peft import CompressedModel, ReparamConfig, ReparamModel
from reparam_peft.tuner import compressed_model


@pytest.mark.parametrize("name", ["size_report", "to_standalone"])
def test_methods_are_those_of_the_tuner(name: str) -> None:
    tree = ast.parse(Path(compressed_model.__file__).read_text(encoding="utf-8"))
    told = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    parameters = inspect.signature(getattr(ReparamModel, name)).parameters
    assert [argument.arg for argument in told.args.args] == list(parameters)
    assert [ast.unparse(argument.annotation) for argument in told.args.args[1:]] == [
        parameter.annotation for parameter in list(parameters.values())[1:]
    ]


def test_a_compressed_model_is_one() -> None:
    model = get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"], keep=0.5))
    assert isinstance(model, CompressedModel)
    assert model.size_report().keep <= 0.5
