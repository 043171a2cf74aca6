"""`reparam heal`: a compressed model is trained to predict what the dense one predicts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, TrainingArguments

from ..calibration.statistics import Statistics
from ..evaluation.perplexity import perplexity
from ..healing.checkpoints import last_whole
from ..healing.fake_quantization import computing_in_few_bits
from ..healing.trainer import HealingTrainer
from ..layers.schemes import check_scheme
from ..report.record import record_of_adapter, saving_with
from ..runtime.batches import Batch
from .command_options import HealOptions, TrainingOptions
from .errors import CliError
from .inputs import after_held_out, held_out, load_compressed, load_dense_of, read_batches
from .outputs import check_language_model, check_output, err, figures_table, note_evaluation, out, save_whole
from .statistics_file import load_statistics


def heal(options: HealOptions) -> None:
    """Do what `reparam heal --help` says."""
    model, output, training, text, load = options.model, options.output.resolve(), options.training, options.text, options.load
    training.minutes()  # what is no time is refused before anything is loaded
    quantize = training.quantize.value if training.quantize else None
    check_scheme(quantize)
    if training.statistics is not None and quantize is None:
        raise CliError("--statistics is for --quantize; give both or neither.")
    statistics = None if training.statistics is None else load_statistics(training.statistics)
    beside = (training.run_folder, options.calibration, text.text)
    check_output(output, model, options.overwrite, *beside)
    small, tokenizer = load_compressed(model, load.dtype, load.device, trainable=True, keep=options.keep)
    check_language_model(small, model, "")
    record = record_of_adapter(model, small)
    dense = load_dense_of(model, options.teacher, load.dtype, load.device)
    test = held_out(tokenizer, text)
    skip = after_held_out(text) if options.calibration is None else 0
    batches = read_batches(tokenizer, "--calibration", options.calibration, text.length, training.train_windows, skip)
    rows = rows_of(batches)
    figures = {}

    def measure(when: str) -> None:
        figures[f"perplexity{when}"] = perplexity(small, test, progress=True)
        if quantize is not None:
            with computing_in_few_bits(small, quantize):
                figures[f"{quantize} perplexity{when}"] = perplexity(small, test, progress=True)

    def measure_before() -> None:
        figures["dense perplexity"] = perplexity(dense, test, progress=True)
        measure(" before")

    losses = train(small, dense, rows, training, statistics, before=measure_before)
    measure("")
    record = record.with_(evaluation=note_evaluation(small, figures), losses=losses, samples=[], speed=None, angles={})
    save_whole(small, tokenizer, output, *beside, overwrite=options.overwrite, save=saving_with(record))
    if options.as_json:
        print(json.dumps({"model": model, "output": str(output), "evaluation": figures, "losses": losses}))
        return
    out.print(figures_table(figures))
    out.print(f"loss {' → '.join(f'{loss:.3f}' for loss in losses)}, saved to {output}", highlight=False, soft_wrap=True)


def train(
    model: Any,
    teacher: Any,
    rows: list[dict[str, Tensor]],
    training: TrainingOptions,
    statistics: Statistics | None = None,
    before: Callable[[], None] | None = None,
) -> list[float]:
    """Train a compressed model in place, and leave it in eval mode.

    Args:
        model: compressed.
        teacher: the dense model.
        rows: of text.
        training: how.
        statistics: that `training.quantize` begins with.
        before: called once it is known that nothing stands in the way.

    Returns:
        The losses of tenths of the training.
    """
    with tempfile.TemporaryDirectory() as temporary:
        trainer = _trainer(model, teacher, rows, training, statistics, Path(temporary))
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


def _trainer(
    model: Any,
    teacher: Any,
    rows: list[dict[str, Tensor]],
    training: TrainingOptions,
    statistics: Statistics | None,
    temporary: Path,
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
        quantize=training.quantize.value if training.quantize else None,
        statistics=statistics,
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for the result
    return trainer
