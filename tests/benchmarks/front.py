"""What bytes buy: quantisation alone, low rank in 8 bits, both shared out together, and healed.

    python tests/benchmarks/front.py MODEL STATISTICS TEST … [--keep 0.5 0.4 …] [--rows joint …] [--windows 8] [--encoder]
        [--calibration FILE] [--minutes 10] [--folder FOLDER] [--layers 10 26]

STATISTICS is a file that `reparam compress --statistics` or `Statistics.save` wrote, of all linear layers; where there is
none, it is written, of 48 windows or 1,000 sentences of `--calibration`. A TEST is a text file, or `reference`: Python's
language reference. Sizes are bytes of the targets over what they take in bfloat16, whichever dtype the model has. Each line is
a method at a size: the bytes of the targets over bfloat16, the predicted loss in nats per token, the bytes of the standalone
file, and the perplexity on the first windows of each TEST with its excess over the dense model in nats per token. With
`--encoder` these are the mean cosine similarity of 200 sentence embeddings to the dense model's, and what it lacks of 1.
`healed` trains the norms of the joint model, which is all that is not in few bits, for `--minutes` on text of `--calibration`:
to predict what the dense model predicts, one window in a step, or to have its hidden states, 20 sentences in a step.

FOLDER keeps plans and figures (`figures.json`): what is there already is not made again. `front_picture.py` draws it. With
`--layers` only matrices of these layers are taken, and only losses predicted: that is quick.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from embeddings import batches_of, embed, sentences
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from reparam_peft import HealingTrainer, Plan, ReparamConfig, Statistics, calibrate, compress, perplexity, text_batches
from reparam_peft.cli.demo import reference_text
from reparam_peft.compression.job import Job
from reparam_peft.compression.options import Options
from reparam_peft.layers.schemes import SCHEME_OF
from reparam_peft.numerics.decompositions import Whole
from reparam_peft.planning.neurons import Losses
from reparam_peft.planning.ranks import RankChooser

BF16, LENGTH, SENTENCES = 2, 512, 200  # bytes of a number, tokens of a window, sentences of a test
CALIBRATED = {False: 48, True: 1000}  # windows, and of an encoder sentences, that statistics are of
TOGETHER = {False: 1, True: 20}  # of these in a step of healing
ROWS = ("nearest", "alone", "bits", "low rank", "joint", "healed")


class Row(NamedTuple):
    """One method at one size: numbers and bytes of the targets, the predicted loss, and how the model is made."""

    method: str
    numbers: int
    bytes: int
    predicted: float
    plan: Plan | None = None  # None: each number of the `matrices` in `bits`, the nearest
    bits: int = 0
    matrices: Sequence[str] = ()
    healed: bool = False


class Bench:
    """The model, and how good what is made of it is."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path, self.encoder = arguments.model, arguments.encoder
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.tests: dict[str, Any] = {}
        for name in arguments.tests if arguments.layers is None else ():
            text = reference_text() if name == "reference" else Path(name).read_text(encoding="utf-8")
            self.tests[Path(name).stem] = self.batches(text, SENTENCES if self.encoder else arguments.windows)

    def base(self) -> Any:
        """The dense model."""
        kind = AutoModel if self.encoder else AutoModelForCausalLM
        return kind.from_pretrained(self.path, dtype=torch.float32).eval()

    def batches(self, text: str, count: int | None) -> list[Any]:
        """The first sentences or windows of a text, all windows where `count` is None."""
        if self.encoder:
            return batches_of(self.tokenizer, text, count)
        return text_batches(self.tokenizer, text, length=LENGTH, batch_size=1, limit=count)

    def examples(self, text: str) -> list[Any]:
        """All sentences or windows of a text, each by itself."""
        if self.encoder:
            return [dict(self.tokenizer(sentence)) for sentence in sentences(text, None)]
        return [{key: value[0] for key, value in window.items()} for window in self.batches(text, None)]

    @cached_property
    def dense(self) -> dict[str, Any]:
        """Perplexities or embeddings of the dense model."""
        model = self.base()
        return {name: embed(model, test) if self.encoder else perplexity(model, test) for name, test in self.tests.items()}

    def measured(self, model: nn.Module) -> dict[str, tuple[float, float]]:
        """Of each test the perplexity, or cosine, and the excess."""
        figures = {}
        for name, test in self.tests.items():
            if self.encoder:
                cosine = float(F.cosine_similarity(embed(model, test), self.dense[name]).mean())
                figures[name] = (cosine, 1 - cosine)
            else:
                value = perplexity(model, test)
                figures[name] = (value, math.log(value / self.dense[name]))
        return figures


class Curves:
    """A model whose matrices have their options and losses computed once, for all sizes."""

    def __init__(self, model: nn.Module, config: ReparamConfig, statistics: Statistics) -> None:
        self.job = Job.of_model(model, config, statistics, Options(0, progress=False))
        self.numbers = sum(storage.dense for storage in self.job.storages.values())

    @cached_property
    def losses(self) -> Losses:
        """What options are predicted to lose."""
        start = time.process_time()
        losses = self.job.losses()
        print(f"planning with {self.job.config.bits} bits: {time.process_time() - start:.0f} processor seconds", flush=True)
        return losses

    def plan(self, keep: float, dense_only: bool = False) -> Plan | None:
        """The plan at a size, with matrices as they are only; None where nothing is as small."""
        options = dict(self.losses.options)
        if dense_only:
            for name, losses in options.items():
                forms = [option.form == "dense" for option in self.job.offered.options[name]]
                options[name] = torch.where(torch.tensor(forms), losses, torch.inf)
        chooser = RankChooser.of(self.job.config, self.job.storages, keep, of_bytes=self.job.offered)
        try:
            return self.job.plan_with(chooser, Losses(self.losses.directions, options=options))
        except (ValueError, IndexError):
            return None

    def nearest(self, bits: int) -> Row:
        """Each number rounded to the nearest."""
        loss = stored = 0.0
        for name, target in self.job.targets.items():
            W = self.job.matrix_of(name).double()
            matrix = self.job.factorizer.matrix(W, self.job.weighing(name))
            loss += matrix.loss(Whole(SCHEME_OF[bits].grid(W).nearest(W)))
            stored += replace(target.storage, form="dense", bits=bits).bytes(min(W.shape), BF16)
        return Row(f"nearest int{bits}", self.numbers, int(stored), loss, bits=bits, matrices=list(self.job.targets))

    def alone(self, bits: int) -> int:
        """Bytes of all matrices as they are in one width."""
        return sum(
            next(option.cost for option in options if option.form == "dense" and option.bits == bits)
            for options in self.job.offered.options.values()
        )


def rows(bench: Bench, config: ReparamConfig, statistics: Statistics, arguments: argparse.Namespace) -> Iterator[Row]:
    """Every method at every size that it can be stored at."""
    model = bench.base()
    itemsize = next(model.parameters()).element_size()
    curves = Curves(model, config, statistics)
    low_rank = Curves(model, replace_config(config, bits=(8,), form="pivot"), statistics)

    def planned(method: str, made: Curves, keep: float, dense_only: bool = False) -> Plan | None:
        file = None if arguments.folder is None else arguments.folder / f"{method}.json"
        if file is not None and file.exists():
            return Plan.load(file)
        plan = made.plan(keep, dense_only)
        if plan is not None and file is not None:
            plan.save(file)
        return plan

    for bits in (8, 4):
        if "nearest" in arguments.rows:
            yield curves.nearest(bits)
        if "alone" in arguments.rows:
            method, stored = f"GPTQ {bits} bits", curves.alone(bits)
            plan = planned(method, curves, stored / (curves.numbers * itemsize), dense_only=True)
            yield Row(method, curves.numbers, plan.stored_bytes, plan.predicted_loss, plan)
    for size in arguments.keep:
        keep = size * BF16 / itemsize
        for method, made in (("bits", curves), ("low rank", low_rank), ("joint", curves)):
            healed = method == "joint" and "healed" in arguments.rows
            if method not in arguments.rows and not healed:
                continue
            plan = planned(f"{method} at {size:g}", made, keep, method == "bits")
            if plan is not None:
                row = Row(f"{method} at {size:g}", curves.numbers, plan.stored_bytes, plan.predicted_loss, plan)
                if method in arguments.rows:
                    yield row
                if healed:
                    yield row._replace(method=f"healed at {size:g}", healed=True)


def replace_config(config: ReparamConfig, **changes: Any) -> ReparamConfig:
    """A new config that differs in some fields."""
    words = {"target_modules": config.target_modules, "budget": "bytes", "keep": config.keep}
    return ReparamConfig(**{**words, **changes})


def model_of(bench: Bench, row: Row, statistics: Statistics, arguments: argparse.Namespace) -> nn.Module:
    """The plain model of a row."""
    if row.plan is None:
        model = bench.base()
        for name in row.matrices:
            weight = model.get_submodule(name).weight
            weight.data = SCHEME_OF[row.bits].grid(weight.data.double()).nearest(weight.data.double()).to(weight.dtype)
        return model
    config = ReparamConfig(target_modules=[module.name for module in row.plan.modules])
    small = compress(bench.base(), config, statistics, plan=row.plan, progress=False)
    if row.healed:
        heal(bench, small, arguments)
    return small.to_standalone().eval()


def heal(bench: Bench, small: Any, arguments: argparse.Namespace) -> None:
    """Train the norms for so many minutes, on windows or sentences that no statistics were taken of."""
    examples = bench.examples(arguments.calibration.read_text(encoding="utf-8"))[CALIBRATED[bench.encoder] :]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            per_device_train_batch_size=TOGETHER[bench.encoder],
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = HealingTrainer(
            small,
            settings,
            train_dataset=examples,
            processing_class=bench.tokenizer if bench.encoder else None,  # sentences are padded, windows need not be
            teacher=bench.base(),
            hidden=1.0 if bench.encoder else 0.0,
            minutes=arguments.minutes,
            trains=["norms"],
        )
        trainer.train()
    together = f"{TOGETHER[True]} sentences" if bench.encoder else f"a window of {LENGTH} tokens"
    print(f"healed in {trainer.state.global_step} steps of {together}, {arguments.minutes:g} minutes", flush=True)


def file_size(model: Any) -> int:
    """Bytes of the weights that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def main() -> None:
    """Print one line for each method and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("statistics", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.5, 0.4, 0.3, 0.285, 0.25, 0.2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS[:-1]))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--encoder", action="store_true")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", nargs="+")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    targets = "all-linear" if arguments.layers is None else rf".*\.(?:{'|'.join(arguments.layers)})\..*_proj"
    if not arguments.statistics.exists():
        text = arguments.calibration.read_text(encoding="utf-8")
        known = bench.batches(text, CALIBRATED[bench.encoder])
        calibrate(bench.base(), ReparamConfig(target_modules=targets), known, progress=False).save(arguments.statistics)
    statistics = Statistics.load(arguments.statistics)
    itemsize = next(bench.base().parameters()).element_size()
    least = min([*arguments.keep, 1.0]) * BF16 / itemsize
    config = ReparamConfig(target_modules=targets, budget="bytes", keep=least)
    figures: list[dict[str, Any]] = []
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        if (arguments.folder / "figures.json").exists():
            figures = json.loads((arguments.folder / "figures.json").read_text(encoding="utf-8"))
    if not bench.encoder:
        print("dense:", {name: round(value, 4) for name, value in bench.dense.items()}, flush=True)
    heads = " | ".join(f"{name} | excess" for name in bench.tests)
    columns = " | ".join(["method", "bytes over bf16", "predicted", "file", heads])
    print(f"| {columns} |\n|{'---|' * (columns.count('|') + 1)}", flush=True)
    for row in rows(bench, config, statistics, arguments):
        if any(entry["method"] == row.method for entry in figures):
            continue
        entry: dict[str, Any] = {"method": row.method, "bytes": row.bytes / (BF16 * row.numbers), "predicted": row.predicted}
        if bench.tests:
            model = model_of(bench, row, statistics, arguments)
            entry["file"] = None if row.plan is None else file_size(model)
            entry["tests"] = bench.measured(model)
        figures.append(entry)
        cells = [row.method, f"{entry['bytes']:.4f}", f"{row.predicted:.5f}", f"{entry.get('file') or 0:,}"]
        cells += [f"{value:.4f} | {excess:.4f}" for value, excess in entry.get("tests", {}).values()]
        print(f"| {' | '.join(cells)} |", flush=True)
        if arguments.folder is not None:
            (arguments.folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
