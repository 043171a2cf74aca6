"""What calibration costs: processor time as ratios to bare passes over the same tokens in the same run, and memory.

    python tests/benchmarks/calibration.py MODEL CALIBRATION [--windows 8] [--repeats 3]
    python tests/benchmarks/calibration.py 512x8 [--windows 8] [--repeats 0]

MODEL is a folder that `from_pretrained` opens, or `demo`; or WIDTHxDEPTH for a Llama of random weights, fed random tokens, by
which to see how memory grows. CALIBRATION is a text file. `--repeats 0` measures memory only. The bare backward pass is that
of the same loss, cross entropy summed over the tokens, with gradients for the parameters, as in training.
Linux only: the peak of the resident memory is VmHWM.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compress_model import memory
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from reparam_peft import ReparamConfig, compress, text_batches
from reparam_peft.calibration.gather import gather_statistics
from reparam_peft.cli.demo import demo_folder
from reparam_peft.tuner.selection import select_targets


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path, nargs="?")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, batches = read(options.model, options.calibration, options.windows)
    config = ReparamConfig(target_modules="all-linear", keep=0.8)
    modules = {name: target.module for name, target in select_targets(model, config, "default").items()}

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    known = gather_statistics(model, modules, batches, progress=False)
    print(f"statistics hold {known.nbytes / 2**20:.0f} MiB; peak above the model {(memory('VmHWM') - before) / 2**20:.0f} MiB")

    if options.repeats:
        time_passes(model, modules, batches, options.repeats)

    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    compress(model, config, known, progress=False)
    peak = (memory("VmHWM") - before) / 2**20
    print(f"everything else: {time.perf_counter() - start:.1f} s; peak above the model, statistics included, {peak:.0f} MiB")


def read(name: str, text: Path | None, windows: int) -> tuple[Any, list[dict[str, Any]]]:
    """The model, and batches of two windows of 512 tokens."""
    if re.fullmatch(r"\d+x\d+", name):
        width, depth = map(int, name.split("x"))
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": depth, "vocab_size": 1000}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=width // 64)).eval()
        return model, [{"input_ids": torch.randint(1000, (2, 512))} for _ in range(windows // 2)]
    source = str(demo_folder()) if name == "demo" else name
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the memory-mapped file
    return model, text_batches(tokenizer, text.read_text(encoding="utf-8"), length=512, limit=windows, batch_size=2)


def time_passes(model: Any, modules: dict[str, Any], batches: list[dict[str, Any]], repeats: int) -> None:
    """Print medians of the bare passes and of those that gather statistics.

    The clock is the processor's, which other programs disturb less, or, where another device computes, that on the wall.
    """
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    def forward_and_backward() -> None:
        for batch in batches:
            logits = model(**batch).logits.flatten(0, 1)
            F.cross_entropy(logits, batch["input_ids"].flatten(), reduction="sum").backward()
            model.zero_grad()

    def gather(gradients: bool) -> Callable[[], object]:
        return lambda: gather_statistics(model, modules, batches, gradients=gradients, progress=False)

    runs = {
        "forward": forward,
        "forward with input statistics": gather(False),
        "forward and backward": forward_and_backward,
        "forward and backward with all statistics": gather(True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if model.device.type != "cpu":
                torch.accelerator.synchronize()
            if repeat:
                seconds[name].append(clock() - start)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    what = f"{torch.get_num_threads()} threads, processor time" if model.device.type == "cpu" else f"{model.device.type}, time"
    print(f"{what}, {tokens} tokens, median of {repeats}")
    for name, values in seconds.items():
        value = statistics.median(values)
        print(f"{name}: {value:.3g} s, {tokens / value:.0f} tokens/s")

    def ratio(one: str, other: str) -> float:
        """The median of the ratios within one round."""
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    inputs, everything = (ratio(with_statistics, bare) for bare, with_statistics in pairwise(runs) if "statistics" not in bare)
    print(f"input statistics: {inputs:.2f} × a bare forward pass")
    print(f"all statistics: {everything:.2f} × a bare forward and backward pass")


if __name__ == "__main__":
    main()
