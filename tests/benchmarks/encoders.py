"""Encoders under budgets of parameters, multiply-adds and measured time: how fast they are, beside how near they stay.

    python tests/benchmarks/encoders.py MODEL CALIBRATION TEST [--keep 0.9 0.7 0.5] [--length 128] [--repeats 9]

MODEL is the folder of a BERT-like encoder whose embeddings are the mean of its last hidden states. For each budget, form and
size: the mean cosine of the embeddings of test sentences to the dense model's, what is stored and multiplied of the targets,
and the time of the dense model over that of the compressed one, for a batch of 8 sequences of `--length` tokens: medians of
processor time, models taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from embeddings import batches_of, embed
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from reparam_peft import ReparamConfig, calibrate, compress
from reparam_peft.evaluation.speed import flush_caches

BATCH = 8
BUDGETS = ("parameters", "flops", "latency")


@torch.inference_mode()
def ratio(dense: nn.Module, small: nn.Module, batch: dict[str, Tensor], repeats: int) -> float:
    """Median processor time of the dense model over that of the other."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for repeat in range(repeats + 1):
        for index, model in enumerate((dense, small)):
            flush_caches(torch.device("cpu"))
            start = time.process_time()
            model(**batch)
            if repeat:
                seconds[index].append(time.process_time() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def multiplied(small: nn.Module) -> float:
    """The fraction of the multiplications of the targets that stays, for each row."""
    matrices = small.size_report().matrices
    dense = sum(matrix.dense_parameters for matrix in matrices)
    layers = {name: layer for name, layer in small.base_model.model.named_modules() if hasattr(layer, "reparam_factors")}
    stored = 0
    for matrix in matrices:
        if matrix.rank is None:
            stored += matrix.dense_parameters
        else:
            stored += sum(p.weight.numel() for p in layers[matrix.name].reparam_factors["default"].pieces.values())
    return stored / dense


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    parser.add_argument("--forms", nargs="+", default=["factors", "pivot"])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def base() -> nn.Module:
        return AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()

    dense, test = base(), batches_of(tokenizer, options.test, 200)
    expected = embed(dense, test)
    batch = {"input_ids": torch.arange(BATCH * options.length).view(BATCH, -1) % 20_000 + 1000}
    known = calibrate(
        base(), ReparamConfig(target_modules="all-linear"), batches_of(tokenizer, options.calibration, 1000), progress=False
    )
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; {known.tokens} tokens; batch {BATCH} x {options.length}"
    )
    print("| budget | form | keep | stored | multiplied | cosine | dense / form |\n| --- | --- | --- | --- | --- | --- | --- |")
    for form in options.forms:
        for budget in BUDGETS:
            for keep in options.keep:
                config = ReparamConfig(target_modules="all-linear", keep=keep, form=form, budget=budget)
                small = compress(base(), config, known, progress=False).eval()
                plain = small.to_standalone().eval()
                cosine = F.cosine_similarity(embed(plain, test), expected).mean()
                line = f"{small.size_report().keep:.3f} | {multiplied(small):.3f} | {cosine:.4f}"
                print(
                    f"| {budget} | {form} | {keep} | {line} | {ratio(dense, plain, batch, options.repeats):.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
