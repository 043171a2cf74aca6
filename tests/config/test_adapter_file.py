"""`adapter_config.json`: what PEFT would stumble over is told, with the name of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from reparam_peft import ReparamConfig


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", ValueError),
        (b"\xff\xfe{}", ValueError),
        (b"[1, 2]", ValueError),
        (b"[" * 100_000, ValueError),
        (b"{}", ValueError),
        (b'{"peft_type": "X"}', ValueError),
        (b'{"peft_type": ["REPARAM"]}', ValueError),
        (b'{"peft_type": "REPARAM", "keep": "x"}', TypeError),
        (b'{"peft_type": "REPARAM", "rank_pattern": {"a": 0}}', ValueError),
        (b'{"peft_type": "REPARAM", "predicted_loss": 1' + b"0" * 400 + b"}", ValueError),
        (b'{"peft_type": "REPARAM", "base_model_name_or_path": 5}', TypeError),
    ],
    ids=lambda value: value[-40:].decode("latin-1") if isinstance(value, bytes) else value.__name__,
)
def test_a_damaged_file_is_named_on_every_route(content: bytes, error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    routes: list[Any] = [lambda: PeftModel.from_pretrained(nn.Linear(2, 2), tmp_path)]
    if content != b"{}":  # of which PEFT makes a config without a method
        routes += [lambda: PeftConfig.from_pretrained(tmp_path), lambda: ReparamConfig.from_pretrained(tmp_path)]
    for route in routes:
        with pytest.raises(error, match=r"adapter_config\.json"):
            route()


def test_files_of_other_methods_and_of_later_versions_are_read_as_before(tmp_path: Path) -> None:
    LoraConfig(r=3, target_modules="x.*").save_pretrained(str(tmp_path / "lora"))
    lora = PeftConfig.from_pretrained(tmp_path / "lora")
    assert (type(lora), lora.r, lora.target_modules) == (LoraConfig, 3, "x.*")
    ReparamConfig(keep=0.5).save_pretrained(str(tmp_path / "new"))
    path = tmp_path / "new" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "a_field_to_come": 1}))
    with pytest.warns(UserWarning, match="a_field_to_come"):
        assert PeftConfig.from_pretrained(tmp_path / "new").keep == 0.5
