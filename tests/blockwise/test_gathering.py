"""Statistics that are gathered block by block are those of passes over the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.batches import text
from support.gathering import assert_same, linear_layers
from support.models import bert, gpt2, llama, qwen_moe, t5
from torch import nn

from reparam_peft.blockwise.gathering import BlockwiseGatherer
from reparam_peft.calibration.gather import gather_statistics
from reparam_peft.runtime.blocks import block_of, find_blocks

TEXTS = [text([20, 9, 20, 5], 20, seed=seed) for seed in range(2)]
BATCHES = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in TEXTS]


def check(model: Any, modules: dict[str, nn.Module], backwards: bool, folder: Path | None = None) -> None:
    """Hold the statistics of each block, gathered in this order, against those of the whole model."""
    batches = BATCHES if hasattr(model, "get_decoder") and model.config.is_encoder_decoder else TEXTS
    blocks = find_blocks(model)
    groups: dict[str | None, dict[str, nn.Module]] = {}
    for name, module in modules.items():
        groups.setdefault(block_of(name, blocks), {})[name] = module
    with BlockwiseGatherer(blocks, folder) as gatherer:
        for block in sorted(groups, key=list(groups).index, reverse=backwards):
            options: dict[str, Any] = {"starts": modules.values(), "progress": False}
            expected = gather_statistics(model, groups[block], batches, **options)
            assert_same(gatherer.gather(model, groups[block], batches, **options), expected, tolerance=1e-6)


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5, qwen_moe], ids=lambda make: make.__name__)
def test_as_of_the_whole_model(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()  # of T5's what all blocks read of its encoder is left out: each knows the gradients through itself
    check(
        model,
        linear_layers(model, *(["lm_head", "EncDecAttention.k", "EncDecAttention.v"] if make is t5 else [])),
        backwards=make is not gpt2,
        folder=tmp_path if make is llama else None,
    )
    assert not list(tmp_path.iterdir())
