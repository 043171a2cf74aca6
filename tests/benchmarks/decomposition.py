"""Time and accuracy of `factorize` against `torch.linalg.svd` in float32.

    OMP_NUM_THREADS=2 python tests/benchmarks/decomposition.py [--repeats 3]

Two kinds of weights: Gaussian, whose spectrum is flat, and Gaussian with rows scaled by (i + 1)^−0.35, whose spectrum decays
as a trained layer's. The optimum of the error is the tail of the eigenvalues of the Gram matrix in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from reparam_peft import factorize
from reparam_peft.numerics.storage import Storage, uniform_rank


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def excess(weight: Tensor, rank: int) -> float:
    """‖W − A B‖_F over the optimum, minus one."""
    A, B = factorize(weight, rank)
    error = torch.linalg.norm(weight.double() - A.double() @ B.double())
    eigenvalues = torch.linalg.eigvalsh(weight.double() @ weight.double().mT)
    return float(error / eigenvalues[:-rank].clamp(min=0).sum().sqrt() - 1)


def main() -> None:
    """Print one row per shape and spectrum."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(f"{torch.get_num_threads()} threads, float32, rank at 50 % of the parameters, median of {repeats}")
    print("| shape | spectrum | rank | svd s | factorize s | speed-up | error over the optimum |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    torch.manual_seed(0)
    for shape in ((4096, 11008), (4096, 4096)):
        rank = uniform_rank(0.5, Storage(*shape))
        for spectrum in ("flat", "decaying"):
            weight = torch.randn(shape)
            if spectrum == "decaying":
                weight *= torch.arange(1, shape[0] + 1).pow(-0.35)[:, None]
            ours = statistics.median(seconds(lambda w=weight, r=rank: factorize(w, r)) for _ in range(repeats))
            theirs = statistics.median(
                seconds(lambda w=weight: torch.linalg.svd(w, full_matrices=False)) for _ in range(repeats)
            )
            row = f"| {shape[0]} × {shape[1]} | {spectrum} | {rank} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.2f}"
            print(f"{row} | {excess(weight, rank):.1e} |", flush=True)


if __name__ == "__main__":
    main()
