"""The SHA-256 of every file that a fixed seed gives: plans, adapters and standalone checkpoints of a decoder and an encoder.

    python tests/benchmarks/checkpoint_bytes.py > after.txt

Run before and after a change that is to leave results alone, on the same machine and with the same libraries, and compare the
two outputs. It uses public names only, so that an older checkout can be measured with this file: `PYTHONPATH=OLDER python …`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainingArguments

from reparam_peft import HealingTrainer, Refinement, ReparamConfig, calibrate, compress, compress_checkpoint, plan, retruncate

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}


def decoder() -> PreTrainedModel:
    """A Llama of three layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=128)).eval()


def encoder() -> PreTrainedModel:
    """A BERT of three layers, whose layers have biases."""
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=128)).eval()


def batches() -> list[dict[str, Tensor]]:
    """Random tokens, of which the last batch has padding."""
    generator = torch.Generator().manual_seed(1)
    made = [{"input_ids": torch.randint(3, 100, (4, 48), generator=generator)} for _ in range(6)]
    for batch in made:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    made[-1]["attention_mask"][1:, 40:] = 0
    return made


def config(**options: object) -> ReparamConfig:
    """All linear layers at keep 0.6."""
    return ReparamConfig(target_modules="all-linear", **{"keep": 0.6, **options})


def report(name: str, save: Callable[[Path], object]) -> None:
    """Print a line for each file that `save` writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()[:24]
                print(f"{name}: {path.relative_to(folder).as_posix()} {digest}", flush=True)


def compressed(base: Callable[[], PreTrainedModel], **options: object) -> PeftModel:
    """A model compressed with statistics of its own."""
    return compress(base(), config(), batches(), seed=3, progress=False, **options)


def healed(base: Callable[[], PreTrainedModel], model: PeftModel) -> PeftModel:
    """A model trained for two steps to predict what the dense one predicts."""
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches() for i in range(4)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # `Trainer` prints times
        arguments = TrainingArguments(folder, max_steps=2, report_to=[], save_strategy="no", use_cpu=True, seed=0)
        HealingTrainer(model, arguments, train_dataset=rows, teacher=base(), hidden=0.1).train()
    return model


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for base in (decoder, encoder):
        kind = base.__name__
        statistics = calibrate(base(), config(), batches(), seed=3, progress=False)
        many_sizes = config(keep=0.9, form="factors", ceiling=0.95)
        budgets = plan(base(), config(), statistics)
        report(f"{kind}, plan", lambda folder, budgets=budgets: budgets.save(folder / "plan.json"))
        adapters = {
            "data-free": lambda base=base: get_peft_model(base(), config()),
            "pivot, data-free": lambda base=base: get_peft_model(base(), config(form="pivot", r=12)),
            "one-shot": lambda base=base, known=statistics: compress(base(), config(), known, progress=False),
            "autoencoder": lambda base=base: compress(base(), config(method="autoencoder"), batches(), seed=3, progress=False),
            "many sizes": lambda base=base, known=statistics, size=many_sizes: compress(base(), size, known, progress=False),
            "sequential": lambda base=base: compressed(base, sequential=True),
            "refined": lambda base=base: compressed(base, sequential=True, refine=Refinement(epochs=2)),
            "healed": lambda base=base, known=statistics: healed(base, compress(base(), config(), known, progress=False)),
        }
        for name, adapter in adapters.items():
            model = adapter()
            report(f"{kind}, {name}, adapter", model.save_pretrained)
            if name == "many sizes":
                smaller = retruncate(model, keep=0.5, progress=False)
                report(f"{kind}, retruncated, adapter", smaller.save_pretrained)
            else:
                report(f"{kind}, {name}, standalone", model.to_standalone().save_pretrained)
        with tempfile.TemporaryDirectory() as work:
            os.chdir(work)  # the card names the source, which must not be a random one
            source = Path("dense")
            base().save_pretrained(source)
            report(
                f"{kind}, streamed",
                lambda folder, source=source, known=statistics: compress_checkpoint(
                    source, folder / "small", config(), batches(), statistics=known, progress=False
                ),
            )


if __name__ == "__main__":
    main()
