"""A search beside one compression: the sizes that it finds, and what its trials cost.

    python tests/benchmarks/search.py MODEL CALIBRATION TEST [--increase 5% 20%] [--windows 48] [--trials 10] [--step 0.01]

MODEL is a folder that `from_pretrained` opens, or `demo`; CALIBRATION and TEST are text files. Calibration takes the first
`--windows` windows of 512 tokens of CALIBRATION, trials are measured on the 8 after those, and the result on the first 16 of
TEST. Sizes are multiples of `--step`: with 0.001, a search takes ten trials. One compression, data included, is timed first,
then each search from the same data. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import ReparamConfig, compress, perplexity, search, text_batches
from reparam_peft.demo import demo_folder


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--increase", nargs="+", default=["5%", "20%"])
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--step", type=float, default=0.01)
    options = parser.parse_args()
    keeps = [i * options.step for i in range(1, round(1 / options.step)) if i * options.step >= 0.05]
    source = str(demo_folder()) if options.model == "demo" else options.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = options.calibration.read_text(encoding="utf-8")
    windows = text_batches(tokenizer, text, length=512, batch_size=2, limit=options.windows + 8)
    batches, unseen = windows[: options.windows // 2], windows[options.windows // 2 :]
    test = text_batches(tokenizer, options.test.read_text(encoding="utf-8"), length=512, limit=16)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    config = ReparamConfig(target_modules="all-linear")
    dense = perplexity(base(), test)
    start = time.perf_counter()
    compress(base(), config, batches, progress=False)
    once = time.perf_counter() - start
    print(
        f"{torch.get_num_threads()} threads; dense {dense:.2f} on the test; one compression {once / 60:.1f} minutes", flush=True
    )
    print(
        "\n| allowed | keep | trials | perplexity of trials, dense | on the test | minutes | of one compression |\n"
        + "| --- " * 7
        + "|"
    )
    for increase in options.increase:
        start = time.perf_counter()
        how = {"keeps": keeps, "max_trials": options.trials, "progress": False}
        result = search(base(), config, batches, tolerance=increase, evaluation=unseen, **how)
        seconds = time.perf_counter() - start
        if result.chosen is None:
            raise SystemExit(f"nothing is within {increase}:\n{result}")
        got = perplexity(result.model, test)
        found = f"{result.chosen.metric:.2f}, {result.dense_metric:.2f}"
        cells = [f"{got:.2f} (+{got / dense - 1:.1%})", f"{seconds / 60:.1f}", f"{seconds / once:.2f}"]
        print(f"| {increase} | {result.chosen.keep:g} | {len(result.trials)} | {found} | {' | '.join(cells)} |", flush=True)
        print(f"\n{result}\n", flush=True)


if __name__ == "__main__":
    main()
