"""Layers of experts of transformers' interface, in any layout, and what is routed to them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations import use_experts_implementation

EXPERTS, HIDDEN, NEURONS = 3, 8, 4
LAYOUTS = {
    "split": {},
    "without a gate": {"has_gate": False},
    "interleaved, transposed, with biases": {"is_concatenated": False, "is_transposed": True, "has_bias": True},
    "with a norm": {"has_post_expert_norm": True},
}


def fused(layout: str) -> Any:
    """Experts of transformers' interface, of random content."""
    options = LAYOUTS[layout]
    if not options.keys() <= inspect.signature(use_experts_implementation).parameters.keys():
        pytest.skip("transformers has no such experts yet")
    rows = NEURONS if options.get("has_gate") is False else 2 * NEURONS
    reader = "up_proj" if options.get("has_gate") is False else "gate_up_proj"

    class Experts(nn.Module):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__()
            self.num_experts = EXPERTS
            for key, shape in ((reader, (rows, HIDDEN)), ("down_proj", (HIDDEN, NEURONS))):
                stored = shape[::-1] if options.get("is_transposed") else shape
                setattr(self, key, nn.Parameter(torch.randn(EXPERTS, *stored)))
                if options.get("has_bias"):
                    setattr(self, f"{key}_bias", nn.Parameter(torch.randn(EXPERTS, shape[0])))
            self.act_fn = nn.ReLU()
            self.post_expert_norm = nn.LayerNorm(HIDDEN)

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            raise NotImplementedError

    if options.get("is_concatenated") is False:
        Experts._apply_gate = lambda self, made: made[..., ::2].sigmoid() * made[..., 1::2]  # type: ignore[attr-defined]
    torch.manual_seed(0)
    config = PretrainedConfig()
    config._experts_implementation = "grouped_mm"
    return use_experts_implementation(Experts, **options)(config)


def routing(tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states; two experts of each token, the last of which gets none, and of two tokens no second one; weights."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.tensor([[0, 1]]).repeat(tokens, 1)
    chosen[::3] = chosen[::3].flip(1)
    return torch.randn(tokens, HIDDEN, generator=generator), chosen, torch.rand(tokens, 2, generator=generator)
