"""Excess loss on several kinds of text, by what was calibrated on: given text, text that the model wrote itself, and mixtures.

    python tests/benchmarks/self_written.py MODEL FOLDER --rows wiki:24 self@1:24 wiki:12+self@1:12
        [--calibration wiki=FILE …] [--test wiki=FILE handbook=FILE …] [--keep 0.8] [--heal 72 --bf16]

MODEL is a folder that `from_pretrained` opens, or `demo`. A row names what is calibrated on: the first windows, so many, of a
text of `--calibration`, of `reference` (Python's language reference), or of `self@T`, which the model writes at temperature T.
Tests take the first windows of each text of `--test`, and of Python's reference those from the 48th on. `--heal N` then heals
each model for N steps of one window, on what it was calibrated on, towards what the dense model predicts. FOLDER keeps texts
and statistics from one call to the next: of SmolLM2, 1.5 GB for each part. A GNU manual, as text of a handbook:
`zcat /usr/share/info/coreutils.info.gz | sed -n '2000,$p' > handbook.txt`. Prints a Markdown
table, and the seconds of each step.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from healing import heal
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import (
    ReparamConfig,
    Statistics,
    calibrate,
    compress,
    perplexity,
    self_written,
    text_batches,
)
from reparam_peft.cli.demo import demo_folder, reference_text

LENGTH, SET_ASIDE = 512, 48


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--calibration", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--test", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--test-windows", type=int, default=10)
    parser.add_argument("--most", type=int, default=24, help="windows that the model writes at each temperature")
    parser.add_argument("--part", type=int, default=12, help="windows whose statistics are kept together")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--heal", type=int, default=0, metavar="STEPS", help="of healing, one window each")
    parser.add_argument("--bf16", action="store_true", help="heal in bfloat16, which only some processors have")
    options = parser.parse_args()
    if options.bf16 and not options.heal:
        parser.error("--bf16 is for --heal")
    source = str(demo_folder()) if options.model == "demo" else options.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    options.folder.mkdir(exist_ok=True)
    files = dict(item.split("=", 1) for item in options.calibration)
    config = ReparamConfig(target_modules="all-linear", keep=options.keep)

    def base(dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()

    def windows(text: str, start: int, end: int | None, size: int) -> list[dict[str, Tensor]]:
        rows = torch.cat([batch["input_ids"] for batch in text_batches(tokenizer, text, length=LENGTH, limit=end)])[start:]
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(size)]

    def calibration(kind: str, start: int, end: int) -> list[dict[str, Tensor]]:
        if not kind.startswith("self@"):
            text = reference_text() if kind == "reference" else Path(files[kind]).read_text(encoding="utf-8")
            return windows(text, start, end, 2)
        path = options.folder / f"{kind}-{options.most}.safetensors"
        if not path.exists():
            began = time.perf_counter()
            temperature = float(kind.removeprefix("self@"))
            batches = self_written(base(), tokenizer, options.most, LENGTH, temperature=temperature, progress=False)
            save_file({"input_ids": torch.cat([batch["input_ids"] for batch in batches])}, path)
            print(f"{kind}: {options.most} windows written in {time.perf_counter() - began:.0f} s", flush=True)
        rows = load_file(path)["input_ids"][start:end]
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(2)]

    def statistics(kind: str, start: int, end: int) -> Statistics:
        path = options.folder / f"{kind}-{start}-{end}.statistics"
        if not path.exists():
            began = time.perf_counter()
            calibrate(base(), config, calibration(kind, start, end), progress=False, first_row=start).save(path)
            print(f"{kind}: windows {start} to {end} calibrated on in {time.perf_counter() - began:.0f} s", flush=True)
        return Statistics.load(path)

    def terms(spec: str) -> list[tuple[str, int]]:
        return [(kind, int(count)) for kind, count in (term.rsplit(":", 1) for term in spec.split("+"))]

    def row_of(spec: str) -> Statistics:
        total: Statistics | None = None
        for kind, count in terms(spec):
            for start in range(0, count, options.part):
                part = statistics(kind, start, min(start + options.part, count))
                total = part if total is None else total.merge(part)
                del part
        assert total is not None, "a row has a term"
        return total

    def report(row: str, model: Any, began: float) -> None:
        seconds = time.perf_counter() - began
        excess = [math.log(perplexity(model, batches) / dense[name]) for name, batches in tests.items()]
        print(f"| {row} | {' | '.join(f'{value:.3f}' for value in excess)} | <!-- {seconds:.0f} s -->", flush=True)

    def healed(spec: str, model: Any) -> None:
        batches = [batch for kind, count in terms(spec) for batch in calibration(kind, 0, count)]
        rows = [{"input_ids": row} for batch in batches for row in batch["input_ids"]]
        teacher = base(torch.bfloat16 if options.bf16 else torch.float32)
        with redirect_stdout(sys.stderr):  # the table is what is printed
            heal(model, teacher, rows, {"bf16": options.bf16, "max_steps": options.heal})

    tests = {"reference": windows(reference_text(), SET_ASIDE, SET_ASIDE + options.test_windows, 2)}
    for item in options.test:
        name, file = item.split("=", 1)
        tests[name] = windows(Path(file).read_text(encoding="utf-8"), 0, options.test_windows, 2)
    dense = {name: perplexity(base(), batches) for name, batches in tests.items()}
    print(f"{torch.get_num_threads()} threads, keep {options.keep}, dense {dense}", flush=True)
    print("| calibrated on | " + " | ".join(tests) + " |\n" + "| --- " * (1 + len(tests)) + "|", flush=True)
    for spec in options.rows:
        known = row_of(spec)
        began = time.perf_counter()
        model = compress(base(), config, known, progress=False)
        del known
        report(spec, model, began)
        if options.heal:
            began = time.perf_counter()
            healed(spec, model)
            report(f"and healed, {options.heal} steps", model, began)


if __name__ == "__main__":
    main()
