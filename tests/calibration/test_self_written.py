"""Text that a model writes itself: what is drawn, what ends, what is left alone, what is kept, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import bert, byte_tokenizer, gpt2, llama, t5
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from reparam_peft import self_written
from reparam_peft.calibration import self_written as module
from reparam_peft.calibration.self_written import SelfWritten, batches_or_self_written
from reparam_peft.runtime.run_folder import SETTINGS, TEXT

TOKENIZER = byte_tokenizer()


def text_of(model: nn.Module, windows: int = 5, length: int = 12, seed: int = 0, **options: Any) -> Tensor:
    batches = self_written(model, options.pop("tokenizer", TOKENIZER), windows, length, seed, progress=False, **options)
    return torch.cat([batch["input_ids"] for batch in batches])


def with_fixed_logits(logits: Tensor) -> nn.Module:
    """A GPT-2 that predicts the same at each place."""
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wte.weight[:, 0] = logits
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = 1
    return model


# What is written


def test_batches_are_those_of_whole_windows_and_the_split_changes_nothing() -> None:
    model = llama()
    batches = self_written(model, TOKENIZER, 5, 12, progress=False)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 12), (1, 12)]
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask"}
        assert torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"]))
    whole = torch.cat([batch["input_ids"] for batch in batches])
    assert (whole[:, 0] == TOKENIZER.bos_token_id).all()
    assert len(whole.unique(dim=0)) == 5
    assert torch.equal(text_of(model, at_once=2, batch_size=1), whole)
    assert torch.equal(text_of(model, windows=2, length=7), whole[:2, :7]), "less of it is the same text"
    assert not torch.equal(text_of(model, seed=1), whole)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_drawn_from_what_the_model_predicts(temperature: float) -> None:
    logits = torch.linspace(-2, 2, 100)
    drawn = text_of(with_fixed_logits(logits), 40, 64, temperature=temperature)[:, 1:]
    after_end = torch.zeros_like(drawn, dtype=torch.bool)
    after_end[:, 1:] = drawn[:, :-1] == TOKENIZER.eos_token_id
    frequencies = drawn[~after_end].bincount(minlength=100) / (~after_end).sum()
    distance = (frequencies - (logits / temperature).softmax(0)).abs().sum() / 2
    assert distance < 0.1, "of as many draws from the right distribution it is 0.06"


def test_near_zero_the_text_is_the_most_probable_one() -> None:
    model = llama()
    start = torch.full((1, 1), TOKENIZER.bos_token_id)
    greedy = model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_length=9)
    written = text_of(model, 1, 9, temperature=1e-6)
    assert torch.equal(written[:, : greedy.shape[1]], greedy)


def test_what_ends_early_goes_on_with_another_text() -> None:
    begin, end = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    often = torch.zeros(100)
    often[end] = 4
    written = text_of(with_fixed_logits(often), length=40)
    ended = written[:, :-1] == end
    assert ended.sum() > 20
    assert (written[:, 1:][ended] == begin).all()
    assert (written != begin).sum() > 60


def test_a_model_without_a_begin_token_begins_with_the_token_that_ends_texts() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="</s>")
    model = gpt2()
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    assert (text_of(model, tokenizer=tokenizer)[:, 0] == 2).all()


# What is left alone


def test_the_model_and_the_generators_are_left_as_they_were() -> None:
    model = llama()
    expected = text_of(model)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 3
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()
    model.compile()
    model.gradient_checkpointing_enable()
    before = (copy.deepcopy(model.generation_config), model.config.to_dict(), [part.training for part in model.modules()])
    state = torch.get_rng_state()
    assert torch.equal(text_of(model), expected), "neither mode nor settings of generation change what is drawn"
    after = (model.generation_config, model.config.to_dict(), [part.training for part in model.modules()])
    assert after[0].to_dict() == before[0].to_dict()
    assert after[1:] == before[1:]
    assert model._compiled_call_impl is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_is_wrapped_writes_what_it_predicts() -> None:
    model = llama()
    expected = text_of(model)
    assert torch.equal(text_of(torch.compile(model)), expected)
    assert torch.equal(text_of(get_peft_model(model, LoraConfig())), expected)


# What is refused


def without_tokens() -> nn.Module:
    return llama(bos_token_id=None, eos_token_id=None)


def broken() -> nn.Module:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "a classifier": (bert, {}, "a BertForSequenceClassification cannot write text itself: that takes a decoder with a"),
    "an encoder before a decoder": (t5, {}, "a T5ForConditionalGeneration cannot write text itself"),
    "no model of transformers": (lambda: nn.Linear(2, 2), {}, "a Linear cannot write text itself"),
    "no token to begin with": (without_tokens, {"tokenizer": None}, r"Set `tokenizer.bos_token`, or give text to calibrate on"),
    "too long": (llama, {"length": 129}, "`length` must be at most 128, the positions that the model has, got 129"),
    "too short": (llama, {"length": 1}, "`length` must be a whole number of at least 2, got 1"),
    "no window": (llama, {"windows": 0}, "`windows` must be a whole number of at least 1, got 0"),
    "a seed below zero": (llama, {"seed": -1}, "`seed` must be a whole number in"),
    "a temperature of zero": (llama, {"temperature": 0}, r"`temperature` must be in \(0, 100\], got 0"),
    "NaN": (broken, {}, "the model predicts NaN or infinite logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused(case: str) -> None:
    make, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        text_of(make(), **options)


def test_the_word_needs_a_tokenizer_and_no_other_word_will_do() -> None:
    def given(batches: Any, tokenizer: Any) -> Any:
        return batches_or_self_written(batches, llama(), tokenizer, seed=0, progress=False)

    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]
    assert given(batches, None) is batches
    with pytest.raises(ValueError, match="`batches='self'` needs the `tokenizer` of the model"):
        given("self", None)
    with pytest.raises(ValueError, match="must be batches, `Statistics` or 'self', got 'text"):
        given("text.txt", TOKENIZER)
    with pytest.raises(ValueError, match="`tokenizer` has an effect with text and rows, and `batches` are batches"):
        given(batches, TOKENIZER)
    with pytest.raises(ValueError, match="`tokenizer` has an effect with text, rows or 'self', and `batches` is nothing"):
        given(None, TOKENIZER)
    assert given("self", TOKENIZER).length == 128, "the positions that the model has"


# What is kept


@contextmanager
def nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("text is written again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "self_written", refuse)
        yield


def kept_in(folder: Path, seed: int = 0) -> list[dict[str, Tensor]]:
    return SelfWritten(llama(), TOKENIZER, 3, 8, seed, False, folder).batches()


def test_text_is_kept_in_the_folder_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    first = kept_in(folder)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in first]), text_of(llama(), 3, 8))
    with nothing_is_written(monkeypatch):
        again = kept_in(folder)
        assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(first, again, strict=True))
        with pytest.raises(ValueError, match="holds text that another model wrote, or with another seed or size"):
            kept_in(folder, seed=1)
    content = (folder / TEXT).read_bytes()
    for damaged in (content[:-3], content[:-8] + b"\1" * 8):
        (folder / TEXT).write_bytes(damaged)
        kept_in(folder)
        assert (folder / TEXT).read_bytes() == content, "what is not as it was written is written again"


def test_text_is_not_written_into_a_folder_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with nothing_is_written(monkeypatch), pytest.raises(ValueError, match="holds other files and no run"):
        kept_in(tmp_path)
    (tmp_path / SETTINGS).write_text("{}")
    kept_in(tmp_path)
