"""Windows of text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import byte_tokenizer, llama
from support.strategies import PROPERTY

from reparam_peft import perplexity, text_batches

TEXT = "".join(chr(97 + i * i % 26) for i in range(100))


@pytest.mark.parametrize("bos", [True, False], ids=["with BOS", "without BOS"])
@PROPERTY
@given(st.integers(2, 40), st.integers(1, 5), st.none() | st.integers(1, 12))
def test_windows_are_consecutive_pieces_of_one_stream(bos: bool, length: int, batch_size: int, limit: int | None) -> None:
    tokenizer = byte_tokenizer(bos)
    batches = text_batches(tokenizer, TEXT, length=length, batch_size=batch_size, limit=limit)
    step = length - bos
    number = min(len(TEXT) // step, limit or len(TEXT))
    assert [len(batch["input_ids"]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]["input_ids"]) <= batch_size
    windows = torch.cat([batch["input_ids"] for batch in batches])
    assert windows.shape == (number, length)
    assert windows.dtype == torch.int64
    if bos:
        assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert tokenizer.decode(windows[:, int(bos) :].flatten()) == TEXT[: number * step]
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask"}
        assert torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"]))


def test_windows_are_what_perplexity_takes() -> None:
    model = llama(vocab_size=259)
    batches = text_batches(byte_tokenizer(), TEXT, length=20, batch_size=2)
    assert 1 < perplexity(model, batches) < 10 * 259


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "`length` must be at least 2, got 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"length": 102}, "`text` must hold at least one window of 101 tokens, got 100; use a smaller `length`"),
    ],
)
def test_windows_that_cannot_be_made(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_batches(byte_tokenizer(), TEXT, **options)
    assert len(text_batches(byte_tokenizer(), TEXT, length=101)) == 1
    with pytest.raises(ValueError, match="`text` must hold at least one window of 511 tokens, got 0"):
        text_batches(byte_tokenizer(), "")
