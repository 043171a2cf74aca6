"""Speed of a factorised linear layer against the dense one, and of the pivot form against the factors, with cold weights.

    OMP_NUM_THREADS=2 python tests/benchmarks/layers.py

Both forms store the same number of parameters, `keep` of the dense layer's. Each call uses another copy of the weights, in
turn, so that they come from memory as they do inside a large model: a layer whose factors fit the cache and whose dense weight
does not would otherwise look far too good. The three alternate; ratios of medians are printed.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from reparam_peft.layers.factorized_kinds import FactorizedLinear
from reparam_peft.numerics.storage import Storage, uniform_rank

KEEPS = (0.5, 0.8)
SHAPES = ((576, 576), (1536, 576), (2048, 2048), (4096, 4096))
CACHE_BYTES = 256 * 2**20  # the copies of the smaller layer together are at least this large
FORMS = ("factors", "pivot")


def main() -> None:
    """Print one row per shape, size and number of tokens."""
    print(f"{torch.get_num_threads()} threads, float32; speed-ups over dense, and of pivot over factors")
    print("| out × in | keep | ranks | tokens | dense ms | factors ms | pivot ms | factors | pivot | pivot / factors |")
    print("| --- " * 10 + "|")
    for out_features, in_features in SHAPES:
        for keep in KEEPS:
            ranks = {form: uniform_rank(keep, Storage(out_features, in_features, form)) for form in FORMS}
            stored = Storage(out_features, in_features).parameters(ranks["factors"])
            copies = min(max(3, -(-CACHE_BYTES // (4 * stored))), 200)
            layers: dict[str, list[nn.Module]] = {
                "dense": [nn.Linear(in_features, out_features, bias=False) for _ in range(copies)]
            }
            for form, rank in ranks.items():
                layers[form] = [product(in_features, out_features, rank, form) for _ in range(copies)]
            for tokens, rounds in ((512, 15), (1, 100)):
                dense, factors, pivot = times(layers, torch.randn(tokens, in_features), rounds)
                shown = " | ".join(f"{value:.3f}" for value in (dense, factors, pivot))
                ratios = " | ".join(f"{value:.2f}" for value in (dense / factors, dense / pivot, factors / pivot))
                shape = f"{out_features} × {in_features} | {keep} | {ranks['factors']}, {ranks['pivot']}"
                print(f"| {shape} | {tokens} | {shown} | {ratios} |", flush=True)


def product(in_features: int, out_features: int, rank: int, form: str) -> FactorizedLinear:
    """A factorised layer; in pivot form, with pivots spread over the outputs."""
    module = FactorizedLinear(in_features, out_features, rank, form)
    if form == "pivot":
        module.A.set_pivots(torch.randperm(out_features)[:rank].sort().values)
    return module.eval()


def times(layers: dict[str, list[nn.Module]], x: torch.Tensor, rounds: int) -> list[float]:
    """Median milliseconds of each kind of layer."""
    measured: dict[str, list[float]] = {name: [] for name in layers}
    with torch.inference_mode():
        for index in range(rounds + 2):
            for name, modules in layers.items():
                module = modules[index % len(modules)]
                start = time.perf_counter()
                module(x)
                if index >= 2:
                    measured[name].append(1000 * (time.perf_counter() - start))
    return [statistics.median(values) for values in measured.values()]


if __name__ == "__main__":
    main()
