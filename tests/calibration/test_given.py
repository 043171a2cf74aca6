"""Calibration data in every kind that is taken: the same batches of keywords come of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.models import byte_tokenizer, llama
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BatchFeature

from reparam_peft import ReparamConfig, calibrate, compress
from reparam_peft.calibration.given import keyword_batches

ROWS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
PADDED = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [10, 11, 12, 13]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


class Classifier(nn.Sequential):
    """A model that is none of transformers', called with one tensor."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


KINDS: dict[str, Callable[[], Any]] = {
    "rows of a data set": lambda: Dataset.from_dict({"input_ids": ROWS, "topic": ["a", "b", "c"], "kind": [1, 2, 3]}),
    "rows of tensors": lambda: [{"input_ids": torch.tensor(row)} for row in ROWS],
    "columns": lambda: {"input_ids": ROWS, "topic": ["a", "b", "c"]},
    "a tokenizer's output": lambda: BatchEncoding({"input_ids": ROWS, "attention_mask": [[1] * len(row) for row in ROWS]}),
    "a processor's output": lambda: BatchFeature({"input_ids": PADDED, "attention_mask": MASK}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_padded_and_masked(kind: str) -> None:
    (batch,) = keyword_batches(KINDS[kind](), llama())
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(batch["input_ids"], PADDED)
    assert torch.equal(batch["attention_mask"], MASK)


def test_batches_are_handed_on_and_read_as_often_as_they_can_be() -> None:
    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]
    assert keyword_batches(batches, llama()) is batches
    loader = DataLoader([{"input_ids": torch.arange(4)}] * 4, batch_size=2)
    wrapped = keyword_batches(loader, llama())
    assert [[batch["input_ids"].shape for batch in wrapped] for _ in range(2)] == [[(2, 4), (2, 4)]] * 2
    once = keyword_batches((batch for batch in batches), llama())
    assert [len(list(once)) for _ in range(2)] == [1, 0]


def test_images_that_are_rows_of_patches_are_a_batch() -> None:
    patches = {"pixel_values": torch.randn(2, 4, 12), "pixel_attention_mask": torch.ones(2, 4)}
    batches = [{**patches, "spatial_shapes": torch.full((2, 2), 2)}]
    assert keyword_batches(batches, llama()) is batches


def test_rows_come_by_eight_with_labels_that_do_not_count_where_padded() -> None:
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in range(1, 11)]
    first, second = keyword_batches(rows, llama(pad_token_id=7))
    assert first["input_ids"].shape == (8, 8)
    assert second["input_ids"].tolist()[0] == [1] * 9 + [7]
    assert second["labels"].tolist()[0] == [1] * 9 + [-100]


@pytest.mark.parametrize("rows", [["abc", "de"], [{"text": "abc"}, {"text": "de"}]])
def test_texts(rows: list[Any]) -> None:
    tokenizer = byte_tokenizer()
    (batch,) = keyword_batches(rows, llama(vocab_size=259), tokenizer)
    expected = [tokenizer(text).input_ids for text in ("abc", "de")]
    assert [row[mask == 1].tolist() for row, mask in zip(*batch.values(), strict=True)] == expected


def test_pairs_and_an_objective() -> None:
    x, y = torch.randn(24, 16), torch.randint(4, (24,))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    (first, *_) = keyword_batches(loader, Classifier())
    assert first.keys() == {"input", "labels"}
    config = ReparamConfig(target_modules=["0", "2"], keep=0.8)

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["input"]), batch["labels"], reduction="sum")

    def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["input"])

    found = {name: calibrate(Classifier(), config, loader, objective=one) for name, one in [("loss", loss), ("logits", logits)]}
    model = Classifier()
    model, fisher = Classifier(), found["loss"].fisher("2")
    per_row = model(x).detach().softmax(-1) - nn.functional.one_hot(y, 4)
    torch.testing.assert_close(fisher.double(), (per_row.T @ per_row).double() / 24, rtol=1e-4, atol=1e-6)
    assert found["logits"].gradient_tokens == found["loss"].gradient_tokens == 24
    assert compress(Classifier(), config, loader, objective=loss, progress=False).size_report().keep <= 0.8


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (5, TypeError, "got a int"),
        ([5], ValueError, "got a int as number 0"),
        ([(torch.ones(2), 1, 2)], ValueError, "got a tuple of 3 as number 0"),
        (["text"], ValueError, "number 0 of `batches` is text, 'text', which needs the `tokenizer`"),
        ([{"pixel_values": torch.ones(3, 4, 4)}, {"pixel_values": torch.ones(3, 5, 4)}], ValueError, "has? 'pixel_values' of"),
    ],
)
def test_what_cannot_be_used_is_named(given: Any, error: type[Exception], match: str) -> None:
    model = llama()
    if error is ValueError and "pixel" in match:
        model.forward = lambda pixel_values: pixel_values
    with pytest.raises(error, match=match.replace("has?", "have")):
        list(keyword_batches(given, model))


def test_an_objective_that_returns_no_tensor_is_refused() -> None:
    config = ReparamConfig(target_modules=["0"], keep=0.8)
    with pytest.raises(ValueError, match="`objective` must return a loss or logits"):
        calibrate(Classifier(), config, [torch.randn(4, 16)], objective=lambda model, batch: 1.0)
    with pytest.raises(TypeError, match="`objective` must be callable"):
        calibrate(Classifier(), config, [torch.randn(4, 16)], objective="loss")


def test_a_tokenizer_without_a_use_is_refused() -> None:
    batches = [{"input_ids": torch.ones(2, 3, dtype=torch.int64)}]
    with pytest.raises(ValueError, match="`tokenizer` has an effect with text and rows, and `batches` are batches"):
        keyword_batches(batches, llama(), byte_tokenizer())
