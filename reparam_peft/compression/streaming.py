"""Compression of checkpoints that do not fit the memory, into standalone ones."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel

from ..arguments import check_seed
from ..blockwise.anchoring import Anchoring
from ..blockwise.refinement import Refinement
from ..calibration.statistics import Statistics
from ..config.few_bits import check_one_shot
from ..config.reparam_config import ReparamConfig
from ..layers.product import Product, named_product, named_tensors
from ..planning.plan import Plan
from ..runtime.blocks import block_of, find_blocks
from ..runtime.files import follow_umask, remove_whole, take_lock, unfinished, write_whole, writing
from ..runtime.fingerprints import fingerprint_of_model
from ..runtime.json_files import read_json
from ..runtime.modules import input_device
from ..runtime.run_folder import RunFolder, json_able
from ..tuner.data_free import check_data_free, check_standalone, factorize_targets, installing
from ..tuner.opening import open_parameters
from ..tuner.selection import select_targets, with_targets
from ..tuner.sizes import SizeReport
from ..tuner.targets import Target
from .block_by_block import Steps
from .compress import compress_blocks, options_of
from .options import Options
from .passes import MaxMemory
from .sources import copy_files, files_beside_weights

MADE = "destination.json"  # of the run folder: which folder the run has made


def compress_checkpoint(
    source: str | Path,
    destination: str | Path,
    config: ReparamConfig,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    plan: Plan | None = None,
    statistics: Statistics | None = None,
    sequential: bool | Anchoring = True,
    refine: bool | Refinement = False,
    max_memory: int | str | None = None,
    offload_folder: str | Path | None = None,
    revision: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SizeReport:
    """Compress a checkpoint into a standalone one, block by block, with little memory.

    The dense weights stay in the files of the source, which the system maps and reads as they are needed; factors go to disk
    as soon as they exist. Memory holds one block; with batches also its statistics, which are gathered by passes over one block
    at a time, forward and backward, and activations: two streams, what each block gives, and the gradients there, which
    `offload_folder` keeps on disk. Targets outside of blocks are calibrated by passes over the whole model.

    A run that was killed goes on after its last finished block when it is called again with the same arguments, and ends with
    the same bytes. Finished blocks are in `.<name of destination>.run` beside the destination, which appears when all is done.

    Tokenizer and other small files of the source go along. Code does not, nor what configs say of it, nor links that lead out
    of the source.

    Args:
        source: a folder with safetensors, or a Hub id.
        destination: a folder that does not exist yet, outside of the source.
        config: what to compress, and to which size. Without batches, what `get_peft_model` takes.
        batches: keyword batches, for everything that is calibrated; None: the truncated SVD.
        plan: the ranks; with batches only, as all that follows but the last two.
        statistics: of an earlier run; None: gathered from the batches.
        sequential: fit each matrix to what the earlier ones became: True, False, or an `Anchoring`.
        refine: train each block: True, False, or a `Refinement`.
        max_memory: bytes that statistics may take at a time, as for `compress`.
        offload_folder: folder for activations; None: in memory.
        seed: of the labels sampled for gradients.
        revision: of the Hub id.
        progress: whether to show progress bars.

    Returns:
        The sizes before and after.

    Raises:
        FileExistsError: the destination exists, or has appeared meanwhile; then the finished work is kept.
        ValueError: the source has no safetensors, holds named pipes or the destination, or is no plain transformers model;
            another run into the same destination is under way, or was begun with other arguments; or as for `compress`.
        OSError: the disk is full, or a folder cannot be written. Source and earlier results stay as they are.
    """
    destination = Path(os.path.abspath(destination))
    run = destination.with_name(f".{destination.name}.run")
    check_seed("seed", seed)
    _check_destination(destination, run)
    check_standalone(config)
    check_one_shot(config, "`compress_checkpoint`")
    if isinstance(batches, str):
        raise ValueError(
            f"`batches` must be batches, got {batches!r}; give those that `self_written` returns of a model in memory."
        )
    if batches is None:
        with_batches = {"plan": plan, "statistics": statistics, "max_memory": max_memory, "offload_folder": offload_folder}
        for name, value in {**with_batches, "refine": refine or None}.items():
            if value is not None:
                raise ValueError(f"`{name}` has an effect with `batches` only; leave it out.")
        check_data_free(config)
    folder = _local(source, revision)
    if destination.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"`destination` {destination} is inside of `source` {folder}; give a folder elsewhere.")
    files = files_beside_weights(folder)
    with writing(destination.parent):
        destination.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(run.with_suffix(".lock"), destination)
    try:
        model = _mapped(folder)
        if batches is None:
            small = _data_free(model, config, run, progress)
        else:
            steps = Steps(
                anchoring=options_of("sequential", sequential, Anchoring),
                refinement=options_of("refine", refine, Refinement),
                offload_folder=offload_folder,
                run_folder=run,
                mapped=True,
            )
            memory = replace(MaxMemory.of(max_memory, input_device(model)), by_block="always")
            options = Options(seed, progress, memory)
            small = compress_blocks(model, config, batches, steps, options, plan, statistics, autocast_adapter_dtype=False)
        report = small.size_report()
        is_made = os.path.lexists(destination)
        if not is_made:
            with writing(destination):
                aside = unfinished(run / "checkpoint")
                small.to_standalone().save_pretrained(aside)
                copy_files(folder, files, aside)
                follow_umask(aside)
                write_whole(run / MADE, json.dumps(_identity(aside)))
        _check_destination(destination, run)
        if not is_made:
            with writing(destination):
                aside.rename(destination)
        remove_whole(run)
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held, so that no other run has locked this very file
    finally:
        lock.release()
    return report


def _check_destination(destination: Path, run: Path) -> None:
    """Raise `FileExistsError` where there is a destination, unless a run has made it and was killed before it went away."""
    if not os.path.lexists(destination):
        return
    if not run.exists():
        raise FileExistsError(f"`destination` {destination} exists; give a new folder, or delete it.")
    if not (run / MADE).exists() or read_json(run / MADE) != _identity(destination):
        raise FileExistsError(
            f"`destination` {destination} exists, and the run into it has not made it. Its finished work is in {run}; move "
            "the destination away, then call again."
        )


def _identity(folder: Path) -> list[int]:
    """What stays of a folder when it is renamed."""
    status = folder.lstat()
    return [status.st_dev, status.st_ino]


def _local(source: str | Path, revision: str | None) -> Path:
    """The folder of a checkpoint, fetched from the Hub if need be."""
    folder = Path(source)
    if not folder.exists():
        wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"`source` {source} holds no *.safetensors; convert it: `from_pretrained` and `save_pretrained`.")
    return folder


def _mapped(folder: Path) -> PreTrainedModel:
    """The model of a folder, with weights that stay in the files until they are read."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = config.architectures
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""
    model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)) or getattr(
        config, "quantization_config", None
    ):
        raise ValueError(f"{folder} is a checkpoint of {name or 'no known class'}, not of a plain model of transformers.")
    model = model_class.from_pretrained(folder, dtype="auto", local_files_only=True)
    vars(model.config).pop("auto_map", None)  # names code, which does not go along
    return model.requires_grad_(False).eval()


def _data_free(model: PreTrainedModel, config: ReparamConfig, run: Path, progress: bool) -> PeftModel:
    """Factorise without data, one block at a time, each of which goes to disk."""
    config = copy.deepcopy(config)
    open_parameters(config, model)
    targets = select_targets(model, config, "default")
    settings = {"config": json_able(config.to_dict()), "model": fingerprint_of_model(model)}
    with RunFolder(run, settings, mapped=True) as folder:
        products = _data_free_products(targets, model, config, folder, progress)
    with installing(products):  # in the dtype of the files, in which they stay
        return get_peft_model(model, with_targets(config, targets), autocast_adapter_dtype=False)


def _data_free_products(
    targets: Mapping[str, Target], model: PreTrainedModel, config: ReparamConfig, folder: RunFolder, progress: bool
) -> dict[str, Product]:
    """The products of all targets, each read from the folder, where an earlier run has left it, or this one puts it."""
    products: dict[str, Product] = {}
    parts = _by_block(model, targets)
    for position, block in enumerate(tqdm(parts, desc="Factorising", unit="block", disable=None if progress else True)):
        of_block = parts[block]
        if position >= len(folder.finished):
            start = time.perf_counter()
            factorized = factorize_targets(of_block, config, progress=False)
            made = {name: target.product for name, target in factorized.items() if target.product is not None}
            folder.finish({"block": block, "seconds": round(time.perf_counter() - start, 2)}, named_tensors(made))
        state = folder.tensors(position)
        for name, target in of_block.items():
            if target.rank is not None:
                products[name] = named_product(state, name, target.rank, target.storage)
    return products


def _by_block(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, dict[str, Target]]:
    """Targets in the order of the model, by the block that they belong to, or by themselves."""
    try:
        blocks = list(find_blocks(model))
    except ValueError:
        blocks = []
    parts: dict[str, dict[str, Target]] = {}
    for name, target in targets.items():
        parts.setdefault(block_of(name, blocks) or name, {})[name] = target
    return parts
