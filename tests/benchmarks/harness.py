"""lm-evaluation-harness on a dense model and on the standalone checkpoint of its compressed form.

    pip install lm-eval
    python tests/benchmarks/harness.py MODEL TEST [--calibration FILE] [--keep 0.8] [--documents 40]

MODEL is a folder with a dense causal language model, or `demo`; TEST a text file, of which two local tasks are made: to choose
the second half of a paragraph among four, given the first one; and the perplexity of the paragraphs. With `--calibration`, the
compression is calibrated on 48 windows of that text. Prints a Markdown table; the harness loads each checkpoint by itself.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import ReparamConfig, compress, text_batches
from reparam_peft.cli.demo import demo_folder

CHOICE = """
task: halves
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{first}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{whole}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


def documents(text: str, count: int) -> list[dict[str, object]]:
    """Paragraphs, cut in the middle, with the second halves of three others."""
    paragraphs = [line.strip() for line in text.splitlines() if 40 <= len(line.split()) <= 120][:count]
    halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in (line.split() for line in paragraphs)]
    order, rows = random.Random(0), []
    for i, (first, second) in enumerate(halves):
        others = order.sample([other for j, (_, other) in enumerate(halves) if j != i], 3)
        choices = [second, *others]
        order.shuffle(choices)
        texts = [" ".join(choice) for choice in choices]
        rows.append({"first": " ".join(first), "choices": texts, "right": choices.index(second), "whole": paragraphs[i]})
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("test", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--documents", type=int, default=40)
    options = parser.parse_args()
    source = str(demo_folder()) if options.model == "demo" else options.model
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        config = ReparamConfig(target_modules="all-linear", keep=options.keep)
        if options.calibration is None:
            small = get_peft_model(model, config)
        else:
            text = options.calibration.read_text(encoding="utf-8")
            small = compress(model, config, text_batches(tokenizer, text, length=512, limit=48, batch_size=2))
        small.to_standalone().save_pretrained(folder / "standalone")
        tokenizer.save_pretrained(folder / "standalone")
        rows = documents(options.test.read_text(encoding="utf-8"), options.documents)
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "tasks").mkdir()
        for name, task in (("choice", CHOICE), ("rolling", ROLLING)):
            (folder / f"tasks/{name}.yaml").write_text(task.replace("FILE", json.dumps(str(file))), encoding="utf-8")
        print(f"{len(rows)} documents, keep {options.keep}\n")
        print("| model | accuracy | accuracy, by length | word perplexity | bits per byte |\n" + "| --- " * 5 + "|")
        for name, path in (("dense", source), ("standalone", str(folder / "standalone"))):
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": path, "dtype": "auto"},
                tasks=["halves", "rolling"],
                task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
                device="cpu",
                batch_size=1,
                bootstrap_iters=0,
            )["results"]
            halves, rolling = results["halves"], results["rolling"]
            figures = [
                halves["acc,none"],
                halves["acc_norm,none"],
                rolling["word_perplexity,none"],
                rolling["bits_per_byte,none"],
            ]
            print(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main()
