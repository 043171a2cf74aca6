"""What calibration costs: time as ratios to bare passes over the same tokens in the same run, and memory.

    python tests/benchmarks/calibration.py MODEL CALIBRATION [--windows 8] [--repeats 3]

MODEL is a folder that `from_pretrained` opens, or `demo`; CALIBRATION is a text file. The bare backward pass is that of the
same loss, cross entropy summed over the tokens, with gradients for the parameters, as in training.
Linux only: the peak of the resident memory is VmHWM.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from compress_model import memory
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import ReparamConfig, compress, text_batches
from reparam_peft.calibration import gather_statistics
from reparam_peft.demo import demo_folder
from reparam_peft.model import select_targets


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    source = str(demo_folder()) if options.model == "demo" else options.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the memory-mapped file
    text = options.calibration.read_text(encoding="utf-8")
    batches = text_batches(tokenizer, text, length=512, limit=options.windows, batch_size=2)
    config = ReparamConfig(target_modules="all-linear", keep=0.8)
    modules = {name: target.module for name, target in select_targets(model, config, "default").items()}

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
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = options.windows * 512
    print(f"{torch.get_num_threads()} threads, {tokens} tokens, median of {options.repeats}")
    for name, value in median.items():
        print(f"{name}: {value:.1f} s, {tokens / value:.0f} tokens/s")
    bare, inputs, both, everything = median.values()
    print(f"input statistics: {inputs / bare:.2f} × a bare forward pass")
    print(f"all statistics: {everything / both:.2f} × a bare forward and backward pass")

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    known = gather_statistics(model, modules, batches, progress=False)
    print(f"statistics hold {known.nbytes / 2**20:.0f} MiB; peak above the model {(memory('VmHWM') - before) / 2**20:.0f} MiB")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    compress(model, config, known, progress=False)
    took = time.perf_counter() - start
    print(f"everything else: {took:.1f} s; peak above the model {(memory('VmHWM') - before) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
