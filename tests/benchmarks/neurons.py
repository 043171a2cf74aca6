"""Speed of models whose MLPs have lost neurons, beside models of equal size by ranks alone, and the dense ones.

    python tests/benchmarks/neurons.py WITH.json WITHOUT.json [--threads 1 2] [--prompt 256] [--repeats 5]

WITH and WITHOUT are plans of one Llama at one size, from `reparam plan --output`, the second with `--no-neurons`. Two models
get random weights in the shapes of the plans: the Llama itself, and one of 2048 × 8192 with 6 layers, whose ranks and neurons
are the same fractions as in evenly spaced layers of the plan. The three models of a row run in turn, with cold weights
(`reparam_peft.benchmark`): medians, as ratios to the dense model. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reparam_peft import Plan, benchmark
from reparam_peft.standalone.checkpoint import CheckpointConfig
from reparam_peft.standalone.from_config import factorized

WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 32}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("plans", nargs=2, type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], help="of the Llama: for queries, and for keys")
    options = parser.parse_args()
    plans = [Plan.load(path) for path in options.plans]
    shapes = {module.name: module.shape for module in plans[0].modules}
    (out, width), layers = shapes["model.layers.0.mlp.gate_proj"], sum(name.endswith("gate_proj") for name in shapes)
    own = {"hidden_size": width, "intermediate_size": out, "num_hidden_layers": layers, "num_attention_heads": options.heads[0]}
    configs = [LlamaConfig(**own, num_key_value_heads=options.heads[1]), LlamaConfig(**WIDE, num_key_value_heads=8)]
    head = ["prefill, dense / ranks", "with neurons", "gain", "decode, dense / ranks", "with neurons", "gain"]
    print(f"| Llama | threads | stored | {' | '.join(head)} |\n" + "| --- " * 9 + "|")
    for config in configs:
        dense = model_of(config)
        small = [factorized(model_of(config), CheckpointConfig(layers_of(plan, dense))).eval() for plan in plans]
        linear = [sum(p.numel() for p in model.model.layers.parameters()) for model in (dense, *small)]
        for threads in options.threads:
            torch.set_num_threads(threads)
            sizes = {"prompt_length": options.prompt, "new_tokens": options.new_tokens, "repeats": options.repeats}
            fewer, ranks = (benchmark(model, dense, **sizes) for model in small)
            # Both against the dense model of the same run, so that noise hits the two sides of a ratio alike.
            prefill = (ranks.prefill_speedup, fewer.prefill_speedup)
            decode = (ranks.decode_speedup or 0.0, fewer.decode_speedup or 0.0)
            cells = [f"{a:.2f} | {b:.2f} | {b / a:.2f}" for a, b in (prefill, decode) if a and b]
            stored = f"{linear[2] / linear[0]:.3f}, {linear[1] / linear[0]:.3f}"
            name = f"{config.hidden_size} × {config.intermediate_size}, {config.num_hidden_layers} layers"
            print(f"| {name} | {threads} | {stored} | {' | '.join(cells)} |", flush=True)


def model_of(config: LlamaConfig) -> Any:
    """A Llama of random weights with a small vocabulary, so that its blocks are what takes the time."""
    config.vocab_size = 1000
    return LlamaForCausalLM(config).eval()


def layers_of(plan: Plan, model: Any) -> dict[str, dict[str, Any]]:
    """What `config.json` would say of a model whose layers keep the fractions of ranks and neurons that the plan gives.

    Args:
        plan: of a Llama, perhaps of other sizes.
        model: the Llama.
    """
    depth = sum(module.name.endswith("gate_proj") for module in plan.modules)
    planned = {module.name: module for module in plan.modules}
    layers = {}
    count = model.config.num_hidden_layers
    for layer in range(count):
        source = layer if count == depth else round((layer + 0.5) * depth / count - 0.5)
        for name, module in model.model.layers[layer].named_modules():
            of_plan = planned.get(f"model.layers.{source}.{name}")
            if of_plan is None or of_plan.rank is None:
                continue
            shape = (module.out_features, module.in_features)
            size = tuple(
                full if left == whole else eight(left / whole * full)
                for full, left, whole in zip(shape, of_plan.size or of_plan.shape, of_plan.shape, strict=True)
            )
            full_rank = min(of_plan.size or of_plan.shape)
            as_one = of_plan.size is not None and of_plan.rank == full_rank
            rank = min(size) if as_one else min(eight(of_plan.rank / full_rank * min(size)), min(size))
            form = "dense" if as_one else plan.form
            if size != shape and rank == min(size):
                form = "dense"
            narrow = {"out": size[0], "in": size[1]} if size != shape else {}
            layers[f"model.layers.{layer}.{name}"] = {"rank": rank, "form": form, "bias": False, **narrow}
    return layers


def eight(number: float) -> int:
    """The nearest multiple of 8, at least 8."""
    return max(8, 8 * round(number / 8))


if __name__ == "__main__":
    main()
