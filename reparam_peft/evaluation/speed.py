"""How fast a model is, and the memory it takes."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from ..runtime.modules import evaluating, input_device, predicts_next_token


@dataclass(frozen=True)
class Benchmark:
    """Latency and memory of a model, and of a baseline at the same time.

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
    for timed in models:
        config = getattr(timed, "config", None)
        if config is None or config.is_encoder_decoder:
            raise ValueError(
                f"`benchmark` takes transformers models that are encoders or decoders, got a {type(timed).__name__}"
                f"{' without a config' if config is None else ', which is both'}."
            )
    timings: list[list[Timing]] = [[] for _ in models]
    for repeat in range(repeats + 1):
        for timed, of_model in zip(models, timings, strict=True):
            with evaluating(timed):
                timing = _time_once(timed, prompt_length, new_tokens, batch_size)
            if repeat:
                of_model.append(timing)
    result, *results = map(_median, timings)
    if not results:
        return result
    (of_baseline,) = results
    return replace(
        result,
        prefill_speedup=of_baseline.prefill_ms / result.prefill_ms,
        decode_speedup=(
            None if result.decode_ms is None or of_baseline.decode_ms is None else of_baseline.decode_ms / result.decode_ms
        ),
        baseline=of_baseline,
    )


class Timing(NamedTuple):
    """One run: milliseconds of the prefill, milliseconds per decoded token, None without a cache, and peak bytes."""

    prefill_ms: float
    decode_ms: float | None
    peak_bytes: int


def _median(timings: Sequence[Timing]) -> Benchmark:
    """The figures of a model that was timed several times."""
    decoding = [timing.decode_ms for timing in timings if timing.decode_ms is not None]
    return Benchmark(
        prefill_ms=statistics.median(timing.prefill_ms for timing in timings),
        decode_ms=statistics.median(decoding) if decoding else None,
        peak_bytes=max(timing.peak_bytes for timing in timings),
    )


def flush_caches(device: torch.device) -> None:
    """Evict weights from the processor's caches by writing more than any of them holds (256 MiB)."""
    _flush_buffer(device).add_(1)
    synchronize(device)


@cache
def _flush_buffer(device: torch.device) -> Tensor:
    # Kept, so that its allocation does not show in the peak memory of what is measured; for callers of either mode.
    with torch.inference_mode(False):
        return torch.zeros(64 * 2**20, device=device)


def _time_once(model: Any, prompt_length: int, new_tokens: int, batch_size: int) -> Timing:
    """Time a forward pass over a prompt, and the decoding after it."""
    device = input_device(model)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(batch_size * prompt_length, device=device).view(batch_size, -1) % vocabulary
    # An encoder has no cache to decode with.
    caches = predicts_next_token(model)
    options = {"use_cache": new_tokens > 0} if caches else {}

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        flush_caches(device)
        start = time.perf_counter()
        result = call()
        synchronize(device)
        return 1000 * (time.perf_counter() - start), result

    flush_caches(device)
    with _peak_memory(device) as peak:
        prefill_ms, output = timed(lambda: model(input_ids=tokens, **options))
        steps = []
        for _ in range(new_tokens if caches else 0):
            tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            step_ms, output = timed(lambda: model(input_ids=tokens, past_key_values=cache, use_cache=True))  # noqa: B023
            steps.append(step_ms)
    return Timing(prefill_ms, statistics.median(steps) if steps else None, peak[0])


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


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
