"""`reparam heal`: a compressed model is trained to predict what the dense one predicts."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from ..evaluation.perplexity import perplexity
from ..healing.checkpoints import last_whole
from ..healing.trainer import HealingTrainer
from ..report.record import record_of_adapter, saving_with
from ..runtime.batches import Batch
from .errors import CliError
from .inputs import after_held_out, held_out, load_compressed, load_dense_of, read_batches
from .options import JsonOption, LoadOptions, ModelArgument, OutputArgument, OverwriteOption, SmallerOption, TextOptions
from .outputs import check_language_model, check_output, err, figures_table, note_evaluation, out, save_whole


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a model is trained."""

    train_windows: Annotated[int, typer.Option(min=1, help="The most windows of text to train on.")] = 512
    epochs: Annotated[float | None, typer.Option(min=0, help="Passes over them. Default: 1.")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Steps, instead of --epochs.")] = None
    time: Annotated[
        str | None, typer.Option(help="How long to train, such as 90s, 30m or 1h, instead of --epochs and --steps.")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 1
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 5e-5
    distillation: Annotated[float, typer.Option(help="Part of the loss that is distillation; the rest is of the text.")] = 1.0
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 1.0
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16, where the device has it.")] = False
    run_folder: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints: a run that was killed goes on from the last one.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the windows.")] = 0

    def minutes(self) -> float | None:
        """How long to train; None: as many epochs or steps as are asked for.

        Raises:
            CliError: what --time says is no time, or --epochs or --steps say otherwise.
        """
        if self.time is not None and not (self.epochs is None and self.steps is None):
            raise CliError("--time says how long to train; leave out --epochs and --steps.")
        return None if self.time is None else minutes_of("--time", self.time)


def heal(
    model: ModelArgument,
    output: OutputArgument,
    *,
    keep: SmallerOption = None,
    teacher: Annotated[str | None, typer.Option(help="The dense model. Default: the one that MODEL was made from.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to train on: as for --text. Default: Python's language reference.")
    ] = None,
    training: TrainingOptions,
    text: TextOptions,
    load: LoadOptions,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the compressed MODEL to predict what the dense one predicts, and save it to OUT."""
    output = output.resolve()
    training.minutes()  # what is no time is refused before anything is loaded
    beside = (training.run_folder, calibration, text.text)
    check_output(output, model, overwrite, *beside)
    small, tokenizer = load_compressed(model, load.dtype, load.device, trainable=True, keep=keep)
    check_language_model(small, model, "")
    record = record_of_adapter(model, small)
    dense = load_dense_of(model, teacher, load.dtype, load.device)
    test = held_out(tokenizer, text)
    skip = after_held_out(text) if calibration is None else 0
    batches = read_batches(tokenizer, "--calibration", calibration, text.length, training.train_windows, skip)
    rows = rows_of(batches)
    figures = {}

    def measure_before() -> None:
        figures["dense perplexity"] = perplexity(dense, test, progress=True)
        figures["perplexity before"] = perplexity(small, test, progress=True)

    losses = train(small, dense, rows, training, before=measure_before)
    figures["perplexity"] = perplexity(small, test, progress=True)
    record = record.with_(evaluation=note_evaluation(small, figures), losses=losses, samples=[], speed=None, angles={})
    save_whole(small, tokenizer, output, *beside, overwrite=overwrite, save=saving_with(record))
    if as_json:
        print(json.dumps({"model": model, "output": str(output), "evaluation": figures, "losses": losses}))
        return
    out.print(figures_table(figures))
    out.print(f"loss {' → '.join(f'{loss:.3f}' for loss in losses)}, saved to {output}", highlight=False, soft_wrap=True)


def train(
    model: Any, teacher: Any, rows: list[dict[str, Tensor]], training: TrainingOptions, before: Callable[[], None] | None = None
) -> list[float]:
    """Train a compressed model in place, and leave it in eval mode.

    Args:
        model: compressed.
        teacher: the dense model.
        rows: of text.
        training: how.
        before: called once it is known that nothing stands in the way.

    Returns:
        The losses of tenths of the training.
    """
    with tempfile.TemporaryDirectory() as temporary:
        trainer = _trainer(model, teacher, rows, training, Path(temporary))
        last = None if training.run_folder is None else last_whole(training.run_folder, trainer.identity)
        if before is not None:
            before()
        err.print(f"training on {len(rows)} windows …")
        trainer.train(resume_from_checkpoint=last)
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows_of(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """The rows of batches, one by one."""
    return [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]


def minutes_of(option: str, time: str) -> float:
    """A time such as 90s, 30m or 1h in minutes.

    Raises:
        CliError: it is none.

    >>> minutes_of("--heal", "90s"), minutes_of("--heal", "1.5h")
    (1.5, 90.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", time.strip())
    minutes = 0.0 if match is None else float(match[1]) * {"s": 1 / 60, "m": 1.0, "h": 60.0}[match[2]]
    if not minutes:
        raise CliError(f"{option} must be a time above zero in s, m or h, such as 90s, 30m or 1h, got {time!r}.")
    return minutes


def _trainer(
    model: Any, teacher: Any, rows: list[dict[str, Tensor]], training: TrainingOptions, temporary: Path
) -> HealingTrainer:
    """What trains a compressed model in place."""
    minutes = training.minutes()
    epochs = 1.0 if training.epochs is None else training.epochs
    arguments = TrainingArguments(
        str(training.run_folder or temporary),
        num_train_epochs=epochs if minutes is None else TrainingArguments.num_train_epochs,
        max_steps=-1 if training.steps is None else training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        bf16=training.bf16,
        use_cpu=model.device.type == "cpu",
        seed=training.seed,
        save_strategy="no" if training.run_folder is None else "steps",
        save_steps=0.1,
        save_total_limit=2,
        logging_steps=0.1,
        report_to="none",
        disable_tqdm=not err.is_terminal,
    )
    trainer = HealingTrainer(
        model,
        arguments,
        train_dataset=rows,
        teacher=teacher,
        distillation=training.distillation,
        temperature=training.temperature,
        minutes=minutes,
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for the result
    return trainer
