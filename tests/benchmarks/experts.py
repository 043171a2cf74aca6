"""Experts of a mixture, compressed: perplexity at equal stored parameters, beside plain and whitened SVD and dropped experts.

    python tests/benchmarks/experts.py MODEL CALIBRATION TEST [--keep 0.8] [--rows ours whitened svd dropped]
        [--statistics FILE] [--windows 48]

MODEL is a folder with a Mixtral; CALIBRATION and TEST are text files, of which the first `--windows` and 16 windows of 512
tokens are taken. Attention and experts are compressed. `ours` is `compress`; `whitened` and `svd` factorise each expert by
itself at one share of its size; `dropped` leaves out those experts of each layer whose output, weighed by the router, has the
least mean norm (REAP, arXiv:2510.13999), as few as make the model no smaller than asked for. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import ReparamConfig, Statistics, calibrate, compress, perplexity, text_batches

ROWS = ("ours", "whitened", "svd", "dropped")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--statistics", type=Path, help="file to keep statistics in, from one run to the next")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--config", nargs="*", default=[], help="fields of the config for `ours`, as neurons=False")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    def windows(path: Path, count: int) -> list[dict[str, Tensor]]:
        return text_batches(tokenizer, path.read_text(encoding="utf-8"), length=512, limit=count, batch_size=2)

    calibration, test = windows(options.calibration, options.windows), windows(options.test, 16)
    dense = perplexity(base(), test)
    print(f"{torch.get_num_threads()} threads, dense {dense:.2f}", flush=True)
    targets: dict[str, Any] = {"target_modules": "all-linear", "target_parameters": "all-experts"}
    if options.statistics is not None and options.statistics.exists():
        known = Statistics.load(options.statistics)
    else:
        start = time.perf_counter()
        known = calibrate(base(), ReparamConfig(**targets), calibration)
        print(f"statistics: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
        if options.statistics is not None:
            known.save(options.statistics)
    chosen = {name: {"True": True, "False": False}[value] for name, value in (item.split("=") for item in options.config)}
    print("\n| keep | | kept | perplexity | excess loss | minutes |\n" + "| --- " * 6 + "|", flush=True)
    for keep in options.keep:
        for row in options.rows:
            start = time.perf_counter()
            if row == "dropped":
                model, kept = base(), 1.0
                kept = drop_experts(model, keep, calibration)
            else:
                fields = {
                    "ours": chosen,
                    "whitened": {"output_metric": "none", "allocation": "uniform", "form": "factors"},
                    "svd": {"method": "svd", "allocation": "uniform", "form": "factors"},
                }[row]
                model = compress(base(), ReparamConfig(**targets, keep=keep, **fields), known, progress=False)
                kept = model.size_report().keep
            value = perplexity(model, test)
            minutes = (time.perf_counter() - start) / 60
            cells = [f"{keep:g}", row, f"{kept:.4f}", f"{value:.2f}", f"+{math.log(value / dense):.3f}", f"{minutes:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def drop_experts(model: Any, keep: float, batches: Sequence[dict[str, Tensor]]) -> float:
    """Leave experts out of each layer, in place, and return the share of the matrices that is left, at least `keep`."""
    layers = model.model.layers
    with scores_of(model) as scores:
        for batch in batches:
            with torch.no_grad():
                model(**{key: value for key, value in batch.items() if key != "labels"})
    of_experts = sum(p.numel() for layer in layers for p in layer.mlp.experts.parameters())
    linear = sum(m.weight.numel() for layer in layers for m in layer.self_attn.modules() if isinstance(m, nn.Linear))
    experts = layers[0].mlp.experts.num_experts
    left = max(layers[0].mlp.gate.top_k, math.ceil((keep * (of_experts + linear) - linear) / of_experts * experts - 1e-9))
    for layer, score in zip(layers, scores, strict=True):
        stays = score[0].div(score[1].clamp(min=1)).topk(left).indices.sort().values
        for owner, name in ((layer.mlp.experts, "gate_up_proj"), (layer.mlp.experts, "down_proj"), (layer.mlp.gate, "weight")):
            setattr(owner, name, nn.Parameter(getattr(owner, name)[stays].detach().clone()))
        layer.mlp.experts.num_experts = left
    model.config.num_local_experts = left
    return (linear + of_experts * left / experts) / (linear + of_experts)


@contextmanager
def scores_of(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within this block, of each layer and expert: the sum of the router's weight times the norm of the output, and rows."""
    scores: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        for layer in model.model.layers:
            experts = layer.mlp.experts
            total, rows = torch.zeros(experts.num_experts), torch.zeros(experts.num_experts)
            scores.append((total, rows))

            def add(module: Any, args: Any, total: Tensor = total, rows: Tensor = rows) -> None:
                hidden, chosen, weights = args
                for expert in range(module.num_experts):
                    token, position = (chosen == expert).nonzero(as_tuple=True)
                    gate, up = nn.functional.linear(hidden[token], module.gate_up_proj[expert]).chunk(2, dim=-1)
                    y = nn.functional.linear(module.act_fn(gate) * up, module.down_proj[expert])
                    total[expert] += (y.norm(dim=1) * weights[token, position]).sum()
                    rows[expert] += len(token)

            stack.callback(experts.register_forward_pre_hook(torch.no_grad()(add)).remove)
        yield scores


if __name__ == "__main__":
    main()
