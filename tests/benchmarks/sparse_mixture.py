"""Makes a mixture of experts that routes sparsely of one whose experts are all active, by training it for a while.

    python tests/benchmarks/sparse_mixture.py MODEL TEXT FOLDER [--active 4] [--minutes 30]

MODEL is a folder with a Mixtral all of whose experts are active, as the teacher, too; TEXT is a text file. Routers start from
least squares: of the norm of what each expert makes of the inputs of its layer, on the first windows; experts that are active
add what they added when all were. Then everything learns from the teacher's logits, one window of 256 tokens in a step. FOLDER
gets the trained model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import text_batches

RIDGE = 1e-2  # of the least squares, relative to the mean variance of the inputs


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")
    windows = [batch["input_ids"] for batch in text_batches(tokenizer, text, length=256, batch_size=1)]
    teacher: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().requires_grad_(False)
    student: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()
    start_routers(student, teacher, windows[:8])
    for layer in student.model.layers:
        layer.mlp.gate.top_k = options.active
        # Weights of those that are active sum to 1: each adds what it added when all of them were.
        layer.mlp.experts.down_proj.data *= options.active / layer.mlp.experts.num_experts
    student.config.num_experts_per_tok = options.active
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)
    start, step, losses = time.monotonic(), 0, []
    while (passed := (time.monotonic() - start) / 60 / options.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, (step + 1) / 20) * (1 - passed)
        ids = windows[8 + step % (len(windows) - 8)]
        with torch.no_grad():
            expected = teacher(ids).logits.log_softmax(-1)
        loss = F.kl_div(student(ids).logits.log_softmax(-1), expected, log_target=True, reduction="none").sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        step += 1
        if step % 10 == 0:
            print(f"step {step}, {passed:.0%}: divergence {sum(losses[-10:]) / 10:.4f}", flush=True)
    student.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


@torch.no_grad()
def start_routers(student: Any, teacher: Any, windows: list[Tensor]) -> None:
    """Routers that rank experts by the norm of their output, as far as that is linear in the input."""
    for layer, of_teacher in zip(student.model.layers, teacher.model.layers, strict=True):
        inputs: list[Tensor] = []
        hook = of_teacher.mlp.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0].flatten(0, 1)))
        for ids in windows:
            teacher.model(ids)
        hook.remove()
        X = torch.cat(inputs)
        experts = of_teacher.mlp.experts
        norms = torch.stack([_made(experts, expert, X).norm(dim=1) for expert in range(experts.num_experts)], dim=1)
        norms = (norms - norms.mean(1, keepdim=True)) / norms.std()
        gram = X.mT @ X / len(X)
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
        layer.mlp.gate.weight.copy_(torch.linalg.solve(gram, X.mT @ norms / len(X)).mT)


def _made(experts: Any, expert: int, X: Tensor) -> Tensor:
    gate, up = F.linear(X, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])


if __name__ == "__main__":
    main()
