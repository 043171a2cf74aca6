"""What bytes buy: quantisation alone, low rank in 8 bits, and both shared out together.

    python tests/benchmarks/front.py MODEL STATISTICS TEST … [--keep 0.5 0.4 …] [--windows 8] [--layers 10 26] [--plot FILE]

STATISTICS is a file that `reparam compress --statistics` or `Statistics.save` wrote, of all linear layers. Sizes are bytes of
the targets over what they take in bfloat16, whichever dtype the model is loaded in. Each line is a method at a size: the
bytes of the targets over bfloat16, the predicted loss in nats per token, and, unless `--layers` names some, the bytes of the
standalone file, and the perplexity on the first windows of each TEST with its excess over the dense model in nats per token.

With `--layers` only matrices of these layers are taken, and only losses predicted: that is quick. `--plot` draws excess loss on
the first TEST, or predicted loss, over bytes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import Plan, ReparamConfig, Statistics, compress, perplexity
from reparam_peft.compression.job import Job
from reparam_peft.compression.options import Options
from reparam_peft.evaluation.text import text_batches
from reparam_peft.layers.schemes import SCHEME_OF
from reparam_peft.numerics.decompositions import Whole
from reparam_peft.planning.neurons import Losses
from reparam_peft.planning.ranks import RankChooser

BF16 = 2


class Row(NamedTuple):
    """One method at one size: numbers and bytes of the targets, the predicted loss, and the plan; None for nearest numbers."""

    method: str
    numbers: int
    bytes: int
    predicted: float
    plan: Plan | None = None


class Curves:
    """A model whose matrices have their options and losses computed once, for all sizes."""

    def __init__(self, path: str, config: ReparamConfig, statistics: Statistics) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path)
        start = time.process_time()
        self.job = Job.of_model(self.model, config, statistics, Options(0, progress=False))
        self.losses = self.job.losses()
        self.numbers = sum(storage.dense for storage in self.job.storages.values())
        print(f"planning with {config.bits} bits: {time.process_time() - start:.0f} processor seconds", flush=True)

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
        return Row(f"nearest int{bits}", self.numbers, int(stored), loss)

    def alone(self, bits: int) -> Row:
        """All matrices as they are in one width, rounded with statistics."""
        loss, stored = 0.0, 0
        for name, options in self.job.offered.options.items():
            index = next(i for i, option in enumerate(options) if option.form == "dense" and option.bits == bits)
            loss, stored = loss + float(self.losses.options[name][index]), stored + options[index].cost
        return Row(f"GPTQ {bits} bits", self.numbers, stored, loss)


def rows(path: str, config: ReparamConfig, statistics: Statistics, sizes: list[float]) -> Iterator[Row]:
    """Every method at every size that it can be stored at."""
    curves = Curves(path, config, statistics)
    itemsize = next(curves.model.parameters()).element_size()
    low_rank = Curves(path, replace_config(config, bits=(8,), form="pivot"), statistics)
    for bits in (8, 4):
        yield curves.nearest(bits)
        row = curves.alone(bits)
        yield row._replace(plan=curves.plan(row.bytes / (curves.numbers * itemsize), dense_only=True))
    for size in sizes:
        keep = size * BF16 / itemsize
        plans = {
            "bits, no low rank": curves.plan(keep, dense_only=True),
            "low rank, int8": low_rank.plan(keep),
            "joint": curves.plan(keep),
        }
        for method, plan in plans.items():
            if plan is not None:
                yield Row(f"{method} at {size:g}", curves.numbers, plan.stored_bytes, plan.predicted_loss, plan)


def replace_config(config: ReparamConfig, **changes: Any) -> ReparamConfig:
    """A new config that differs in some fields."""
    words = {"target_modules": config.target_modules, "budget": "bytes", "keep": config.keep}
    return ReparamConfig(**{**words, **changes})


def measure(path: str, row: Row, statistics: Statistics, tests: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """Bytes of the standalone file, and perplexities."""
    plan = row.plan
    config = ReparamConfig(target_modules=[module.name for module in plan.modules])
    small = compress(AutoModelForCausalLM.from_pretrained(path), config, statistics, plan=plan, progress=False)
    standalone = small.to_standalone().eval()
    with TemporaryDirectory() as folder:
        standalone.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return size, {name: perplexity(standalone, test) for name, test in tests.items()}


def draw(points: list[tuple[str, float, float]], label: str, path: Path) -> None:
    """Loss over bytes, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    methods: dict[str, list[tuple[float, float]]] = {}
    for method, size, loss in points:
        methods.setdefault(method.rpartition(" at ")[0] or method, []).append((size, loss))
    for method, values in methods.items():
        axes.plot(*zip(*sorted(values), strict=True), marker="o", label=method)
    axes.set(xlabel="bytes of the targets over bfloat16", ylabel=label, yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Print one line for each method and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("statistics", type=Path)
    parser.add_argument("tests", type=Path, nargs="+")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.4, 0.3, 0.285, 0.25, 0.2])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--layers", nargs="+")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    path, statistics = arguments.model, Statistics.load(arguments.statistics)
    itemsize = next(AutoModelForCausalLM.from_pretrained(path).parameters()).element_size()
    targets = "all-linear" if arguments.layers is None else rf".*\.(?:{'|'.join(arguments.layers)})\..*_proj"
    least = min(arguments.keep) * BF16 / itemsize
    config = ReparamConfig(target_modules=targets, budget="bytes", keep=least)
    tests: dict[str, Any] = {}
    if arguments.layers is None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        for file in arguments.tests:
            text = file.read_text(encoding="utf-8")
            tests[file.stem] = text_batches(tokenizer, text, batch_size=1, limit=arguments.windows)
    dense = {name: perplexity(AutoModelForCausalLM.from_pretrained(path).eval(), test) for name, test in tests.items()}
    print("dense:", {name: round(value, 4) for name, value in dense.items()}, flush=True)
    heads = [f"{name} perplexity | {name} excess" for name in tests]
    columns = " | ".join(["method", "bytes over bf16", "predicted", *(["file"] if tests else []), *heads])
    print(f"| {columns} |\n|{'---|' * (columns.count('|') + 1)}", flush=True)
    points = []
    for row in rows(path, config, statistics, arguments.keep):
        fraction = row.bytes / (BF16 * row.numbers)
        cells, excess = [], math.nan
        if tests and row.plan is not None:
            size, values = measure(path, row, statistics, tests)
            cells.append(f"{size:,}")
            for name, value in values.items():
                cells += [f"{value:.3f}", f"{math.log(value / dense[name]):.4f}"]
            excess = math.log(values[next(iter(tests))] / dense[next(iter(tests))])
        print(f"| {' | '.join([row.method, f'{fraction:.4f}', f'{row.predicted:.5f}', *cells])} |", flush=True)
        points.append((row.method, fraction, excess if tests else row.predicted))
    if arguments.plot is not None:
        kept = [point for point in points if all(map(math.isfinite, point[1:]))]
        draw(kept, "excess loss, nats per token" if tests else "predicted loss, nats per token", arguments.plot)


if __name__ == "__main__":
    main()
