"""Perplexity against values known by hand or from transformers; windows of text; size arithmetic; the benchmark's contract."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from conftest import bert, byte_tokenizer, convnet, gpt2, llama
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from strategies import PROPERTY
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

from reparam_peft import Benchmark, MatrixSize, ReparamConfig, SizeReport, benchmark, perplexity, text_batches
from reparam_peft.evaluation import perplexity as evaluation
from reparam_peft.evaluation import speed
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


def test_which_models_predict_the_next_token() -> None:
    wrapped = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", r=4))
    assert all(predicts_next_token(model) for model in (llama(), gpt2(), wrapped))
    assert not any(predicts_next_token(model) for model in (t5(), masked_bert(), bert(), convnet()))


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


def report() -> SizeReport:
    matrices = [MatrixSize("a", (10, 20), 2, 60, 4), MatrixSize("b", (5, 4), None, 20, 2), MatrixSize("c", (8, 8), 1, 16, 4)]
    return SizeReport(matrices, other_parameters=1000, other_bytes=3000)


def test_size_of_one_matrix() -> None:
    factorised, dense, _ = report().matrices
    assert (factorised.dense_parameters, factorised.dense_bytes, factorised.stored_bytes) == (200, 800, 240)
    assert (dense.dense_parameters, dense.dense_bytes, dense.stored_bytes) == (20, 40, 40)


def test_size_report_adds_up() -> None:
    targets = {"dense_parameters": 284, "stored_parameters": 96, "dense_bytes": 1096, "stored_bytes": 344}
    model = {"dense_parameters": 1284, "stored_parameters": 1096, "dense_bytes": 4096, "stored_bytes": 3344}
    assert report().to_dict() == {"targets": targets, "model": model}
    assert report().keep == 96 / 284
    assert report().dense_modules == ["b"]


def test_size_report_of_a_model_counts_what_is_stored() -> None:
    model = llama().bfloat16()
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in model.parameters())
    peft_model = get_peft_model(model, ReparamConfig(target_modules="all-linear", r=4))
    sizes = peft_model.size_report().to_dict()
    stored = sum(p.numel() for name, p in peft_model.named_parameters() if "reparam_factors" in name)
    assert sizes["targets"] == {
        "dense_parameters": linear,
        "stored_parameters": stored,
        "dense_bytes": 2 * linear,
        "stored_bytes": 2 * stored,
    }
    assert sizes["model"]["dense_parameters"] == total
    assert sizes["model"]["dense_bytes"] == 2 * total
    assert sizes["model"]["stored_parameters"] == sum(p.numel() for p in peft_model.parameters())


def test_size_report_prints_before_after_and_what_stays_dense() -> None:
    lines = [" ".join(line.split()) for line in str(report()).splitlines()]
    assert lines == [
        "before after kept",
        "targets parameters 284 96 33.8%",
        "targets bytes 1,096 344 31.4%",
        "model parameters 1,284 1,096 85.4%",
        "model bytes 4,096 3,344 81.6%",
        "2 matrices factorised, 1 left dense",
        "dense: b",
    ]


def test_size_report_without_targets() -> None:
    empty = SizeReport([], other_parameters=0, other_bytes=0)
    assert empty.keep == 1.0
    assert "0 matrices factorised, 0 left dense" in str(empty)


SMALL = {"prompt_length": 8, "new_tokens": 2, "repeats": 1}


def test_benchmark_of_a_decoder_beside_its_baseline() -> None:
    model = get_peft_model(llama(), ReparamConfig(target_modules="all-linear", r=4)).train()
    result = benchmark(model, llama(), **SMALL, batch_size=2)
    assert model.training
    for own in (result, result.baseline):
        assert 0 < own.prefill_ms < math.inf
        assert 0 < own.decode_ms < math.inf
        assert own.peak_bytes >= 0
    assert result.prefill_speedup == result.baseline.prefill_ms / result.prefill_ms
    assert result.decode_speedup == result.baseline.decode_ms / result.decode_ms
    assert (result.baseline.prefill_speedup, result.baseline.decode_speedup, result.baseline.baseline) == (None, None, None)
    nested = json.loads(json.dumps(result.to_dict()))
    assert nested["baseline"]["prefill_ms"] == result.baseline.prefill_ms


def test_benchmark_alone_has_no_ratios() -> None:
    result = benchmark(llama(), **SMALL)
    assert isinstance(result, Benchmark)
    assert result.decode_ms > 0
    assert (result.prefill_speedup, result.decode_speedup, result.baseline) == (None, None, None)


def test_benchmark_of_an_encoder_does_not_decode() -> None:
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=60)
    for model in (BertModel(config), bert()):
        result = benchmark(model, model, **SMALL)
        assert result.prefill_ms > 0
        assert result.prefill_speedup > 0
        assert (result.decode_ms, result.decode_speedup, result.baseline.decode_ms) == (None, None, None)


def test_benchmark_times_each_model_repeatedly_and_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    milliseconds = itertools.count(1)

    def once(model: nn.Module, *sizes: int) -> speed.Timing:
        calls.append((model, sizes, model.training))
        time = float(next(milliseconds))
        return speed.Timing(time, 10 * time, int(time))

    monkeypatch.setattr(speed, "_time_once", once)
    model, baseline = nn.Linear(1, 1), nn.Linear(1, 1)
    model.config = baseline.config = SimpleNamespace(is_encoder_decoder=False)
    result = benchmark(model, baseline, prompt_length=7, new_tokens=3, batch_size=2, repeats=3)
    assert [call[0] for call in calls] == [model, baseline] * 4, "one run warms up"
    assert {call[1:] for call in calls} == {((7, 3, 2), False)}
    # The model's timed runs are 3, 5, 7, the baseline's 4, 6, 8.
    assert (result.prefill_ms, result.decode_ms, result.peak_bytes) == (5.0, 50.0, 7)
    assert (result.baseline.prefill_ms, result.baseline.decode_ms, result.baseline.peak_bytes) == (6.0, 60.0, 8)
    assert (result.prefill_speedup, result.decode_speedup) == (1.2, 1.2)


def test_benchmark_refuses_models_that_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="got a Linear without a config"):
        benchmark(nn.Linear(1, 1))
    both = nn.Linear(1, 1)
    both.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(ValueError, match="which is both"):
        benchmark(both)


@pytest.mark.parametrize("name", ["prompt_length", "new_tokens", "batch_size", "repeats"])
def test_benchmark_refuses_sizes_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        benchmark(llama(), **{name: 0})


def test_caches_are_flushed_before_each_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = llama(), []
    flush = speed.flush_caches

    def recorded(device: torch.device) -> None:
        events.append("flush")
        flush(device)

    monkeypatch.setattr(speed, "flush_caches", recorded)
    model.register_forward_pre_hook(lambda *_: events.append("call"))
    benchmark(model, **{**SMALL, "new_tokens": 3})
    calls = [index for index, event in enumerate(events) if event == "call"]
    assert len(calls) == 2 * (1 + 3), "a run that warms up and one that counts"
    assert all(events[index - 1] == "flush" for index in calls)
