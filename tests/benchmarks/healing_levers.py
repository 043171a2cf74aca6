"""What makes healing faster: learning curves of levers, from one adapter, at the same number of steps, with the time of each.

    python tests/benchmarks/healing_levers.py MODEL CALIBRATION ADAPTER [--statistics FILE] [--output FOLDER] [--bf16]
        --lever '{"name": "adam", "learning_rate": 5e-5}' [--lever '{"name": "muon", "optimizer": "muon"}' …]

MODEL is a folder that `from_pretrained` opens, CALIBRATION a text file, ADAPTER what `compress` made of MODEL. A lever is the
fields of `Lever`, as JSON. Steps take windows of the text after the first 48 of 512 tokens, in order, all levers the same ones;
windows 200 to 205 are held out, and so are the first 3 of Python's language reference, which is another kind of text. Time is
that of the process, so that a busy machine counts little. The teacher's 256 likeliest classes are kept in FOLDER from one lever
to the next; its time is printed apart. One thread; float32, or with `--bf16` products of the student, and all of the
teacher, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import Statistics, perplexity, text_batches
from reparam_peft.cli.demo import reference_text
from reparam_peft.compression.weighing import Weigher
from reparam_peft.healing.losses import divergence
from reparam_peft.healing.teacher_cache import TeacherCache
from reparam_peft.healing.trained import set_trained
from reparam_peft.tuner.layer import reparam_layers

SEEN, HELD_OUT, TESTED, OTHER = 48, 200, 6, 3
DAMPING = 0.02  # of the metrics, as a part of their mean eigenvalue, so that their roots can be inverted


@dataclass(frozen=True)
class Lever:
    """One way to heal.

    Attributes:
        name: in what is printed, and of the file of its learning curve.
        optimizer: "adam"; "muon" on the factors and Adam on the rest; "diagonal" or "whitened": Adam in B diag(G)^½, or in
            Tᵀ A Z and U B S, whose metrics are F = T Tᵀ, G = S Sᵀ, B G Bᵀ = Z Zᵀ and Aᵀ F A = U Uᵀ.
        relative: whether learning rates are multiplied by the root mean square of each parameter.
        norms: what the learning rate of norms is multiplied by.
        correction: steps of a LoRA on the teacher, on the text itself, before.
        average: decay of the exponential moving average of parameters that is taken at the end; 0: the last ones.
    """

    name: str
    optimizer: str = "adam"
    learning_rate: float = 5e-5
    relative: bool = False
    norms: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.1
    schedule: str = "cosine"
    length: int = 128
    batch: int = 1
    steps: int = 64
    distillation: float = 1.0
    correction: int = 0
    average: float = 0.0
    adapter: str | None = None
    save: str | None = None


@dataclass
class Times:
    """Seconds of the process, by what they went into."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what happens within."""
        start = time.process_time()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.process_time() - start

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.parts.items())


class Coordinates:
    """Coordinates T ↦ L T R in which steps are made: gradients are mapped to them, and steps back."""

    def __init__(self, left: Tensor | None, right: Tensor | None) -> None:
        # With L = Uᵀ and R = S of lower triangles: the gradient is L⁻ᵀ g R⁻ᵀ = U⁻¹ g S⁻ᵀ, the step U⁻ᵀ d S⁻¹.
        self.left = None if left is None else inverse(left)
        self.right = None if right is None else inverse(right)

    def gradient(self, g: Tensor) -> Tensor:
        g = g if self.right is None else g @ self.right.mT
        return g if self.left is None else self.left @ g

    def step(self, d: Tensor) -> Tensor:
        d = d if self.right is None else d @ self.right
        return d if self.left is None else self.left.mT @ d


def root(metric: Tensor) -> Tensor:
    """The lower triangle L of a damped metric L Lᵀ."""
    wide = metric.double()
    return torch.linalg.cholesky(wide + DAMPING * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype))


def inverse(triangle: Tensor) -> Tensor:
    """The inverse of a lower triangle, float32."""
    return torch.linalg.solve_triangular(triangle, torch.eye(len(triangle), dtype=triangle.dtype), upper=False).float()


def factors_of(model: PeftModel) -> Iterator[tuple[str, Any, str, nn.Parameter]]:
    """Module, product, name of the factor, and its parameter."""
    for name, layer in reparam_layers(model.get_base_model()):
        product = layer.factorized(model.active_adapter)
        for piece, child in product.pieces.items():
            yield name, product, piece, child.weight


def whitened(model: PeftModel, statistics: Statistics) -> dict[nn.Parameter, tuple[Coordinates, float]]:
    """Coordinates of each factor, and its root mean square there."""
    weigher = Weigher.of(model.peft_config[model.active_adapter])
    roots: dict[str, Tensor] = {}
    coordinates = {}
    for name, product, piece, parameter in factors_of(model):
        weighing = weigher.weighing(name, statistics, moves_bias=False)
        A, B = (factor.detach().double() for factor in product.factors)
        if piece == "B":
            read = statistics.reads[name]
            if read not in roots:
                roots[read] = root(weighing.gram)
            left, right = root(A.mT @ weighing.fisher @ A), roots[read]
        else:
            rows = ~product.A.is_pivot if piece == "A.K" else torch.ones(len(A), dtype=torch.bool)
            left, right = root(weighing.fisher[rows][:, rows]), root(B @ weighing.gram @ B.mT)
        size = (left.mT @ parameter.detach().double() @ right).square().mean().sqrt()
        coordinates[parameter] = (Coordinates(left, right), float(size))
    return coordinates


def diagonal(model: PeftModel, statistics: Statistics) -> dict[nn.Parameter, Tensor]:
    """For each B, what the step of each column is multiplied by: more where the input is small, in the mean square 1."""
    weigher = Weigher.of(model.peft_config[model.active_adapter])
    scales = {}
    for name, _, piece, parameter in factors_of(model):
        if piece == "B":
            scale = weigher.weighing(name, statistics, moves_bias=False).gram.diagonal().rsqrt()
            scales[parameter] = (scale / scale.square().mean().sqrt()).float()
    return scales


class Optimizer:
    """The optimizer of a lever."""

    def __init__(self, lever: Lever, model: PeftModel, statistics: Path | None) -> None:
        self.lever = lever
        self.scales: dict[nn.Parameter, Tensor] = {}
        self.coordinates: dict[nn.Parameter, tuple[Coordinates, float]] = {}
        if statistics is not None and lever.optimizer == "diagonal":
            self.scales = diagonal(model, Statistics.load(statistics))
        if statistics is not None and lever.optimizer == "whitened":
            self.coordinates = whitened(model, Statistics.load(statistics))
        factors = {parameter for *_, parameter in factors_of(model)}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups, matrices = [], []
        for parameter in self.parameters:
            rate = lever.learning_rate * (1.0 if parameter in factors else lever.norms)
            if lever.relative:
                rate *= float(parameter.detach().square().mean().sqrt())
            if parameter in self.coordinates:
                rate = lever.learning_rate * self.coordinates[parameter][1]
            group = {"params": [parameter], "lr": rate}
            (matrices if lever.optimizer == "muon" and parameter in factors else groups).append(group)
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=lever.betas, weight_decay=0.0, fused=True)]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        self.rates = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, factor: float) -> None:
        """One step at a part of the learning rates."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, rates in zip(self.parts, self.rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        changed = [*self.scales, *self.coordinates]
        before = {parameter: parameter.detach().clone() for parameter in changed}
        for parameter, (coordinates, _) in self.coordinates.items():
            parameter.grad = coordinates.gradient(parameter.grad)
        for part in self.parts:
            part.step()
        for parameter in changed:
            step = parameter.data - before[parameter]
            scaled = step * self.scales[parameter] if parameter in self.scales else self.coordinates[parameter][0].step(step)
            parameter.data.copy_(before[parameter] + scaled)


def factor_at(lever: Lever, fraction: float) -> float:
    """The learning rate's factor."""
    if fraction < lever.warmup:
        return (fraction + 1 / lever.steps) / (lever.warmup + 1 / lever.steps)
    rest = (fraction - lever.warmup) / (1 - lever.warmup)
    return {"cosine": (1 + math.cos(math.pi * rest)) / 2, "linear": 1 - rest, "constant": 1.0}[lever.schedule]


def autocast(options: Any) -> torch.autocast:
    """The precision in which the student computes, and a LoRA on the teacher."""
    return torch.autocast("cpu", torch.bfloat16, enabled=options.bf16)


def corrected(teacher: nn.Module, windows: Tensor, lever: Lever, options: Any) -> nn.Module:
    """A teacher that a LoRA has fitted to the text."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(teacher, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, fused=True)
    for step in range(lever.correction):
        rows = windows[[(step * lever.batch + i) % len(windows) for i in range(lever.batch)]]
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * (1 - step / lever.correction)
        with autocast(options):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.merge_and_unload().requires_grad_(False).eval()


def healed(lever: Lever, model: PeftModel, teacher: nn.Module, windows: Tensor, options: Any, say: Callable[..., None]) -> None:
    """Train the model in place."""
    times = Times()
    windows = windows.reshape(-1, lever.length)
    if lever.correction:
        with times.of("correction"):
            teacher = corrected(teacher, windows, lever, options)
    teacher = teacher.to(torch.bfloat16) if options.bf16 else teacher
    known = f"corrected {lever.correction} {lever.length}" if lever.correction else "dense"
    known += " in bfloat16" if options.bf16 else ""
    cache = TeacherCache(options.output / "teacher", 256, known)
    set_trained(model, ("factors", "norms", "biases"))
    with times.of("metrics"):
        optimizer = Optimizer(lever, model, options.statistics)
    average: list[Tensor] = []
    losses = []
    for step in range(lever.steps):
        rows = windows[[(step * lever.batch + i) % len(windows) for i in range(lever.batch)]]
        batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        with times.of("teacher"), torch.no_grad():
            if (taught := cache.read(batch)) is None:
                cache.write(batch, teacher(**batch).logits)
                taught = cache.read(batch)
        with times.of("passes"):
            with autocast(options):
                logits = model(**batch).logits
            mask = torch.ones_like(rows, dtype=torch.bool)
            mask[:, -1] = False
            loss = divergence(logits, taught, mask) / mask.sum()
            losses.append(float(loss.detach()))
            if lever.distillation < 1:
                task = cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
                loss = lever.distillation * loss + (1 - lever.distillation) * task
            loss.backward()
        with times.of("optimizer"):
            optimizer.step(factor_at(lever, step / lever.steps))
            model.zero_grad()
        if lever.average:
            values = [parameter.detach() for parameter in optimizer.parameters]
            average = average or [value.clone() for value in values]
            torch._foreach_lerp_(average, values, 1 - lever.average)
        if (step + 1) % 8 == 0:
            say(f"{step + 1} steps: divergence {sum(losses[-8:]) / 8:.4f}; {times}")
    for parameter, value in zip(optimizer.parameters, average, strict=bool(average)):
        parameter.data.copy_(value)


def main() -> None:
    """Print learning curves."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("adapter")
    parser.add_argument("--lever", type=lambda text: Lever(**json.loads(text)), action="append", required=True, dest="levers")
    parser.add_argument("--statistics", type=Path, help="for optimizers in coordinates")
    parser.add_argument("--bf16", action="store_true", help="which only some processors have")
    parser.add_argument("--curves-only", action="store_true", help="no perplexities at the end")
    parser.add_argument("--output", type=Path, default=Path("levers"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    def read(text: str, limit: int) -> Tensor:
        return torch.cat([batch["input_ids"] for batch in text_batches(tokenizer, text, length=512, limit=limit)])

    text = read(options.calibration.read_text(encoding="utf-8"), HELD_OUT + TESTED)
    tests = [[{"input_ids": row[None]} for row in rows] for rows in (text[HELD_OUT:], read(reference_text(), OTHER))]
    options.output.mkdir(parents=True, exist_ok=True)
    noted = options.output / "dense.json"
    if not (noted.exists() or options.curves_only):
        noted.write_text(json.dumps([perplexity(base(), test) for test in tests]))
    dense = [] if options.curves_only else json.loads(noted.read_text())
    for lever in options.levers:
        with (options.output / f"{lever.name}.txt").open("w", encoding="utf-8") as file:

            def say(words: str, file: Any = file) -> None:
                print(words, flush=True)
                print(words, file=file, flush=True)

            say(str(lever))
            model = PeftModel.from_pretrained(base(), lever.adapter or options.adapter, is_trainable=True)
            if lever.steps:
                healed(lever, model, base(), text[SEEN:HELD_OUT], options, say)
            if options.curves_only:
                continue
            got = [perplexity(model.eval(), test, progress=False) for test in tests]
            excess = [math.log(value / reference) for value, reference in zip(got, dense, strict=True)]
            say(f"{lever.name}: held out {got[0]:.2f} (+{excess[0]:.4f}), other text {got[1]:.2f} (+{excess[1]:.4f})")
            if lever.save:
                model.save_pretrained(lever.save)


if __name__ == "__main__":
    main()
