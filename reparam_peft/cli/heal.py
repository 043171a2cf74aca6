"""`reparam heal`: a compressed model is trained to predict what the dense one predicts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import PeftConfig
from rich.console import Console
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..evaluation.perplexity import perplexity
from ..healing.trainer import HealingTrainer
from ..report.record import record_of_adapter, saving_with
from ..tuner.model import ReparamModel
from .errors import CliError
from .inputs import load_model, read_batches
from .options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    OutputArgument,
    OverwriteOption,
    SmallerOption,
    TextOption,
    WindowsOption,
)
from .outputs import check_language_model, check_output, figures_table, save_whole


def heal(
    model: ModelArgument,
    output: OutputArgument,
    keep: SmallerOption = None,
    teacher: Annotated[str | None, typer.Option(help="The dense model. Default: the one that MODEL was made from.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to train on: as for --text. Default: Python's language reference.")
    ] = None,
    train_windows: Annotated[int, typer.Option(min=1, help="The most windows of text to train on.")] = 512,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over them.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 5e-5,
    distillation: Annotated[float, typer.Option(help="Part of the loss that is distillation; the rest is of the text.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 1.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16, where the device has it.")] = False,
    run_folder: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints: a run that was killed goes on from the last one.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the windows.")] = 0,
    text: TextOption = None,
    length: LengthOption = 512,
    windows: WindowsOption = 8,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the compressed MODEL to predict what the dense one predicts, and save it to OUT."""
    output = output.resolve()
    check_output(output, model, overwrite)
    small, tokenizer = load_model(model, dtype, device, trainable=True, keep=keep)
    if not isinstance(getattr(small, "base_model", None), ReparamModel):
        raise CliError(f"{model} is no compressed adapter; make one with `reparam compress`.")
    check_language_model(small, model, "")
    record = record_of_adapter(model, small)
    dense, _ = load_model(teacher or PeftConfig.from_pretrained(model).base_model_name_or_path, dtype, device)
    skip = train_windows if text is None and calibration is None else 0  # both are of the reference text
    test = read_batches(tokenizer, "--text", text, length, windows, skip)
    batches = read_batches(tokenizer, "--calibration", calibration, length, train_windows)
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]
    figures = {
        "dense perplexity": perplexity(dense, test, progress=True),
        "perplexity before": perplexity(small, test, progress=True),
    }
    console = Console(stderr=True)
    console.print(f"training on {len(rows)} windows …")
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            str(run_folder or temporary),
            num_train_epochs=epochs,
            max_steps=-1 if steps is None else steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            bf16=bf16,
            use_cpu=small.device.type == "cpu",
            seed=seed,
            save_strategy="no" if run_folder is None else "steps",
            save_steps=0.1,
            save_total_limit=2,
            logging_steps=0.1,
            report_to="none",
            disable_tqdm=not console.is_terminal,
        )
        options: dict[str, Any] = {"teacher": dense, "distillation": distillation, "temperature": temperature}
        trainer = HealingTrainer(small, arguments, train_dataset=rows, **options)
        trainer.remove_callback(PrinterCallback)  # stdout is for the result
        last = get_last_checkpoint(str(run_folder)) if run_folder is not None and run_folder.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
    small.eval()
    figures["perplexity"] = perplexity(small, test, progress=True)
    small.peft_config["default"].evaluation = dict(figures)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    record = record.with_(evaluation=figures, losses=losses, samples=[], speed=None, angles={})
    save_whole(small, tokenizer, output, saving_with(record))
    if as_json:
        print(json.dumps({"model": model, "output": str(output), "evaluation": figures, "losses": losses}))
        return
    out = Console()
    out.print(figures_table(figures))
    out.print(f"loss {' → '.join(f'{loss:.3f}' for loss in losses)}, saved to {output}", highlight=False, soft_wrap=True)
