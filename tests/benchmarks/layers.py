"""Speed of a factorised linear layer against the dense one, with cold weights.

    OMP_NUM_THREADS=2 python tests/benchmarks/layers.py

Each call uses another copy of the weights, in turn, so that they come from memory as they do inside a large model: a layer
whose factors fit the cache and whose dense weight does not would otherwise look far too good. Dense and factorised calls
alternate; the ratio of medians is printed.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from reparam_peft.allocation import Storage, uniform_rank
from reparam_peft.factorized import FactorizedLinear

KEEP = 0.5
CACHE_BYTES = 256 * 2**20  # the copies of the smaller layer together are at least this large


def main() -> None:
    """Print one row per shape and number of tokens."""
    print(f"{torch.get_num_threads()} threads, float32, keep {KEEP}")
    print("| shape | rank | tokens | dense ms | factorised ms | speed-up |\n| --- | --- | --- | --- | --- | --- |")
    for size in (2048, 4096):
        rank = uniform_rank(KEEP, Storage(size, size))
        copies = max(3, -(-CACHE_BYTES // (4 * 2 * rank * size)))
        layers = {
            "dense": [nn.Linear(size, size, bias=False) for _ in range(copies)],
            "factorised": [FactorizedLinear(size, size, rank) for _ in range(copies)],
        }
        for tokens, rounds in ((512, 15), (1, 60)):
            x = torch.randn(tokens, size)
            times: dict[str, list[float]] = {name: [] for name in layers}
            with torch.inference_mode():
                for index in range(rounds + 2):
                    for name, modules in layers.items():
                        module = modules[index % copies]
                        start = time.perf_counter()
                        module(x)
                        if index >= 2:
                            times[name].append(1000 * (time.perf_counter() - start))
            dense, factorised = (statistics.median(times[name]) for name in ("dense", "factorised"))
            print(f"| {size}² | {rank} | {tokens} | {dense:.2f} | {factorised:.2f} | {dense / factorised:.2f} |", flush=True)


if __name__ == "__main__":
    main()
