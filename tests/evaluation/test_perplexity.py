"""Perplexity against values known by hand or from transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from support.models import gpt2, llama
from support.strategies import PROPERTY
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from reparam_peft import ReparamConfig, perplexity
from reparam_peft.evaluation import perplexity as evaluation
from reparam_peft.runtime.modules import predicts_next_token

IGNORED = -100


class TableModel(nn.Module):
    """A decoder that looks its logits up by the current token."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def generate(self) -> None:
        """What tells a decoder."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


def tokens(rows: int = 3, length: int = 9, vocabulary: int = 100, seed: int = 0) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()


def masked_bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 60}
    return BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=32)).eval()


@PROPERTY
@given(st.integers(2, 500), st.integers(1, 4), st.integers(2, 8))
def test_uniform_logits_give_the_size_of_the_vocabulary(vocabulary: int, rows: int, length: int) -> None:
    model = TableModel(torch.zeros(vocabulary, vocabulary))
    ids = torch.arange(rows * length).view(rows, length) % vocabulary
    assert perplexity(model, [{"input_ids": ids}]) == pytest.approx(vocabulary, rel=1e-5)


def test_a_value_computed_by_hand() -> None:
    # After token 0, token 1 has probability 1/2; after token 1, token 0 has 1/8. The last token of a row predicts nothing.
    model = TableModel(torch.tensor([[0.5, 0.5], [0.125, 0.875]]).log())
    assert perplexity(model, [{"input_ids": torch.tensor([[0, 1, 0]])}]) == pytest.approx((2 * 8) ** 0.5, rel=1e-6)
    batches = [{"input_ids": torch.tensor([[0, 1]])}, {"input_ids": torch.tensor([[1, 0, 1]])}]
    assert perplexity(model, batches) == pytest.approx((2 * 8 * 2) ** (1 / 3), rel=1e-6), "a mean over tokens, not batches"


@pytest.mark.parametrize("build", [llama, gpt2])
def test_is_the_exponential_of_transformers_own_loss(build: object) -> None:
    model, ids = build(), tokens()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert perplexity(model, [{"input_ids": ids}]) == pytest.approx(math.exp(loss), rel=1e-5)
    assert perplexity(model, [{"input_ids": ids, "labels": ids}]) == pytest.approx(math.exp(loss), rel=1e-5)


def test_perplexity_shows_a_bar_when_asked_only(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def bar(batches: list, **options: object) -> evaluation.tqdm:
        bars.append((options["desc"], options["disable"]))
        return tqdm(batches, **{**options, "disable": True})

    tqdm = evaluation.tqdm
    monkeypatch.setattr(evaluation, "tqdm", bar)
    batches = [{"input_ids": tokens()}]
    assert perplexity(llama(), batches) == perplexity(llama(), batches, progress=True)
    assert bars == [("Evaluating", True), ("Evaluating", None)]  # None: where stderr is a terminal


def test_a_peft_model_of_full_rank_has_the_perplexity_of_its_base() -> None:
    batches = [{"input_ids": tokens()}]
    expected = perplexity(llama(), batches)
    model = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", r="full"))
    assert perplexity(model, batches) == pytest.approx(expected, rel=1e-5)


def test_ignored_labels_do_not_count() -> None:
    model, ids = llama(), tokens()
    labels = ids.clone()
    labels[:, :4] = IGNORED
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss
    got = perplexity(model, [{"input_ids": ids, "labels": labels}])
    assert got == pytest.approx(math.exp(loss), rel=1e-5)
    assert got != pytest.approx(perplexity(model, [{"input_ids": ids}]), rel=1e-3)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("with_labels", [False, True])
def test_padding_does_not_count(side: str, with_labels: bool) -> None:
    model = llama()
    rows = [tokens(1, length, seed=length)[0] for length in (4, 9, 6)]
    expected = perplexity(model, [{"input_ids": row[None]} for row in rows])

    def pad(row: Tensor, value: int) -> Tensor:
        room = 9 - len(row)
        return nn.functional.pad(row, (0, room) if side == "right" else (room, 0), value=value)

    batch = {
        "input_ids": torch.stack([pad(row, 7) for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), 0) for row in rows]),
    }
    if with_labels:
        batch["labels"] = torch.stack([pad(row, IGNORED) for row in rows])
    assert perplexity(model, [batch]) == pytest.approx(expected, rel=1e-5)


@PROPERTY
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_does_not_depend_on_how_rows_are_batched(parts: list[int]) -> None:
    model = TableModel(torch.randn(40, 40, generator=torch.Generator().manual_seed(1)))
    ids = tokens(sum(parts), 6, 40)
    whole = perplexity(model, [{"input_ids": ids}])
    assert perplexity(model, ({"input_ids": part} for part in ids.split(parts))) == pytest.approx(whole, rel=1e-5)


def test_puts_each_module_back_in_its_mode() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    first, second = (perplexity(model, [{"input_ids": tokens()}]) for _ in range(2))
    assert first == second, "dropout was on"
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="batch 0"):
        perplexity(model, [{"labels": tokens()}])
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_encoder_decoder_predicts_labels_in_place() -> None:
    model, ids, labels = t5(), tokens(2, 7, 60), tokens(2, 5, 60, seed=1)
    labels[0, 3:] = IGNORED
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0  # the source may be padded, and is not what is predicted
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        loss = model(**batch).loss
    assert not predicts_next_token(model)
    assert perplexity(model, [batch]) == pytest.approx(math.exp(loss), rel=1e-5)
    with pytest.raises(ValueError, match="batch 0 has no `labels`"):
        perplexity(model, [{"input_ids": ids}])


def test_a_masked_language_model_predicts_labels_in_place() -> None:
    model, ids = masked_bert(), tokens(2, 7, 60)
    labels = torch.where(torch.arange(7) % 3 == 0, ids, IGNORED)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss
    assert perplexity(model, [{"input_ids": ids, "labels": labels}]) == pytest.approx(math.exp(loss), rel=1e-5)
    with pytest.raises(ValueError, match="batch 0 has no `labels`, which a model that does not predict its own input needs"):
        perplexity(model, [{"input_ids": ids}])


def exhausted() -> Iterator[dict[str, Tensor]]:
    batches = iter([{"input_ids": tokens()}])
    next(batches)
    return batches


@pytest.mark.parametrize(
    "batches",
    [
        [],
        exhausted(),
        [{"input_ids": tokens(length=1)}],
        [{"input_ids": tokens(), "attention_mask": torch.zeros(3, 9, dtype=torch.long)}],
        [{"input_ids": tokens(), "labels": torch.full((3, 9), IGNORED)}],
    ],
    ids=["empty", "exhausted", "one token", "all padding", "all ignored"],
)
def test_refuses_batches_without_a_token_to_predict(batches: object) -> None:
    with pytest.raises(ValueError, match="`batches` must hold at least one token to predict, got none"):
        perplexity(llama(), batches)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (tokens(), "got Tensor as batch 1"),
        (["a", "b"], "got list as batch 1"),
        ({"labels": tokens()}, r"got \['labels'\] as batch 1"),
        ("text", "got str as batch 1"),
    ],
)
def test_refuses_what_is_no_batch(batch: object, got: str) -> None:
    with pytest.raises(ValueError, match=f"`batches` must hold dicts with `input_ids`, {got}"):
        perplexity(llama(), [{"input_ids": tokens()}, batch])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_fail_loudly(value: float) -> None:
    logits = torch.zeros(10, 10)
    logits[5, 6] = value
    ids = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
    with pytest.raises(FloatingPointError, match=r"the loss of batch 1 is (nan|inf); the model's logits are not finite"):
        perplexity(TableModel(logits), [{"input_ids": row} for row in ids])


def test_a_perplexity_beyond_float64_fails_loudly() -> None:
    logits = torch.zeros(4, 4)
    logits[:, 0] = 1e4
    with pytest.raises(FloatingPointError, match=r"the mean loss of 1e\+04 nats/token overflows"):
        perplexity(TableModel(logits), [{"input_ids": torch.tensor([[1, 2, 3]])}])


def test_embeddings_can_stand_in_for_tokens() -> None:
    model, ids = llama(), tokens()
    batch = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "labels": ids}
    assert perplexity(model, [batch]) == pytest.approx(perplexity(model, [{"input_ids": ids}]), rel=1e-5)
    with pytest.raises(ValueError, match="batch 0 has no `labels`"):
        perplexity(model, [{"inputs_embeds": batch["inputs_embeds"]}])
