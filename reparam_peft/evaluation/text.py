"""Windows of a text, as batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts_with = tokenizer("a")["input_ids"][:1]
    bos = starts_with if tokenizer.bos_token_id is not None and starts_with == [tokenizer.bos_token_id] else []
    step = length - len(bos)
    windows = [bos + tokens[i : i + step] for i in range(0, len(tokens) - step + 1, step)][:limit]
    if not windows:
        raise ValueError(f"`text` must hold at least one window of {step} tokens, got {len(tokens)}; use a smaller `length`.")
    rows = torch.tensor(windows, device="cpu")
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(batch_size)]
