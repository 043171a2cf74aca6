"""`reparam compress`: settings, inputs, compression, measurement, and what is printed of it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..blockwise.refinement import Refinement
from ..calibration.self_written import SelfWritten
from ..calibration.statistics import Statistics
from ..compression.compress import compress as compress_model
from ..compression.compress import plan as plan_model
from ..config.reparam_config import ReparamConfig
from ..defaults import EPOCHS
from ..evaluation.perplexity import perplexity
from ..planning.plan import Plan
from ..report.record import Record, saving_with
from ..runtime.batches import Batch
from ..runtime.run_folder import HEALING, HEALING_TEXT, PLAN
from ..tuner.sizes import SizeReport
from .command_options import CompressOptions, TrainingOptions, minutes_of
from .errors import CliError
from .heal import rows_of, train
from .inputs import held_out, load_compressed, load_dense, load_model, read_batches, take_experts
from .options import ConfigOptions
from .outputs import (
    PROMPTS,
    check_language_model,
    check_output,
    continuation,
    err,
    figures_table,
    note_evaluation,
    out,
    save_whole,
    size_table,
)
from .statistics_file import Calibration, is_data_free, uses_no_data

HEALING_WINDOWS = 4096  # the most of a text that are trained on
HEALING_WRITTEN = 48  # that the model writes; one of them takes about as long as a step on it


@dataclass(frozen=True)
class Settings:
    """What is asked for, once it is known to make sense.

    Attributes:
        options: as given, OUT made absolute.
        config: what is compressed, and how.
        plan: the one that was given.
        calibration: what is calibrated on.
        earlier: statistics that were there already.
        healing: how long and how it is trained; None: it is not.
    """

    options: CompressOptions
    config: ReparamConfig
    plan: Plan | None
    calibration: Calibration
    earlier: Statistics | None
    healing: TrainingOptions | None


class Inputs(NamedTuple):
    """What was read: the dense model, its tokenizer, and what is measured, healed and calibrated on where something is.

    Attributes:
        windows: to measure perplexity on.
        healing_rows: to heal on; none where it is not asked for.
        batches: to calibrate on; None where nothing is read of them.
        statistics: of these, or of an earlier run.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    windows: list[dict[str, Tensor]]
    healing_rows: list[dict[str, Tensor]]
    batches: Sequence[Batch] | SelfWritten | None
    statistics: Statistics | None


class Compressed(NamedTuple):
    """What is known of a model that was compressed and saved."""

    record: Record
    sizes: SizeReport
    seconds: float


class Quality(NamedTuple):
    """How good a model is: its perplexity, and how it goes on with a text."""

    perplexity: float
    sample: str


def compress(options: CompressOptions) -> None:
    """Do what `reparam compress --help` says."""
    settings = _settings(replace(options, output=options.output.resolve()))
    inputs = _read(settings)
    tokenizer, windows = inputs.tokenizer, inputs.windows
    before = _measure(inputs.model, tokenizer, windows, "before") if options.evaluate else None
    healing_rows = inputs.healing_rows
    with tempfile.TemporaryDirectory() as temporary:
        # What is yet to be healed is no result.
        folder = settings.options.output if settings.healing is None else Path(temporary, "compressed")
        compressed = _compress(settings, inputs, folder)
        del inputs  # what is loaded next needs the memory of the model that was compressed in place
        if settings.healing is not None:
            compressed = _heal(settings.options, settings.healing, folder, healing_rows, compressed)
    after = _measure_again(settings.options, tokenizer, windows, before, compressed.record)
    _print(settings.options, compressed, before, after)


def _settings(options: CompressOptions) -> Settings:
    """What the options say; what makes no sense is refused here, before a model is loaded."""
    check_output(options.output, options.model, options.overwrite, *options.beside)
    plan, chosen = _read_plan(options.plan, options.config), options.config
    if plan is not None:
        storage = replace(
            chosen.storage, allocation=plan.allocation, form=chosen.storage.form or plan.form, ceiling=plan.ceiling
        )
        budget = replace(chosen.budget, budget=plan.budget)
        rank = None if plan.correction_rank is None else str(plan.correction_rank)
        keep = plan.keep if rank is None else None
        chosen = replace(chosen, keep=keep, rank=rank, budget=budget, method=chosen.method or plan.method, storage=storage)
    config, blocks = chosen.config(), options.blocks
    if plan is not None and is_data_free(config):
        raise CliError(f"--plan is for calibrated methods; leave out --method {config.method}.")
    if blocks.by_block and is_data_free(config):
        raise CliError(f"--sequential and --refine need calibration; leave out --method {config.method}.")
    if not blocks.refine and blocks.epochs is not None:
        raise CliError("--epochs are those of --refine; add it.")
    if not blocks.by_block and blocks.offload_folder is not None:
        raise CliError("--offload-folder is for --sequential and --refine.")
    if blocks.run_folder is not None and is_data_free(config):
        raise CliError(f"--run-folder is for calibrated methods; leave out --method {config.method}.")
    if options.heal is not None and is_data_free(config):
        raise CliError(f"--heal goes on with the calibration text; leave out --method {config.method}, or use `reparam heal`.")
    healing = None if options.heal is None else _healing(options, options.heal)
    calibration = Calibration.of(options.calibration, options.text.length, options.seed, blocks.run_folder)
    # Blocks and healing read the text even where there are statistics, so that the two do not exclude each other.
    reads_text = blocks.by_block or healing is not None
    earlier = (replace(calibration, text=None, share=None) if reads_text else calibration).earlier(config)
    if earlier is not None:
        calibration = replace(calibration, seed=earlier.seed)
    return Settings(options, config, plan, calibration, earlier, healing)


def _healing(options: CompressOptions, heal: str) -> TrainingOptions:
    """How a model is healed for as long as --heal says.

    Raises:
        CliError: it says no time.
    """
    minutes_of("--heal", heal)
    folder = options.blocks.run_folder
    return TrainingOptions(
        train_windows=HEALING_WINDOWS,
        time=heal,
        run_folder=None if folder is None else folder / HEALING,
        seed=options.seed or 0,
    )


def _read_plan(path: Path | None, options: ConfigOptions) -> Plan | None:
    if path is None:
        return None
    storage = options.storage
    sizes = (options.keep, options.rank, storage.allocation, storage.ceiling, storage.neurons)
    if any(value is not None for value in (*sizes, options.budget.budget, options.budget.bits)):
        raise CliError(
            "--plan holds the ranks; leave out --keep, --rank, --allocation, --ceiling, --neurons, --budget and --bits."
        )
    return Plan.load(path)


def _read(settings: Settings) -> Inputs:
    """Model, texts and statistics; statistics that are not there yet are gathered."""
    options, calibration = settings.options, settings.calibration
    model, tokenizer = load_dense(options.model, options.load.dtype, options.load.device)
    take_experts(settings.config, model, options.config.targets.experts)
    windows: list[dict[str, Tensor]] = []
    if options.evaluate:
        check_language_model(model, options.model, "; add --no-evaluate")
        windows = held_out(tokenizer, options.text)
    rows: list[dict[str, Tensor]] = []
    if settings.healing is not None:
        check_language_model(model, options.model, "; leave out --heal")
        rows = _healing_rows(calibration, settings.healing, model, tokenizer)
    statistics, batches = settings.earlier, None
    calibrates = statistics is None and not is_data_free(settings.config)
    if calibrates or options.blocks.by_block:
        batches = calibration.batches(model, tokenizer)
    kept_by_run = options.blocks.run_folder is not None and not options.blocks.by_block and calibration.file is None
    if calibrates and batches is not None and not kept_by_run:
        statistics = calibration.gather(model, settings.config, batches)
    return Inputs(model, tokenizer, windows, rows, batches, statistics)


def _healing_rows(
    calibration: Calibration, healing: TrainingOptions, model: Any, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Tensor]]:
    """Windows of the calibration text after those that it is calibrated on; without one, windows that the model writes."""
    text, length, skip = calibration.text, calibration.length, calibration.windows
    if text is not None:
        return rows_of(read_batches(tokenizer, "--calibration", text, length, healing.train_windows, skip))
    folder = None if calibration.folder is None else calibration.folder / HEALING_TEXT
    written = SelfWritten(model, tokenizer, HEALING_WRITTEN, length, calibration.seed or 0, True, folder)
    return rows_of(written.batches())


def _measure(model: Any, tokenizer: PreTrainedTokenizerBase, windows: list[dict[str, Tensor]], when: str) -> Quality:
    err.print(f"measuring perplexity {when} …")
    return Quality(perplexity(model, windows, progress=True), continuation(model, tokenizer, PROMPTS[0]))


def _compress(settings: Settings, inputs: Inputs, folder: Path) -> Compressed:
    """Factorise the model, which is changed in place, and save it to a folder with its record."""
    options, blocks, plan = settings.options, settings.options.blocks, settings.plan
    err.print("factorising …")
    start = time.perf_counter()
    # `compress` must plan by itself where a run folder may hold the plan that the run began with, and where `refine` moves
    # biases, which `plan` knows nothing of.
    run_folder = blocks.run_folder
    plans_itself = run_folder is not None or (blocks.refine and uses_no_data(settings.config))
    if plan is None and inputs.statistics is not None and not plans_itself:
        plan = plan_model(inputs.model, settings.config, inputs.statistics)
    model = _factorised(settings, inputs, plan)
    seconds = time.perf_counter() - start
    if run_folder is not None:
        plan = Plan.load(run_folder / PLAN)  # a run that goes on keeps the plan that it began with
    record = Record.of(model, plan=plan, run_folder=run_folder, angles=False).with_(model=options.model)
    save_whole(model, inputs.tokenizer, folder, *options.beside, overwrite=options.overwrite, save=saving_with(record))
    return Compressed(record, model.size_report(), seconds)


def _heal(
    options: CompressOptions, healing: TrainingOptions, folder: Path, rows: list[dict[str, Tensor]], compressed: Compressed
) -> Compressed:
    """Train the model that was saved to a folder, and save it to OUT."""
    model, tokenizer = load_compressed(str(folder), options.load.dtype, options.load.device, trainable=True)
    dense, _ = load_model(options.model, options.load.dtype, options.load.device)
    record = compressed.record.with_(losses=train(model, dense, rows, healing))
    save_whole(model, tokenizer, options.output, *options.beside, overwrite=options.overwrite, save=saving_with(record))
    return Compressed(record, model.size_report(), compressed.seconds)


def _factorised(settings: Settings, inputs: Inputs, plan: Plan | None) -> PeftModel:
    """The compressed model: without data, block by block, or at once."""
    blocks, statistics, batches = settings.options.blocks, inputs.statistics, inputs.batches
    if statistics is None and batches is None:
        return get_peft_model(inputs.model, settings.config)
    if statistics is None:
        seed, folder = settings.calibration.seed or 0, blocks.run_folder
        return compress_model(inputs.model, settings.config, batches, plan=plan, seed=seed, run_folder=folder)
    if not blocks.by_block or batches is None:
        return compress_model(inputs.model, settings.config, statistics, plan=plan, run_folder=blocks.run_folder)
    epochs = EPOCHS if blocks.epochs is None else blocks.epochs
    return compress_model(
        inputs.model,
        settings.config,
        batches,
        plan=plan,
        sequential=blocks.sequential,
        refine=Refinement(epochs=epochs, seed=statistics.seed) if blocks.refine else False,
        statistics=statistics,
        offload_folder=blocks.offload_folder,
        run_folder=blocks.run_folder,
    )


def _measure_again(
    options: CompressOptions,
    tokenizer: PreTrainedTokenizerBase,
    windows: list[dict[str, Tensor]],
    before: Quality | None,
    record: Record,
) -> Quality | None:
    """Load what was saved; where the dense model was measured, measure it too, and save it again with the figures."""
    err.print("loading it again …")
    source, _ = load_model(options.model, options.load.dtype, options.load.device)
    model = PeftModel.from_pretrained(source, options.output)
    if before is None:
        return None
    after = _measure(model, tokenizer, windows, "after")
    figures = note_evaluation(model, {"dense perplexity": before.perplexity, "perplexity": after.perplexity})
    sample = {"prompt": PROMPTS[0], "dense": before.sample, "compressed": after.sample}
    record = record.with_(evaluation=figures, samples=[sample])
    # What is there is the result that was saved before it was measured.
    save_whole(model, tokenizer, options.output, *options.beside, overwrite=True, save=saving_with(record))
    return after


def _print(options: CompressOptions, compressed: Compressed, before: Quality | None, after: Quality | None) -> None:
    """Tables on stdout, or one JSON object."""
    sizes = compressed.sizes
    result: dict[str, Any] = {
        "model": options.model,
        "output": str(options.output),
        "seconds": round(compressed.seconds, 2),
        "keep": sizes.keep,
        "size": sizes.to_dict(),
        "dense_modules": sizes.dense_modules,
    }
    if before is not None and after is not None:
        result["evaluation"] = {"dense perplexity": before.perplexity, "perplexity": after.perplexity}
        result["sample"] = {"dense": before.sample, "compressed": after.sample}
    if options.as_json:
        print(json.dumps(result))
        return
    out.print(size_table(sizes))
    if "evaluation" in result:
        out.print(figures_table(result["evaluation"]))
        for name, words in result["sample"].items():
            out.print(f"{name}: ", end="", style="bold")
            out.print(words, highlight=False, soft_wrap=True)
    out.print(f"factorised in {result['seconds']:.1f} s, saved to {options.output}", highlight=False, soft_wrap=True)
