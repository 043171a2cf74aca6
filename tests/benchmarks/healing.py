"""One-shot, sequential, refined, healed: perplexity and excess loss at the same stored parameters, on two kinds of text.

    python tests/benchmarks/healing.py MODEL CALIBRATION TEST [--keep 0.6] [--rows one-shot sequential refined healed]
        [--written 24] [--statistics FILE] [--run-folder FOLDER] [--minutes 30] [--healing-length 256]
        [--teacher FOLDER] [--device cuda] [--config '{"neurons": false}'] [--training '{"max_steps": 80}']
        [--healing '{"distillation": 0.5}']

MODEL is a folder that `from_pretrained` opens, or `demo`; CALIBRATION and TEST are text files. Statistics take the first 48
windows of 512 tokens of CALIBRATION, or so many fewer and `--written` that the model writes itself; sequential factorisation
and refinement take the first `--windows`; healing goes on after those, in one pass, for `--minutes` or `max_steps`, in
windows of `--healing-length`. The test takes the first 16 windows of TEST, and of Python's language reference, which is never
trained on. `--held-out N` tests on N windows of CALIBRATION from the 200th on instead, from which training then keeps away:
what constants are chosen on. Prints a Markdown table, and the minutes that each step took.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from reparam_peft import (
    Anchoring,
    HealingTrainer,
    Refinement,
    ReparamConfig,
    Statistics,
    calibrate,
    compress,
    perplexity,
    plan,
    self_written,
    text_batches,
)
from reparam_peft.cli.demo import demo_folder, reference_text

STATISTICS_WINDOWS, HELD_OUT, LENGTH = 48, 200, 512
ROWS = ("one-shot", "sequential", "refined", "healed")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--windows", type=int, default=128, help="of the calibration text, for blocks")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a step")
    parser.add_argument("--original", type=float, default=Anchoring.original, help="beta")
    parser.add_argument("--residual", type=float, default=Anchoring.residual, help="gamma")
    parser.add_argument("--refine-one-shot", action="store_true", help="refine one-shot factors, not sequential ones")
    parser.add_argument("--refinement", type=json.loads, default={}, help="fields of Refinement, as JSON")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of ReparamConfig, as JSON")
    parser.add_argument("--minutes", type=float, default=30, help="of healing, where --training has no `max_steps`")
    parser.add_argument("--training", type=json.loads, default={}, help="fields of TrainingArguments, as JSON")
    parser.add_argument("--bf16", action="store_true", help="heal in bfloat16, which only some processors have")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="for all that is computed")
    parser.add_argument("--healing-length", type=int, default=LENGTH, help="tokens of a window of healing, a part of 512")
    parser.add_argument("--written", type=int, default=0, help="windows that the model writes itself, of statistics to be made")
    parser.add_argument("--healing", type=json.loads, default={}, help="arguments of HealingTrainer, as JSON")
    parser.add_argument("--teacher", help="of healing, in place of the model itself, such as one that has learnt the text")
    parser.add_argument("--mixture", type=float, default=0.0, help="part of the healing windows that is of Python's reference")
    parser.add_argument("--statistics", type=Path, help="file to keep statistics in, from one run to the next")
    parser.add_argument("--run-folder", type=Path)
    parser.add_argument("--held-out", type=int, default=0)
    options = parser.parse_args()
    if LENGTH % options.healing_length or not 0 <= options.written <= STATISTICS_WINDOWS:
        parser.error(f"--healing-length must divide {LENGTH}, and --written be at most {STATISTICS_WINDOWS}")
    source = str(demo_folder()) if options.model == "demo" else options.model
    tokenizer = AutoTokenizer.from_pretrained(source)

    def base(dtype: torch.dtype = torch.float32, folder: str = source) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(options.device)

    def windows(text: str, start: int, end: int | None, size: int = 4) -> list[dict[str, Tensor]]:
        batches = text_batches(tokenizer, text, length=LENGTH, limit=end, batch_size=1)[start:]
        return [
            {key: torch.cat([batch[key] for batch in batches[i : i + size]]).to(options.device) for key in batches[0]}
            for i in range(0, len(batches), size)
        ]

    calibration, other = options.calibration.read_text(encoding="utf-8"), reference_text()
    if options.held_out:
        test = windows(calibration, HELD_OUT, HELD_OUT + options.held_out)
    else:
        test = windows(options.test.read_text(encoding="utf-8"), 0, 16)
    elsewhere = windows(other, 0, 16)
    blocks = windows(calibration, 0, options.windows, options.batch_size)
    dense = {"test": perplexity(base(), test), "other": perplexity(base(), elsewhere)}
    print(
        f"{torch.get_num_threads()} threads, keep {options.keep}, dense {dense['test']:.2f} and {dense['other']:.2f}",
        flush=True,
    )
    config = ReparamConfig(**{"target_modules": "all-linear", "keep": options.keep, **options.config})
    minutes = 0.0

    def report(row: str, model: Any) -> None:
        got = {"test": perplexity(model, test), "other": perplexity(model, elsewhere)}
        kept = model.peft_config["default"].stored_parameters / model.peft_config["default"].dense_parameters
        cells = [f"{got[kind]:.2f} | +{math.log(got[kind] / dense[kind]):.3f}" for kind in dense]
        print(f"| {row} | {kept:.4f} | {' | '.join(cells)} | {minutes:.1f} |", flush=True)

    start = time.perf_counter()
    if options.statistics is not None and options.statistics.exists():
        known = Statistics.load(options.statistics)
    else:
        given = STATISTICS_WINDOWS - options.written
        texts = windows(calibration, 0, given, 2) if given else []
        if options.written:
            texts += self_written(base(), tokenizer, options.written, LENGTH, progress=False)
        known = calibrate(base(), config, texts)
        if options.statistics is not None:
            known.save(options.statistics)
    print(f"statistics: {(time.perf_counter() - start) / 60:.1f} minutes")
    start = time.perf_counter()
    ranks = plan(base(), config, known, progress=False)
    print(f"plan: {(time.perf_counter() - start) / 60:.1f} minutes")
    print("\n| | kept | perplexity | excess loss | of other text | excess loss | minutes |\n" + "| --- " * 7 + "|", flush=True)
    anchoring = Anchoring(options.original, options.residual)
    model = None
    for row in options.rows:
        start = time.perf_counter()
        if row == "one-shot":
            model = compress(base(), config, known, plan=ranks, progress=False)
        elif row == "sequential":
            model = compress(base(), config, blocks, plan=ranks, statistics=known, sequential=anchoring, progress=False)
        elif row == "refined":
            ways = {"sequential": False if options.refine_one_shot else anchoring, "refine": Refinement(**options.refinement)}
            ways["run_folder"] = options.run_folder
            model = compress(base(), config, blocks, plan=ranks, statistics=known, **ways, progress=False)
        else:
            if model is None:
                raise SystemExit("`healed` needs another row before it")
            rows = windows(calibration, options.windows, HELD_OUT if options.held_out else None, 1)
            rows += windows(other, 16, None, 1)[: round(len(rows) * options.mixture)]
            size = options.healing_length
            examples = [
                {key: value[0, start : start + size].cpu() for key, value in window.items()}
                for window in rows
                for start in range(0, LENGTH, size)
            ]
            training = {"bf16": options.bf16, "logging_steps": 0.1, "seed": 0, **options.training}
            teacher = base(torch.bfloat16 if training["bf16"] else torch.float32, options.teacher or source)
            within = None if training.get("max_steps", -1) > 0 else options.minutes
            trainer = heal(model, teacher, examples, training, minutes=within, **options.healing)
            losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
            print(f"{trainer.state.global_step} steps, losses {losses}", flush=True)
        minutes = (time.perf_counter() - start) / 60
        report(row, model)
    if options.run_folder is not None and (options.run_folder / "log.jsonl").exists():
        print("\nblock errors:\n" + (options.run_folder / "log.jsonl").read_text(encoding="utf-8"))


def heal(
    model: Any, teacher: Any, examples: list[dict[str, Tensor]], training: dict[str, Any], **healing: Any
) -> HealingTrainer:
    """Train in place. `training` goes before what `TrainingArguments` are here, `healing` to the trainer, which is returned."""
    usual = {"per_device_train_batch_size": 1, "learning_rate": 5e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    usual |= {"use_cpu": teacher.device.type == "cpu", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **{**usual, **training})
        trainer = HealingTrainer(model, arguments, train_dataset=examples, teacher=teacher, **healing)
        trainer.train()
    model.eval()
    return trainer


if __name__ == "__main__":
    main()
