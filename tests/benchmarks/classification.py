"""A classifier, dense, compressed, and healed: accuracy on a labelled set made of Python's reference.

    python tests/benchmarks/classification.py MODEL [--keep 0.5] [--epochs 3]

MODEL is a folder of an encoder that `from_pretrained` opens. The set: passages of 24 words out of the ten longest topics of
`pydoc_data.topics`, to be told apart; a quarter of the passages is the test. The dense model is fine-tuned first. Compression
and healing see the training passages only; `HealingTrainer` runs with its defaults, which use no labels.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from reparam_peft import HealingTrainer, ReparamConfig, compress

TOPICS, WORDS, PASSAGES = 10, 24, 90


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--epochs", type=float, default=3)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, test = passages(tokenizer)
    torch.manual_seed(0)
    dense = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=TOPICS)
    trained(Trainer, dense, train, options.epochs, learning_rate=1e-4)
    print(f"{len(train)} training passages, {len(test)} of the test; dense accuracy {accuracy(dense, test):.3f}", flush=True)
    print("\n| keep | dense | compressed | healed | seconds of healing |\n" + "| --- " * 5 + "|")
    for keep in options.keep:
        base = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=TOPICS)
        base.load_state_dict(dense.state_dict())
        batches = [stacked(train[i : i + 16], labels=False) for i in range(0, len(train), 16)]
        small = compress(
            base, ReparamConfig(target_modules="all-linear", keep=keep, task_type="SEQ_CLS"), batches, progress=False
        )
        before = accuracy(small, test)
        start = time.perf_counter()
        trained(HealingTrainer, small, train, options.epochs, learning_rate=2e-4, teacher=dense)
        seconds = time.perf_counter() - start
        print(
            f"| {keep} | {accuracy(dense, test):.3f} | {before:.3f} | {accuracy(small, test):.3f} | {seconds:.0f} |", flush=True
        )


def passages(tokenizer: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test rows."""
    longest = sorted(topics, key=lambda name: -len(topics[name]))[:TOPICS]
    rows = []
    for label, name in enumerate(longest):
        words = topics[name].split()
        chunks = [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS + 1, WORDS)]
        random.Random(label).shuffle(chunks)
        encoded = tokenizer(chunks[:PASSAGES], truncation=True, max_length=64, padding="max_length", return_tensors="pt")
        rows += [{**{key: value[i] for key, value in encoded.items()}, "labels": label} for i in range(len(chunks[:PASSAGES]))]
    random.Random(0).shuffle(rows)
    split = 3 * len(rows) // 4
    return rows[:split], rows[split:]


def stacked(rows: list[dict[str, Any]], labels: bool = True) -> dict[str, torch.Tensor]:
    keys = [key for key in rows[0] if labels or key != "labels"]
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in keys}


def trained(
    trainer: type[Trainer], model: Any, rows: list[dict[str, Any]], epochs: float, learning_rate: float, **own: Any
) -> None:
    """Train a model, in place."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=learning_rate,
            warmup_steps=0.1,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer(model, arguments, train_dataset=rows, **own).train()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, rows: list[dict[str, Any]]) -> float:
    """Fraction of rows whose label is the likeliest class."""
    right = 0
    for i in range(0, len(rows), 32):
        batch = stacked(rows[i : i + 32])
        labels = batch.pop("labels")
        right += int((model.eval()(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


if __name__ == "__main__":
    main()
