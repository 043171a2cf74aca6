"""A head over a vocabulary as a product: with the diagonal of its gradients' second moments, which is kept of wide outputs.

    python tests/benchmarks/wide_head.py MODEL CALIBRATION TEST [--windows 3] [--keep 0.8 0.5]

The head of MODEL, a matrix of its own where it is tied, is compressed alone: without an output metric, and as by default. Of
each: perplexity on two windows of TEST, mean KL divergence from the model in nats per token, the process's largest memory.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import torch
from tables import compared
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import ReparamConfig, calibrate, compress
from reparam_peft.evaluation.text import text_batches


def main() -> None:
    """Print one line for each size and metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.8, 0.5])
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    seen, test = (
        list(text_batches(tokenizer, path.read_text(encoding="utf-8")[:60_000], batch_size=1, limit=limit))
        for path, limit in ((arguments.calibration, arguments.windows), (arguments.test, 2))
    )
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    weight = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        expected = [model(**batch).logits.log_softmax(-1) for batch in test]
    options: dict[str, Any] = {"target_modules": ["lm_head"], "allocation": "uniform", "form": "factors"}
    statistics = None
    for keep in arguments.keep:
        for metric in ("none", None):
            model.lm_head = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            model.lm_head.weight = nn.Parameter(weight.clone())
            config = ReparamConfig(**options, keep=keep, output_metric=metric)
            statistics = statistics or calibrate(model, ReparamConfig(**options, keep=keep), seen, progress=False)
            small = compress(model, config, statistics, progress=False)
            with torch.no_grad():
                perplexity, divergence = compared(small, test, expected)
            model = small.get_base_model()
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{keep:g} {metric or 'diagonal':9} perplexity {perplexity:.3f}  KL {divergence:.4f}  {memory:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
