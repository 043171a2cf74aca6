"""How good, how large and how fast a model is."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

IGNORED = -100  # transformers' label of positions that do not count


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the logits at a position are for the next token: a decoder that generates, wrapped by PEFT or not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    return not type(base).__name__.endswith("ForMaskedLM") and hasattr(base, "generate")


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = False) -> float:
    """exp of the mean negative log-likelihood per predicted token, computed in float32 and summed in float64.

    Positions with label −100 and padding (attention mask 0) do not count. Decoders predict the next token, so labels are
    shifted by one; encoder-decoders and masked language models predict `labels` in place.

    Args:
        model: called as `model(**batch)`, must return `.logits` of shape (batch, length, vocabulary); run in eval mode and put
            back as it was.
        batches: keyword batches with `input_ids`, optionally `attention_mask` and `labels`; without labels the input is
            predicted. Tensors are moved to the model's device.
        progress: whether to show a progress bar.

    Returns:
        The perplexity, ≥ 1.

    Raises:
        ValueError: there is no token to predict, or a batch cannot be used.
        FloatingPointError: logits or loss are NaN or infinite.
    """
    shifts = predicts_next_token(model)
    total, count = 0.0, 0
    bar = tqdm(batches, desc="Evaluating", unit="batch", delay=1, disable=None if progress else True)
    with evaluating(model), bar:
        for index, batch in enumerate(bar):
            batch = _to_device(batch, model, index)
            labels = labels_of(batch, shifts, index)
            logits, labels = _predictions(model, batch, labels, shifts)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            if not torch.isfinite(losses):
                raise FloatingPointError(f"the loss of batch {index} is {losses.item()}; the model's logits are not finite.")
            total += losses.double().item()
            count += int((labels != IGNORED).sum())
    if count == 0:
        raise ValueError("`batches` must hold at least one token to predict, got none (empty, exhausted, or all masked).")
    mean = total / count
    if mean > math.log(torch.finfo(torch.float64).max):
        raise FloatingPointError(f"the mean loss of {mean:.3g} nats/token overflows when exponentiated.")
    return math.exp(mean)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """The fraction of labels that a model's largest logit is at; for a decoder, of next tokens. Labels of −100 do not count.

    Args:
        model: called as `model(**batch)`, must return `.logits`, with the classes in the last dimension; run in eval mode and
            put back as it was.
        batches: keyword batches with `labels` of the other dimensions of the logits; a decoder predicts its own input without.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: there is no label, or a batch cannot be used.
    """
    shifts = predicts_next_token(model)
    right = count = 0
    with evaluating(model):
        for index, batch in enumerate(batches):
            device = input_device(model)
            batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            labels = labels_of(batch, shifts, index)
            logits, labels = _predictions(model, batch, labels, shifts)
            if logits.shape[:-1] != labels.shape:
                raise ValueError(
                    f"batch {index} has `labels` {tuple(labels.shape)}, and logits {tuple(logits.shape)} need others."
                )
            counts = labels != IGNORED
            right += int((logits.argmax(-1) == labels)[counts].sum())
            count += int(counts.sum())
    if count == 0:
        raise ValueError("`batches` must hold at least one label, got none.")
    return right / count


def text_batches(
    tokenizer: Any, text: str, *, length: int = 512, batch_size: int = 4, limit: int | None = None
) -> list[dict[str, Tensor]]:
    """Non-overlapping windows of one token stream, as batches for `perplexity`.

    A BOS token precedes each window only where the tokenizer adds one to a text by itself: a model trained with it needs it.
    The tokens after the last whole window are dropped.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text.
        length: tokens in a window, a BOS token included.
        batch_size: windows in a batch.
        limit: the most windows; None: all.

    Returns:
        Batches of `input_ids` and `attention_mask`, shapes (≤ batch_size, length), int64.

    Raises:
        ValueError: an argument is out of range, or the text is shorter than one window.
    """
    for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    stream = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts_with = tokenizer("a")["input_ids"][:1]
    bos = starts_with if tokenizer.bos_token_id is not None and starts_with == [tokenizer.bos_token_id] else []
    step = length - len(bos)
    windows = [bos + stream[i : i + step] for i in range(0, len(stream) - step + 1, step)][:limit]
    if not windows:
        raise ValueError(f"`text` must hold at least one window of {step} tokens, got {len(stream)}; use a smaller `length`.")
    rows = torch.tensor(windows)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(batch_size)]


@dataclass(frozen=True)
class MatrixSize:
    """The size of one targeted matrix.

    Attributes:
        name: of the module.
        shape: (out, in).
        rank: of its factors, or None where it stays dense.
        stored_parameters: what a checkpoint holds.
        bytes_per_parameter: in the base model's dtype.
        mask_bytes: how many of the stored parameters are bytes of the mask of the pivot form.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    stored_parameters: int
    bytes_per_parameter: int
    mask_bytes: int = 0

    @property
    def dense_parameters(self) -> int:
        """out · in."""
        return self.shape[0] * self.shape[1]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the original matrix."""
        return self.dense_parameters * self.bytes_per_parameter

    @property
    def stored_bytes(self) -> int:
        """Bytes of the factors, or of the matrix where it stays dense."""
        return (self.stored_parameters - self.mask_bytes) * self.bytes_per_parameter + self.mask_bytes


@dataclass(frozen=True)
class SizeReport:
    """Parameters and bytes of the targeted matrices and of the whole model, before and after.

    Attributes:
        matrices: one entry per target.
        other_parameters: parameters of everything that is not a targeted matrix; tied ones count once.
        other_bytes: their bytes.
    """

    matrices: list[MatrixSize]
    other_parameters: int
    other_bytes: int

    @property
    def keep(self) -> float:
        """Stored over original parameters of the targets; 1 without targets."""
        sizes = self.to_dict()["targets"]
        return sizes["stored_parameters"] / sizes["dense_parameters"] if sizes["dense_parameters"] else 1.0

    @property
    def dense_modules(self) -> list[str]:
        """Names of the targets that stay dense."""
        return [matrix.name for matrix in self.matrices if matrix.rank is None]

    def to_dict(self) -> dict[str, dict[str, int]]:
        """`{"targets": …, "model": …}`, each with dense and stored parameters and bytes."""
        fields = ("dense_parameters", "stored_parameters", "dense_bytes", "stored_bytes")
        targets = {name: sum(getattr(matrix, name) for matrix in self.matrices) for name in fields}
        rest = {name: self.other_parameters if "parameters" in name else self.other_bytes for name in fields}
        return {"targets": targets, "model": {name: targets[name] + rest[name] for name in fields}}

    def rows(self) -> list[tuple[str, str, int, int, float]]:
        """The table: part (targets or model), unit (parameters or bytes), before, after, and after over before."""
        return [
            (part, unit, before := sizes[f"dense_{unit}"], after := sizes[f"stored_{unit}"], after / before if before else 1.0)
            for part, sizes in self.to_dict().items()
            for unit in ("parameters", "bytes")
        ]

    def __str__(self) -> str:
        lines = [f"{'':14}{'before':>16}{'after':>16}{'kept':>8}"]
        for part, unit, before, after, kept in self.rows():
            lines.append(f"{part + ' ' + unit:18}{before:>12,}{after:>16,}{kept:>8.1%}")
        dense = self.dense_modules
        lines.append(f"{len(self.matrices) - len(dense)} matrices factorised, {len(dense)} left dense")
        return "\n".join(lines + [f"  dense: {name}" for name in dense])


@dataclass(frozen=True)
class Benchmark:
    """Latency and memory of a model, and of a baseline in the same run.

    Attributes:
        prefill_ms: median milliseconds of a forward pass over the prompt.
        decode_ms: median milliseconds per generated token; None for models without a cache.
        peak_bytes: memory above what was held before the run (device memory on CUDA, else resident memory).
        prefill_speedup: baseline over model; None without a baseline.
        decode_speedup: baseline over model; None without a baseline or a cache.
        baseline: the baseline's own figures.
    """

    prefill_ms: float
    decode_ms: float | None
    peak_bytes: int
    prefill_speedup: float | None = None
    decode_speedup: float | None = None
    baseline: Benchmark | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, nested, for JSON."""
        return asdict(self)


@torch.no_grad()
def benchmark(
    model: nn.Module,
    baseline: nn.Module | None = None,
    *,
    prompt_length: int = 512,
    new_tokens: int = 16,
    batch_size: int = 1,
    repeats: int = 5,
) -> Benchmark:
    """Prefill and decode latency with cold weights, and peak memory, beside a dense baseline in the same run.

    Before each timed call the processor's caches are flushed, so that a small model is not flattered by weights that fit
    them. Model and baseline alternate, so that noise of a shared machine hits both; medians are reported.

    Args:
        model: a transformers or PEFT model that takes `input_ids`.
        baseline: the dense model to compare with.
        prompt_length: tokens of the prompt.
        new_tokens: tokens decoded after it, one at a time with a cache.
        batch_size: sequences.
        repeats: timed runs, after one that warms up.

    Returns:
        A `Benchmark`.

    Raises:
        ValueError: an argument is out of range, or a model has no config or is an encoder-decoder.
    """
    sizes = {"prompt_length": prompt_length, "new_tokens": new_tokens, "batch_size": batch_size, "repeats": repeats}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    models = [model] if baseline is None else [model, baseline]
    for given in models:
        config = getattr(given, "config", None)
        if config is None or config.is_encoder_decoder:
            raise ValueError(
                f"`benchmark` takes transformers models that are encoders or decoders, got a {type(given).__name__}"
                f"{' without a config' if config is None else ', which is both'}."
            )
    runs: list[list[tuple[float, float | None, int]]] = [[] for _ in models]
    for repeat in range(repeats + 1):
        for timed, own in zip(models, runs, strict=True):
            with evaluating(timed):
                run = _time_once(timed, prompt_length, new_tokens, batch_size)
            if repeat:
                own.append(run)
    results = [
        Benchmark(
            prefill_ms=statistics.median(run[0] for run in own),
            decode_ms=None if own[0][1] is None else statistics.median(run[1] for run in own),
            peak_bytes=max(run[2] for run in own),
        )
        for own in runs
    ]
    if baseline is None:
        return results[0]
    own, other = results
    return replace(
        own,
        prefill_speedup=other.prefill_ms / own.prefill_ms,
        decode_speedup=None if own.decode_ms is None or other.decode_ms is None else other.decode_ms / own.decode_ms,
        baseline=other,
    )


def flush_caches(device: torch.device) -> None:
    """Evict weights from the caches by writing more than any cache holds (256 MiB)."""
    _flush_buffer(device).add_(1)
    _synchronize(device)


@cache
def _flush_buffer(device: torch.device) -> Tensor:
    # Kept, so that its allocation does not show in the peak memory of what is measured.
    return torch.zeros(64 * 2**20, device=device)


def _time_once(model: nn.Module, prompt_length: int, new_tokens: int, batch_size: int) -> tuple[float, float | None, int]:
    """Milliseconds of the prefill, milliseconds per decoded token, and peak bytes."""
    device = input_device(model)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(batch_size * prompt_length, device=device).view(batch_size, -1) % vocabulary
    # An encoder has no cache to decode with.
    caches = predicts_next_token(model)
    options = {"use_cache": True} if caches else {}

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        flush_caches(device)
        start = time.perf_counter()
        result = call()
        _synchronize(device)
        return 1000 * (time.perf_counter() - start), result

    flush_caches(device)
    with _peak_memory(device) as peak:
        prefill_ms, output = timed(lambda: model(input_ids=tokens, **options))
        steps = []
        for _ in range(new_tokens if caches else 0):
            tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            step_ms, output = timed(lambda: model(input_ids=tokens, past_key_values=cache, use_cache=True))  # noqa: B023
            steps.append(step_ms)
    return prefill_ms, statistics.median(steps) if steps else None, peak[0]


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """A list that holds, afterwards, the bytes used above those at the start."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    process = psutil.Process()
    before = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter that holds data, as others may be offloaded."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _to_device(batch: Mapping[str, Tensor], model: nn.Module, index: int) -> dict[str, Any]:
    if not isinstance(batch, Mapping) or not ("input_ids" in batch or "inputs_embeds" in batch):
        kind = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"`batches` must hold dicts with `input_ids`, got {kind} as batch {index}.")
    device = input_device(model)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _predictions(model: nn.Module, batch: Mapping[str, Any], labels: Tensor, shifts: bool) -> tuple[Tensor, Tensor]:
    """Logits, and the labels that they are for."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels" or not shifts}).logits
    return (logits[:, :-1], labels[:, 1:]) if shifts else (logits, labels)


def labels_of(batch: Mapping[str, Tensor], shifts: bool, index: int) -> Tensor:
    """The tokens to predict, with padding ignored."""
    labels = batch.get("labels")
    if labels is None:
        if not shifts or "input_ids" not in batch:
            raise ValueError(f"batch {index} has no `labels`, which a model that does not predict its own input needs.")
        labels = batch["input_ids"]
    mask = batch.get("attention_mask")
    if shifts and mask is not None:
        # Neither padding itself nor the first token after it, which nothing was there to predict from.
        after_padding = F.pad(mask[:, :-1] == 0, (1, 0), value=False)
        labels = labels.masked_fill((mask == 0) | after_padding, IGNORED)
    return labels
