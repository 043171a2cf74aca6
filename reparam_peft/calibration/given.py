"""Calibration data as people have it, made into the keyword batches that a model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.batches import IGNORED, Batch
from ..runtime.modules import unwrapped
from ..runtime.processes import check_whole

Objective: TypeAlias = Callable[[nn.Module, dict[str, Any]], Tensor]  # (model, batch) → loss, or logits
ROWS = 8  # that are put together where single rows are given
TOKENS = 512  # that are taken of a text, or as many as the model has positions
# What a model reads, with the dimensions that one row has of it; the first that is there tells a row from a batch.
INPUTS = {
    **{"input_ids": 1, "spatial_shapes": 1},  # height and width, of an image that is given as a row of patches
    **{"pixel_values": 3, "input_features": 2, "input_values": 1, "inputs_embeds": 2},
}
TEXT = "text"  # the column of data sets that are not tokenised
MASK, LABELS = "attention_mask", "labels"
ACCEPTED = (
    "keyword batches, as a DataLoader yields them; rows of a tokenised data set; texts, with `tokenizer`; a processor's or "
    "tokenizer's output; tensors; or pairs (x, y)"
)


def keyword_batches(batches: Any, model: nn.Module, tokenizer: Any = None) -> Iterable[Batch]:
    """Data in any of the accepted kinds, as batches of keywords; such as are batches already are handed on as they are.

    Args:
        batches: keyword batches of tensors, arrays or lists; single rows, of any lengths, which are padded and put together by
            eight; texts, of which the first 512 tokens are taken, each on its own; one mapping, as a tokenizer or processor
            returns it; tensors, for the first argument of the model; or pairs (x, y) of such and labels.
        model: that they are for. Columns of rows that its `forward` does not name are left out.
        tokenizer: for texts, and for the token to pad with; None: that of the model's config.

    Returns:
        The same object, if it is a list of keyword batches; else one that is read as often as `batches` can be read.

    Raises:
        TypeError: it cannot be iterated over.
        ValueError: `tokenizer` is given beside a list of batches, which need none.
    """
    check_whole(batches)
    if isinstance(batches, Mapping):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be {ACCEPTED}, got a {type(batches).__name__}.")
    if isinstance(batches, list) and all(isinstance(batch, Mapping) and _is_batch(batch) for batch in batches):
        if tokenizer is not None and batches:
            raise ValueError("`tokenizer` has an effect with text and rows, and `batches` are batches; leave it out.")
        return batches
    return _Given(batches, model, tokenizer)


class _Given:
    """Reads what was given anew in each iteration."""

    def __init__(self, source: Iterable[Any], model: nn.Module, tokenizer: Any) -> None:
        self.source, self.tokenizer = source, tokenizer
        model = unwrapped(model)
        parameters = inspect.signature(model.forward).parameters
        self.takes = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
        self.first = next(iter(parameters), None)
        config: Any = getattr(model, "config", None)
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def __iter__(self) -> Iterator[Batch]:
        rows: list[Mapping[str, Any]] = []
        for index, item in enumerate(self.source):
            read = self._read(item, index)
            if _is_row(read):
                rows.append(read)
                if len(rows) < ROWS:
                    continue
            if rows:
                yield self._together(rows, index)
                rows = []
            if not _is_row(read):
                yield from self._batches(read, index)
        if rows:
            yield self._together(rows, index)

    def _read(self, item: Any, index: int) -> Mapping[str, Any]:
        """One item as a mapping, of a row or a batch."""
        if isinstance(item, str):
            return self._tokens(item, index)
        if isinstance(item, Mapping):
            return self._tokens(item[TEXT], index) if _is_text(item) else item
        if isinstance(item, (tuple, list)) and len(item) == 2:
            x, y = item
            if isinstance(x, (Mapping, Tensor)):
                inputs = dict(x) if isinstance(x, Mapping) else {self._named(index): x}
                return {**inputs, LABELS: y} if isinstance(y, Tensor) else inputs
        if isinstance(item, Tensor):
            return {self._named(index): item}
        parts = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise ValueError(f"`batches` must hold {ACCEPTED}, got a {type(item).__name__}{parts} as number {index}.")

    def _named(self, index: int) -> str:
        if self.first is None:
            raise ValueError(f"number {index} of `batches` is a tensor, and `forward` of the model takes none; give keywords.")
        return self.first

    def _tokens(self, text: str, index: int) -> dict[str, Any]:
        if self.tokenizer is None:
            raise ValueError(f"number {index} of `batches` is text, {text[:30]!r}, which needs the `tokenizer` of the model.")
        most = min(TOKENS, getattr(self.config, "max_position_embeddings", None) or TOKENS)
        tokens = dict(self.tokenizer(text, truncation=True, max_length=most))
        if not tokens["input_ids"]:
            raise ValueError(f"number {index} of `batches` is text of no tokens, {text!r}; leave it out.")
        return tokens

    def _batches(self, batch: Mapping[str, Any], index: int) -> Iterator[Batch]:
        """A batch with tensors in place of arrays and lists; of ragged lists, several of a few rows each."""
        if _is_batch(batch):
            yield batch
            return
        lengths = {name: len(value) for name, value in batch.items() if isinstance(value, (list, tuple, np.ndarray, Tensor))}
        count = max(lengths.values(), default=0)
        ragged = {name: value for name, value in batch.items() if lengths.get(name) == count and name in self.takes}
        if not ragged:
            yield batch  # the model will say what it misses
            return
        for start in range(0, count, ROWS):
            rows = [{name: value[i] for name, value in ragged.items()} for i in range(start, min(start + ROWS, count))]
            yield self._together(rows, index)

    def _together(self, rows: Sequence[Mapping[str, Any]], index: int) -> Batch:
        """Rows as one batch, padded at their ends where they have different lengths, with a mask that says so."""
        columns = [name for name in rows[0] if name in self.takes and all(row.get(name) is not None for row in rows)]
        tensors = {name: [_on_the_processor(row[name]) for row in rows] for name in columns}
        main = next((name for name in INPUTS if name in tensors), "")
        takes_mask = MASK in self.takes and MASK not in tensors
        if takes_mask and INPUTS.get(main) == 1 and len({len(row) for row in tensors[main]}) > 1:
            tensors[MASK] = [torch.ones(len(row), dtype=torch.int64, device="cpu") for row in tensors[main]]
        batch = {}
        for name, values in tensors.items():
            shapes = {tuple(value.shape) for value in values}
            if len(shapes) == 1:
                batch[name] = torch.stack(values)
            elif all(value.ndim == 1 for value in values) and (name in (MASK, LABELS) or MASK in tensors):
                batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=self._padding(name))
            else:
                raise ValueError(
                    f"rows up to number {index} of `batches` have {name!r} of shapes {sorted(shapes)}, which cannot be padded "
                    "for a model without an attention mask; give rows of one shape, or batches."
                )
        return batch

    def _padding(self, name: str) -> int:
        if name == LABELS:
            return IGNORED
        if not name.endswith("input_ids"):
            return 0
        found = (getattr(source, "pad_token_id", None) for source in (self.tokenizer, self.config))
        return next((token for token in found if isinstance(token, int)), 0)  # what is masked may be any token


def _on_the_processor(value: Any) -> Tensor:
    """What a row holds, where rows are put together."""
    return value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value), device="cpu")


def _is_row(item: Mapping[str, Any]) -> bool:
    """Whether a mapping is of one row, by the dimensions of what the model reads first."""
    for name, dimensions in INPUTS.items():
        if name in item:
            return _ndim(item[name]) == dimensions
    return False


def _is_batch(item: Mapping[str, Any]) -> bool:
    """Whether a mapping can be handed to the model as it is: no row, no text, no arrays, no lists to be made tensors."""
    if _is_row(item) or _is_text(item) or any(isinstance(value, np.ndarray) for value in item.values()):
        return False
    return not any(isinstance(item.get(name), list) for name in (*INPUTS, MASK, LABELS))


def _is_text(item: Mapping[str, Any]) -> bool:
    return not any(name in item for name in INPUTS) and isinstance(item.get(TEXT), str)


def _ndim(value: Any) -> int:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim
    return 1 + _ndim(value[0]) if isinstance(value, (list, tuple)) and len(value) else int(isinstance(value, (list, tuple)))
