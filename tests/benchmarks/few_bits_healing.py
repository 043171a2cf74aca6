"""Healing for factors in few bits: with and without rounding while they train, at equal steps.

    python tests/benchmarks/few_bits_healing.py CALIBRATION TEST [--folder FOLDER] [--hidden 96] [--layers 2]
        [--keep 0.5] [--forms factors pivot] [--bits int4] [--steps 200] [--rates 1e-3] [--pretraining 1000]

A Llama that reads bytes is trained on CALIBRATION first, and kept in FOLDER. It is then compressed with statistics of the same
text, and healed on it by distillation: in floats; with `quantize`; with `quantize` and `statistics`; and in floats for all but
the last fifth of the steps. Printed are perplexities per byte on TEST, of factors as they are, and in few bits: each number to
the nearest, and with the statistics of the dense model. Seconds are those of the process in training. One thread, float32.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from reparam_peft import HealingTrainer, ReparamConfig, Statistics, calibrate, compress, perplexity

LENGTH, BATCH, CALIBRATED, TESTED = 64, 8, 128, 256
LATE = 0.8  # part of the steps that are taken in floats where rounding begins late


def windows(path: Path) -> Tensor:
    """All bytes of a text, in windows."""
    numbers = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    return numbers[: len(numbers) // LENGTH * LENGTH].view(-1, LENGTH)


def dense_model(folder: Path, text: Tensor, hidden: int, layers: int, steps: int) -> LlamaForCausalLM:
    """A model that has learned the text, kept in a folder."""
    if (folder / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3, "num_hidden_layers": layers, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        rows = text[torch.randint(len(text), (BATCH,))]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"training the dense model: step {step + 1}, loss {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(folder)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A way to compress and to train, of which models are made."""

    folder: Path
    config: ReparamConfig
    bits: str
    rate: float
    statistics: Statistics
    teacher: nn.Module
    rows: Tensor
    held_out: list[dict[str, Tensor]]

    def small(self) -> PeftModel:
        """A compressed model."""
        return compress(LlamaForCausalLM.from_pretrained(self.folder).eval(), self.config, self.statistics, progress=False)

    def heal(self, model: PeftModel, steps: int, quantize: str | None = None, statistics: Statistics | None = None) -> float:
        """Train a model in place; returns the seconds that it took."""
        with TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=self.rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            data = [{"input_ids": row} for row in self.rows]
            few = {"quantize": quantize, "statistics": statistics}
            trainer = HealingTrainer(model, arguments, train_dataset=data, teacher=self.teacher, **few)
            start = time.process_time()
            trainer.train()
            return time.process_time() - start

    def show(self, name: str, model: PeftModel, seconds: float) -> None:
        """Print a line of the table."""
        model.eval()
        stored = [model.to_standalone(quantize=self.bits, statistics=known) for known in (None, self.statistics)]
        values = " | ".join(f"{perplexity(each, self.held_out, progress=False):.4f}" for each in (model, *stored))
        print(f"| {self.config.form} | {self.bits} | {self.rate} | {name} | {values} | {seconds:.0f} |", flush=True)


def in_floats(case: Case, model: PeftModel, steps: int) -> float:
    """Heal as if nothing were to be rounded."""
    return case.heal(model, steps)


def rounded(case: Case, model: PeftModel, steps: int) -> float:
    """Heal with `quantize`."""
    return case.heal(model, steps, case.bits)


def from_statistics(case: Case, model: PeftModel, steps: int) -> float:
    """Heal with `quantize` and `statistics`."""
    return case.heal(model, steps, case.bits, case.statistics)


def late(case: Case, model: PeftModel, steps: int) -> float:
    """Heal in floats, and with `quantize` at the end."""
    early = round(LATE * steps)
    return case.heal(model, early) + case.heal(model, steps - early, case.bits)


WAYS = {"in floats": in_floats, "rounded": rounded, "rounded, from statistics": from_statistics, "rounded at the end": late}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("few_bits_healing"))
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--forms", nargs="+", default=["factors", "pivot"])
    parser.add_argument("--bits", nargs="+", default=["int4"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--pretraining", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text, test = windows(options.calibration), windows(options.test)[:TESTED]
    seen, rest = text[:CALIBRATED], text[CALIBRATED:]
    batches, held_out = ([{"input_ids": part} for part in rows.split(32)] for rows in (seen, test))
    teacher = dense_model(options.folder, text, options.hidden, options.layers, options.pretraining)
    print(f"dense: {perplexity(teacher, held_out):.4f}", flush=True)

    def copied() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(options.folder).eval()

    print("| form | bits | rate | healed | as it is | nearest | with statistics | seconds |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for form in options.forms:
        config = ReparamConfig(target_modules="all-linear", keep=options.keep, form=form)
        base = LlamaForCausalLM.from_pretrained(options.folder).eval()
        statistics = calibrate(base, config, batches, progress=False)
        for bits in options.bits:
            for rate in options.rates:
                case = Case(options.folder, config, bits, rate, statistics, teacher, rest, held_out)
                case.show("not", case.small(), 0.0)
                for name, how in WAYS.items():
                    model = case.small()
                    case.show(name, model, how(case, model, options.steps))


if __name__ == "__main__":
    main()
