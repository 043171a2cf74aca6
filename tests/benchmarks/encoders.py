"""Encoders under budgets of parameters, multiply-adds and measured time: how fast they are, beside how near they stay.

    python tests/benchmarks/encoders.py MODEL CALIBRATION TEST [--keep 0.9 0.7 0.5] [--length 128] [--repeats 9]
    python tests/benchmarks/encoders.py whisper-tiny [--keep 0.9 0.7 0.5]

MODEL is the folder of a BERT-like encoder whose embeddings are the mean of its last hidden states. For each budget, form and
size: the mean cosine of the embeddings of test sentences to the dense model's, what is stored and multiplied of the targets,
and the time of the dense model over that of the compressed one, for a batch of 8 sequences of `--length` tokens: medians of
processor time, models taking turns. `whisper-tiny` is a speech encoder of that size with weights at random, on 30 seconds of
noise that changes slowly: its times are those of the real one, its cosines are of matrices that no training has made
compressible.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from embeddings import batches_of, embed
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from reparam_peft import ReparamConfig, calibrate, compress
from reparam_peft.evaluation.speed import flush_caches

BATCH = 8
BUDGETS = ("parameters", "flops", "latency")


@dataclass(frozen=True)
class Encoder:
    """What is compressed, on what it is calibrated, and how what comes out is judged and timed."""

    base: Callable[[], nn.Module]  # makes the dense model
    calibration: list[dict[str, Tensor]]
    timed: dict[str, Tensor]  # one batch
    embed: Callable[[nn.Module], Tensor]  # embeddings (inputs, size) of the test inputs


def of_text(options: argparse.Namespace) -> Encoder:
    """A BERT-like encoder out of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    test = batches_of(tokenizer, options.test.read_text(encoding="utf-8"), 200)
    return Encoder(
        base=lambda: AutoModel.from_pretrained(options.model, dtype=torch.float32).eval(),
        calibration=batches_of(tokenizer, options.calibration.read_text(encoding="utf-8"), 1000),
        timed={"input_ids": torch.arange(BATCH * options.length).view(BATCH, -1) % 20_000 + 1000},
        embed=lambda model: embed(model, test),
    )


def of_speech() -> Encoder:
    """The encoder of Whisper's smallest size, with weights at random."""
    sizes = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
    torch.manual_seed(0)
    weights = WhisperEncoder(WhisperConfig(**sizes)).state_dict()

    def base() -> nn.Module:
        model = WhisperEncoder(WhisperConfig(**sizes))
        model.load_state_dict(weights)
        return model.eval()

    def spectrogram(seed: int) -> dict[str, Tensor]:
        steps = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(seed))
        return {"input_features": F.avg_pool1d(steps, 25, 1, 12) * 5}

    test = [spectrogram(1000 + index) for index in range(8)]

    @torch.no_grad()
    def positions(model: nn.Module) -> Tensor:
        return torch.cat([model(**batch).last_hidden_state.flatten(0, 1) for batch in test])

    return Encoder(base, [spectrogram(index) for index in range(12)], spectrogram(12), positions)


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
    parser.add_argument("calibration", type=Path, nargs="?")
    parser.add_argument("test", type=Path, nargs="?")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    parser.add_argument("--forms", nargs="+", default=["factors", "pivot"])
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=BUDGETS)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if options.model != "whisper-tiny" and not options.test:
        parser.error("a model out of a folder needs two texts, CALIBRATION and TEST")
    encoder = of_speech() if options.model == "whisper-tiny" else of_text(options)
    dense = encoder.base()
    expected = encoder.embed(dense)
    known = calibrate(encoder.base(), ReparamConfig(target_modules="all-linear"), encoder.calibration, progress=False)
    shape = " x ".join(str(size) for tensor in encoder.timed.values() for size in tensor.shape)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; {known.tokens} tokens; a batch of {shape}")
    print("| budget | form | keep | stored | multiplied | cosine | dense / form |\n| --- | --- | --- | --- | --- | --- | --- |")
    for form in options.forms:
        for budget in options.budgets:
            for keep in options.keep:
                config = ReparamConfig(target_modules="all-linear", keep=keep, form=form, budget=budget)
                small = compress(encoder.base(), config, known, progress=False).eval()
                plain = small.to_standalone().eval()
                cosine = F.cosine_similarity(encoder.embed(plain), expected).mean()
                line = f"{small.size_report().keep:.3f} | {multiplied(small):.3f} | {cosine:.4f}"
                faster = ratio(dense, plain, encoder.timed, options.repeats)
                print(f"| {budget} | {form} | {keep} | {line} | {faster:.2f} |", flush=True)


if __name__ == "__main__":
    main()
