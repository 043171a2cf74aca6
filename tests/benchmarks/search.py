"""A search beside one compression: the sizes that it finds, and what its trials cost.

    python tests/benchmarks/search.py MODEL CALIBRATION TEST [--increase 5% 20%] [--windows 48] [--trials 10] [--step 0.01]

MODEL is a folder that `from_pretrained` opens, or `demo`; CALIBRATION and TEST are text files. Calibration takes the first
`--windows` windows of 512 tokens of CALIBRATION, trials are measured on the 8 after those, and the result on the first 16 of
TEST. Sizes are multiples of `--step`: with 0.001, a search takes ten trials. The pass over the data is timed by itself, then
one compression from it, then each search from it; the pass is added to both. Ratios are of processor time, which other jobs of
a shared machine hardly change. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import ReparamConfig, calibrate, compress, perplexity, search, text_batches
from reparam_peft.cli.demo import demo_folder


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
    known, pass_over_data = timed(lambda: calibrate(base(), config, batches, progress=False))
    _, once = timed(lambda: compress(base(), config, known, progress=False))
    once += pass_over_data
    print(
        f"{torch.get_num_threads()} threads; dense {dense:.2f} on the test; minutes of processor time: {pass_over_data:.1f} for"
    )
    print(f"the pass over the data, {once:.1f} for one compression with it", flush=True)
    head = (
        "allowed",
        "keep",
        "trials",
        "perplexity of trials, dense",
        "on the test",
        "minutes",
        "of one compression",
        "trials alone",
    )
    print(f"\n| {' | '.join(head)} |\n{'| --- ' * len(head)}|")
    for increase in options.increase:
        how = {"keeps": keeps, "max_trials": options.trials, "progress": False}
        result, minutes = timed(lambda: search(base(), config, known, tolerance=increase, evaluation=unseen, **how))  # noqa: B023
        minutes += pass_over_data
        if result.chosen is None:
            raise SystemExit(f"nothing is within {increase}:\n{result}")
        got = perplexity(result.model, test)
        found = f"{result.chosen.metric:.2f}, {result.dense_metric:.2f}"
        alone = sum(trial.seconds for trial in result.trials) / 60
        cells = [f"{got:.2f} (+{got / dense - 1:.1%})", f"{minutes:.1f}", f"{minutes / once:.2f}", f"{alone:.1f} by the clock"]
        print(f"| {increase} | {result.chosen.keep:g} | {len(result.trials)} | {found} | {' | '.join(cells)} |", flush=True)
        print(f"\n{result}\n", flush=True)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the minutes of processor time that it took."""
    start = time.process_time()
    result = call()
    return result, (time.process_time() - start) / 60


if __name__ == "__main__":
    main()
