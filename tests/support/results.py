"""A plan and the result of a search, for those that draw and print them."""

from __future__ import annotations

import torch

from reparam_peft import Plan, ReparamConfig, SearchResult, Trial, plan
from support.models import llama

BATCHES = [{"input_ids": torch.arange(3, 51).reshape(2, 24)}]


def plan_of_a_llama() -> Plan:
    dense = ["model.layers.1.mlp.up_proj"]
    return plan(llama(), ReparamConfig(target_modules="all-linear", keep=0.6, dense_modules=dense), BATCHES, progress=False)


def result_of_a_search() -> SearchResult:
    trials = tuple(Trial("whitened", keep, int(1000 * keep), 20 / keep, keep > 0.6, None, 1.0) for keep in (0.5, 0.7, 0.9))
    return SearchResult(trials, trials[1], "perplexity", 20.0, 1000, 30.0, False)
