"""Sentence embeddings of a compressed encoder: mean cosine similarity to the dense model's.

    python tests/benchmarks/embeddings.py MODEL CALIBRATION TEST [--keep 0.6] [--sentences 200]

MODEL is the folder of a BERT-like encoder whose embeddings are the mean of its last hidden states; calibration takes sentences
of one text, the test the first sentences of the other. The last row is one adapter for many sizes, loaded at this one.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from reparam_peft import ReparamConfig, calibrate, compress

ROWS = {
    "plain SVD, uniform, factors": {"method": "svd", "allocation": "uniform", "form": "factors"},
    "whitened, uniform, factors": {"output_metric": "none", "allocation": "uniform", "form": "factors"},
    "`compress`": {},
    "`compress`, no neurons lost": {"neurons": False},
    "`compress`, factors": {"form": "factors"},
}
MANY_SIZES = {"keep": 1.0, "form": "factors", "ceiling": 0.999}


def sentences(text: str, count: int | None) -> list[str]:
    """The first sentences of 40 to 300 characters."""
    parts = re.split(r"(?<=[.!?])\s+", text)
    return [part for part in parts if 40 <= len(part) <= 300 and "\n" not in part][:count]


def batches_of(tokenizer: Any, text: str, count: int | None) -> list[dict[str, Tensor]]:
    """The first sentences of a text in batches of 20, padded."""
    texts = sentences(text, count)
    return [dict(tokenizer(texts[i : i + 20], padding=True, return_tensors="pt")) for i in range(0, len(texts), 20)]


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Means of the last hidden states over the tokens, without padding."""
    means = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        means.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(means)


def main() -> None:
    """Print the similarities."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--sentences", type=int, default=200)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def base() -> nn.Module:
        return AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()

    def show(name: str, small: PeftModel) -> None:
        similarity = F.cosine_similarity(embed(small.eval(), test), expected).mean()
        print(f"{name}: cosine {similarity:.4f}, {small.size_report().keep:.4f} of the targeted parameters stored")

    test = batches_of(tokenizer, options.test.read_text(encoding="utf-8"), options.sentences)
    expected = embed(base(), test)
    known = calibrate(
        base(),
        ReparamConfig(target_modules="all-linear"),
        batches_of(tokenizer, options.calibration.read_text(encoding="utf-8"), 1000),
        progress=False,
    )
    print(f"calibrated on {known.tokens} tokens; {len(expected)} sentences, keep {options.keep}")
    for name, fields in ROWS.items():
        config = ReparamConfig(target_modules="all-linear", keep=options.keep, **fields)
        data_free = fields.get("method") == "svd"
        small = get_peft_model(base(), config) if data_free else compress(base(), config, known, progress=False)
        show(name, small)
    large = compress(base(), ReparamConfig(target_modules="all-linear", **MANY_SIZES), known, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        large.save_pretrained(folder)
        show("many sizes, loaded at this one", PeftModel.from_pretrained(base(), folder, keep=options.keep))


if __name__ == "__main__":
    main()
