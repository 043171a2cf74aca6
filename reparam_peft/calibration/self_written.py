"""Text that a language model writes itself, by sampling from its begin token: calibration data that nobody has to bring."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from ..arguments import check_count, check_number, check_seed
from ..defaults import LENGTH, WINDOWS
from ..runtime.batches import Batch
from ..runtime.files import save_tensors
from ..runtime.fingerprints import (
    fingerprint_of_batches,
    fingerprint_of_config,
    fingerprint_of_model,
    fingerprint_of_tensors,
    fingerprint_of_values,
)
from ..runtime.modules import evaluating, input_device, predicts_next_token, uncompiled, unwrapped
from ..runtime.processes import fails_together, in_every_process, processes, share_out
from ..runtime.run_folder import TEXT, make_run_folder
from .given import keyword_batches
from .sampling import generator_of
from .statistics import Statistics

FORMAT = "reparam_peft text 1"
SELF = "self"  # the word that stands for batches which the model is to write itself
BATCH_SIZE = 2  # rows of text; a backward pass needs more memory than a forward pass
_STREAM = -1  # of the seeds of text, apart from those of sampled labels


def self_written(
    model: nn.Module,
    tokenizer: Any,
    windows: int = WINDOWS,
    length: int = LENGTH,
    seed: int = 0,
    *,
    temperature: float = 1.0,
    batch_size: int = 4,
    at_once: int = 48,
    progress: bool = True,
) -> list[dict[str, Tensor]]:
    """Text that a language model writes itself, in windows, as batches for `compress`, `plan` and `calibrate`.

    Each window begins with the model's begin token, and each further token is drawn from what the model predicts: the text is
    of all the kinds that the model was trained on, in the proportions that it has learnt. Where a text ends within a window,
    the begin token and another text follow. A model without a begin token begins with its end token, which divides texts.

    The draw of a token depends on the seed, the number of its window and its place; the global generators are left alone. The
    split into `at_once` and into processes changes no draw, though rounding may tip one. The model is run in eval mode with its
    cache, and left as it was. In a distributed run the processes share out the windows, and all get all of them.

    Args:
        model: a decoder with a language model head, wrapped by PEFT or not.
        tokenizer: of the model; only its begin and end tokens are used, and those of the model's config where it has none.
        windows: how many windows.
        length: tokens in a window, the begin token included.
        seed: of the draws.
        temperature: that logits are divided by: below 1 the text is more probable, above 1 less.
        batch_size: windows in a batch that is returned.
        at_once: windows that are written at a time. Their keys and values take memory; more of them take less time.
        progress: whether to show a progress bar.

    Returns:
        Batches of `input_ids` and `attention_mask`, shapes (≤ batch_size, length), int64, on the CPU, as of `text_batches`.

    Raises:
        TypeError: `temperature` is no number.
        ValueError: the model cannot write text; an argument is out of range; or the model predicts NaN.
    """
    check_count("windows", windows)
    check_count("length", length, 2)
    check_count("batch_size", batch_size)
    check_count("at_once", at_once)
    check_seed("seed", seed)
    check_number("temperature", temperature, 0, 100, above=True)
    with fails_together():
        begin, ends = begin_and_ends(model, tokenizer)
        _check_length(model, length)
    base, device = unwrapped(model), input_device(model)
    world, rank = processes()
    step = min(at_once, -(-windows // world))
    parts = {f"window {first}": range(first, min(first + step, windows)) for first in range(0, windows, step)}
    steps = (length - 1) * len(list(parts)[rank::world])
    with tqdm(total=steps, desc="Writing text", unit="token", delay=1, disable=None if progress and rank == 0 else True) as bar:

        def write(name: str) -> list[Tensor]:
            generators = [generator_of(seed, _STREAM, window) for window in parts[name]]
            draws = LogitsProcessorList([_Draws(generators, temperature, begin, ends, bar)])
            start = torch.full((len(generators), 1), begin, device=device)
            with evaluating(base), uncompiled(base), _generating(base, length):
                return [base.generate(start, attention_mask=torch.ones_like(start), logits_processor=draws)]

        def room(name: str) -> list[Tensor]:
            return [torch.empty(len(parts[name]), length, dtype=torch.int64)]

        written = share_out(parts, "Writing text", write, room, lambda _: device, progress=False)
    return _as_batches(torch.cat([text.cpu() for (text,) in written.values()]), batch_size)


def begin_and_ends(model: nn.Module, tokenizer: Any) -> tuple[int, list[int]]:
    """The token that a text begins with, and those that it ends with and which are not the same.

    Raises:
        ValueError: the model cannot write text, or nobody says what it begins with.
    """
    base = unwrapped(model)
    generates = isinstance(base, GenerationMixin)
    if not (generates and base.can_generate() and predicts_next_token(base)):
        raise ValueError(
            f"a {type(base).__name__} cannot write text itself: that takes a decoder with a language model head. Give text to "
            "calibrate on."
        )
    sources = (tokenizer, base.generation_config, base.config.get_text_config(decoder=True))
    begins, ends = ([_ids(getattr(source, f"{kind}_token_id", None)) for source in sources] for kind in ("bos", "eos"))
    begin = next((ids[0] for ids in [*begins, *ends] if ids), None)
    if begin is None:
        raise ValueError(
            "the model has no token that a text begins with: neither the tokenizer nor the model's config has a "
            "`bos_token_id` or an `eos_token_id`. Set `tokenizer.bos_token`, or give text to calibrate on."
        )
    return begin, sorted({token for ids in ends for token in ids} - {begin})


def _ids(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


class _Draws(LogitsProcessor):
    """Makes the most probable token one that is drawn: the largest of logits plus Gumbel noise has their distribution.

    So `generate` needs no draws of its own, which would take the global generator.

    Args:
        generators: of the noise of each window, on the CPU, so that the device changes nothing.
        temperature: that logits are divided by.
        begin: the token that follows an end.
        ends: the tokens that end a text.
        bar: of the tokens of a window.
    """

    def __init__(
        self, generators: Sequence[torch.Generator], temperature: float, begin: int, ends: Sequence[int], bar: tqdm[Any]
    ) -> None:
        self.generators, self.temperature, self.begin, self.ends, self.bar = generators, temperature, begin, ends, bar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float() / self.temperature
        if not torch.isfinite(logits.amax(-1)).all():
            raise ValueError("the model predicts NaN or infinite logits, from which no text can be drawn; check its weights.")
        noises = [torch.empty(logits.shape[-1], device="cpu").exponential_(generator=own) for own in self.generators]
        noise = torch.stack(noises)
        drawn = logits - noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_().to(logits.device)
        ended = torch.isin(input_ids[:, -1], torch.tensor(self.ends, dtype=input_ids.dtype, device=input_ids.device))
        drawn[ended] = -torch.inf
        drawn[ended, self.begin] = 0
        self.bar.update()
        return drawn


@contextmanager
def _generating(base: Any, length: int) -> Iterator[None]:
    """Within this block the model generates so many tokens by its most probable one, with its cache, and no end stops it.

    `generate` takes what a config leaves open from the model's own, such as a penalty for repetitions.
    """
    before = base.generation_config
    try:
        base.generation_config = GenerationConfig(max_length=length, do_sample=False, use_cache=True)
        yield
    finally:
        base.generation_config = before


@dataclass
class SelfWritten:
    """Batches that a model writes when they are first read, and that are kept in the folder of its run, if it has one.

    Attributes:
        model, tokenizer, windows, length, seed, progress: as for `self_written`.
        folder: of a run; None: the text is kept in memory only.
        given: batches that come before those.

    Raises:
        ValueError: the model cannot write text, or not so long windows of it.
    """

    model: nn.Module
    tokenizer: Any
    windows: int
    length: int
    seed: int
    progress: bool
    folder: Path | None = None
    given: Sequence[Batch] = ()

    def __post_init__(self) -> None:
        self._begin_and_ends = begin_and_ends(self.model, self.tokenizer)
        _check_length(self.model, self.length)
        self._written: list[dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.batches())

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches())

    def fingerprint(self) -> str:
        """SHA-256 of all that the batches depend on."""
        return fingerprint_of_values([self._of_text(), fingerprint_of_batches(self.given)])

    def _of_text(self) -> str:
        """SHA-256 of all that the text depends on."""
        model = [fingerprint_of_model(self.model), fingerprint_of_config(self.model)]
        return fingerprint_of_values([FORMAT, *model, self._begin_and_ends, self.windows, self.length, self.seed])

    def batches(self) -> list[Batch]:
        """The batches that are given, and those written: now, earlier, or by a run that was killed. Processes write together.

        Raises:
            ValueError: the folder holds text that another model wrote, or with other arguments, or it is of no run.
            OSError: the text cannot be kept there.
        """
        if self._written is None:
            with fails_together():
                kept = self._kept()
                if kept is None and self.folder is not None:
                    make_run_folder(self.folder)
            if in_every_process(kept is not None):
                self._written = kept
        if self._written is None:
            self._written = self_written(
                self.model,
                self.tokenizer,
                self.windows,
                self.length,
                self.seed,
                batch_size=BATCH_SIZE,
                progress=self.progress,
            )
            with fails_together():
                self._keep(self._written)
        return [*self.given, *self._written]

    def _kept(self) -> list[dict[str, Tensor]] | None:
        """The text that a run has left in the folder; None where there is none, or it is not as it was written."""
        path = None if self.folder is None else self.folder / TEXT
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata, text = file.metadata() or {}, file.get_tensor("input_ids")
        except (SafetensorError, OSError):
            return None
        if metadata.get("of") != self._of_text():
            raise ValueError(
                f"{path} holds text that another model wrote, or with another seed or size. Give another folder, or delete it."
            )
        is_text = text.dtype == torch.int64 and text.shape == (self.windows, self.length) and text.amin() >= 0
        is_whole = is_text and metadata.get("sha256") == fingerprint_of_tensors({"input_ids": text})
        return _as_batches(text, BATCH_SIZE) if is_whole and text.amax() < len(self.tokenizer) else None

    def _keep(self, batches: list[dict[str, Tensor]]) -> None:
        if self.folder is not None and processes()[1] == 0:
            text = {"input_ids": torch.cat([batch["input_ids"] for batch in batches])}
            save_tensors(self.folder / TEXT, text, {"of": self._of_text(), "sha256": fingerprint_of_tensors(text)})


def batches_or_self_written(
    batches: Any,
    model: nn.Module,
    tokenizer: Any,
    *,
    seed: int,
    progress: bool,
    folder: str | Path | None = None,
) -> Any:
    """Statistics as they were given; data as batches; in place of the word "self" those that the model is to write itself.

    Args:
        batches: data as for `keyword_batches`, statistics, None, or "self", for text of the default sizes.
        folder: of a run, which keeps the text.
        model, tokenizer, seed, progress: as for `self_written`.

    Raises:
        TypeError: the batches are nothing that can be read.
        ValueError: the batches are another word; "self" comes without a tokenizer, or a tokenizer without a use; or the model
            cannot write text.
    """
    if batches is None or isinstance(batches, (Statistics, SelfWritten)):
        if tokenizer is not None:
            given = "nothing" if batches is None else f"a {type(batches).__name__}"
            raise ValueError(f"`tokenizer` has an effect with text, rows or {SELF!r}, and `batches` is {given}; leave it out.")
        return batches
    if not isinstance(batches, str):
        return keyword_batches(batches, model, tokenizer)
    if batches != SELF:
        raise ValueError(
            f"`batches` must be batches, `Statistics` or {SELF!r}, got {batches!r}; `text_batches` makes some of a text."
        )
    if tokenizer is None:
        raise ValueError(f"`batches={SELF!r}` needs the `tokenizer` of the model, which says what a text begins with.")
    check_seed("seed", seed)
    most = _positions(model)
    length = LENGTH if most is None else min(LENGTH, most)
    return SelfWritten(model, tokenizer, WINDOWS, length, seed, progress, None if folder is None else Path(folder))


def written(batches: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Batches, of which those that a model is to write itself are written now, before it is hooked or taken apart."""
    return batches.batches() if isinstance(batches, SelfWritten) else batches


def _positions(model: nn.Module) -> int | None:
    """The most tokens that a model takes at a time; None where its config does not say."""
    config: Any = getattr(unwrapped(model), "config", None)
    has_text = hasattr(config, "get_text_config")
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) if has_text else None


def _check_length(model: nn.Module, length: int) -> None:
    most = _positions(model)
    if most is not None and length > most:
        raise ValueError(f"`length` must be at most {most}, the positions that the model has, got {length}.")


def _as_batches(text: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in text.split(batch_size)]
