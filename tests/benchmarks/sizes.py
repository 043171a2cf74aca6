"""One adapter for many sizes, loaded at some of them, beside compressions to those sizes.

    python tests/benchmarks/sizes.py MODEL CALIBRATION TEST [--sizes 0.9 0.8 0.6] [--windows 24]
        [--statistics FILE]

MODEL is a folder that `from_pretrained` opens; CALIBRATION and TEST are text files, of which the first windows of 512 tokens
are taken. FILE is read if it exists, else written. Prints a Markdown table of the perplexity on the first 8 windows of TEST.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import ReparamConfig, Statistics, calibrate, compress, perplexity, text_batches


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--statistics", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [path.read_text(encoding="utf-8") for path in (options.calibration, options.test)]
    calibration = text_batches(tokenizer, texts[0], batch_size=2, limit=options.windows)
    test = text_batches(tokenizer, texts[1], limit=8)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    def config(keep: float, form: str, ceiling: float | None = None) -> ReparamConfig:
        return ReparamConfig(target_modules="all-linear", keep=keep, form=form, ceiling=ceiling)

    if options.statistics is not None and options.statistics.exists():
        known = Statistics.load(options.statistics)
    else:
        known = calibrate(base(), config(1.0, "factors"), calibration)
        if options.statistics is not None:
            known.save(options.statistics)
    print(f"dense {perplexity(base(), test):.2f}\n", flush=True)
    print("| keep | loaded smaller | compressed to it | in pivot form |\n" + "| --- " * 4 + "|", flush=True)
    large = compress(base(), config(1.0, "factors", 0.999), known)
    with tempfile.TemporaryDirectory() as folder:
        large.save_pretrained(folder)
        print(f"| 1.0 (as made) | {perplexity(large, test):.2f} | | |", flush=True)
        del large
        for keep in options.sizes:
            smaller = PeftModel.from_pretrained(base(), folder, keep=keep)
            figures = [perplexity(smaller, test)]
            del smaller
            for form in ("factors", "pivot"):
                figures.append(perplexity(compress(base(), config(keep, form), known), test))
            print(f"| {keep} | {' | '.join(f'{figure:.2f}' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main()
