"""The benchmark's contract."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from support.models import bert, llama
from torch import nn
from transformers import BertConfig, BertModel

from reparam_peft import Benchmark, ReparamConfig, benchmark
from reparam_peft.evaluation import speed

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


def test_caches_are_flushed_in_either_mode() -> None:
    speed._flush_buffer.cache_clear()
    with torch.inference_mode():
        speed.flush_caches(torch.device("cpu"))
    speed.flush_caches(torch.device("cpu"))
