"""Time of a layer of experts, factorised, beside the dense module of transformers.

    python tests/benchmarks/expert_speed.py [--shapes 128x768x2048x8 8x14336x4096x2] [--tokens 512 1] [--keep 0.5]
        [--multiple 1] [--rounds 7] [--device cpu] [--dtype float32]

A shape is experts x neurons x hidden size x experts of each token. Weights are random, factors of plain form at one share of
each matrix. The dense module computes in transformers' `eager` and `grouped_mm` ways; the factorised one by its loop over
experts and, on whatever device it is, together. Medians of alternating rounds in one process; prints a Markdown table of
ratios, dense by factorised, above 1 is faster, and how much the copies of factors take in a pass together.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from reparam_peft import ReparamConfig
from reparam_peft.layers import grouped_experts

WAYS = ("eager", "grouped_mm")
FACTORISED = {"loop": "eager", "together": "grouped_mm"}


class Layer(nn.Module):
    """A layer of experts by itself."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.experts = MixtralExperts(config)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.experts(*inputs)


def main() -> None:
    """Print the table."""
    print_table(parser_of_options().parse_args())


def parser_of_options() -> argparse.ArgumentParser:
    """What the script is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=["128x768x2048x8", "8x14336x4096x2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--multiple", type=int, default=1, help="of ranks, rounded down")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser


def print_table(options: argparse.Namespace) -> None:
    """Print the ratios of all shapes."""
    grouped_experts.DEVICES = grouped_experts.DEVICES | {torch.device(options.device).type}
    grouped_experts.LARGEST = math.inf
    print(f"{torch.get_num_threads()} threads, keep {options.keep:g}, {options.dtype}, {options.device}\n")
    ratios_of = [(way, by) for by in FACTORISED for way in WAYS]
    heads = " | ".join(f"{by} against {way}" for way, by in ratios_of)
    print(f"| experts x neurons x hidden x active | tokens | {heads} | copies |\n{'| --- ' * (len(ratios_of) + 3)}|")
    for shape in options.shapes:
        experts, neurons, hidden, active = map(int, shape.split("x"))
        sizes = {"hidden_size": hidden, "intermediate_size": neurons, "num_local_experts": experts}
        config = MixtralConfig(**sizes, num_experts_per_tok=active)
        dense = Layer(config).eval()
        for parameter in dense.parameters():
            nn.init.normal_(parameter, std=0.02)
        dense = dense.to(options.device, getattr(torch, options.dtype))
        small = get_peft_model(copy.deepcopy(dense), _config(options, dense.experts), autocast_adapter_dtype=False).eval()
        factors = sum(p.nbytes for name, p in small.named_parameters() if "reparam_factors" in name)
        for tokens in options.tokens:
            inputs = tuple(tensor.to(dense.experts.down_proj.device) for tensor in _inputs(tokens, hidden, experts, active))
            inputs = (inputs[0].to(dense.experts.down_proj.dtype), *inputs[1:])
            with torch.no_grad():
                times = _times(dense, small, inputs, options.rounds)
            ratios = [f"{times[way] / times[by]:.2f}" for way, by in ratios_of]
            reached = len(inputs[1].unique()) / experts
            print(f"| {shape} | {tokens} | {' | '.join(ratios)} | {reached * factors / 2**20:.0f} MiB |", flush=True)


def _config(options: argparse.Namespace, experts: MixtralExperts) -> ReparamConfig:
    """Of one rank for each parameter."""
    ranks = {}
    for name, parameter in experts.named_parameters():
        rows, columns = parameter.shape[1:]
        rank = int(options.keep * rows * columns / (rows + columns))
        ranks[f".*{name}.*"] = rank // options.multiple * options.multiple
    return ReparamConfig(target_modules=[], target_parameters="all-experts", r=1, rank_pattern=ranks, init_weights=False)


def _inputs(tokens: int, hidden: int, experts: int, active: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.rand(tokens, experts).topk(active).indices
    return torch.randn(tokens, hidden), chosen, torch.full((tokens, active), 1 / active)


def _times(dense: Any, small: Any, inputs: tuple[Tensor, ...], rounds: int) -> dict[str, float]:
    """Seconds of each way, medians."""

    def by(layer: Any, way: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            layer.experts.config._experts_implementation = way
            made: Tensor = layer(*inputs)
            if made.is_cuda:
                torch.cuda.synchronize()
            return made

        return run

    base = small.get_base_model()
    ways = {**{way: by(dense, way) for way in WAYS}, **{name: by(base, way) for name, way in FACTORISED.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
