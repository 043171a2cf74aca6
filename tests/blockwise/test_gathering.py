"""Statistics that are gathered block by block are those of passes over the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import text
from support.gathering import assert_same, linear_layers
from support.models import bert, gpt2, llama, qwen_moe, t5
from torch import Tensor, nn

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


def test_an_objective_that_changes_batches_has_its_way() -> None:
    model = llama()
    modules = {name: module for name, module in linear_layers(model).items() if name.startswith("model.layers.1.")}

    def masked(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits: Tensor = model(**{**batch, "input_ids": batch["input_ids"].clamp(max=7)}).logits
        return logits

    options: dict[str, Any] = {"starts": modules.values(), "progress": False, "objective": masked}
    with BlockwiseGatherer(find_blocks(model)) as gatherer:
        assert_same(gatherer.gather(model, modules, TEXTS, **options), gather_statistics(model, modules, TEXTS, **options))


class Capped(nn.Module):
    """A model that changes what its last block gives in place, and makes its logits of those of its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 8), nn.Linear(8, 100)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": 3 * self.head(x.mul_(2)).tanh()}


def test_what_is_run_again_finds_outputs_as_they_were() -> None:
    torch.manual_seed(0)
    model = Capped()
    check(model, linear_layers(model, "head"), backwards=True)
