"""Experts with few rows are weighed by what the others of their layer saw, too."""

from __future__ import annotations

import pytest
import torch
from support.batches import text
from support.models import qwen_moe
from support.tolerances import assert_close

from reparam_peft import ReparamConfig, Statistics, calibrate, compress
from reparam_peft.compression.pooling import Pool, Pooled, is_expert
from reparam_peft.numerics.storage import Storage

BATCHES = [text([24, 20, 24, 17], 24, seed=seed) for seed in range(3)]

LAYER = "model.layers.1.mlp.experts.gate_up_proj"  # whose inputs have gradients
NAMES = [f"{LAYER}.{expert}" for expert in range(4)]


def statistics() -> Statistics:
    config = ReparamConfig(target_modules=[], target_parameters="all-experts")
    return calibrate(qwen_moe(), config, BATCHES, progress=False)


def pool(storages: dict[str, Storage] | None = None) -> Pool:
    config = ReparamConfig(target_parameters=[LAYER])
    return Pool(storages or {name: Storage(56, 32) for name in [*NAMES, "lm_head"]}, config)


def test_moments_are_those_of_all_rows_with_the_weight_of_a_few() -> None:
    known = statistics()
    pooled = pool().pooled(NAMES[1], known)
    assert isinstance(pooled, Pooled)
    rows = [known.input_rows(name) for name in NAMES]
    total = sum(known.gram(name) * count for name, count in zip(NAMES, rows, strict=True)) / sum(rows)
    expected = (rows[1] * known.gram(NAMES[1]) + 32 * total) / (rows[1] + 32)
    moments = pooled.moments(NAMES[1], centred=False)
    assert_close(moments.gram, expected)
    assert moments.rows == rows[1] + 32
    centred = pooled.moments(NAMES[1], centred=True)
    assert_close(centred.gram, expected - torch.outer(moments.mean, moments.mean))
    assert_close(pooled.mean(NAMES[1]), moments.mean)
    fisher = sum(known.fisher(name) * known.output_rows(name) for name in NAMES) / sum(map(known.output_rows, NAMES))
    own = known.output_rows(NAMES[1])
    assert_close(pooled.fisher(NAMES[1]), (own * known.fisher(NAMES[1]) + 56 * fisher) / (own + 56))
    assert pooled.loss_scale(NAMES[1]) == known.loss_scale(NAMES[1])


def test_an_expert_without_rows_has_those_of_the_others_and_little_weight() -> None:
    known = statistics()
    del known.reads[NAMES[2]], known.outputs[NAMES[2]]
    experts = pool()
    assert experts.unreached([*NAMES, "lm_head"], known) == [NAMES[2]]
    pooled = experts.pooled(NAMES[2], known)
    rest = [name for name in NAMES if name != NAMES[2]]
    rows = {name: known.input_rows(name) for name in rest}
    assert_close(pooled.moments(NAMES[2], centred=False).gram, sum(known.gram(n) * rows[n] for n in rest) / sum(rows.values()))
    assert pooled.weighted_gram(NAMES[2]) is not None
    assert 0 < pooled.loss_scale(NAMES[2]) < min(known.loss_scale(name) for name in rest)


def test_only_experts_of_one_size_share() -> None:
    known = statistics()
    assert pool().pooled("lm_head", known) is known
    sizes = {name: Storage(56 if name == NAMES[0] else 48, 32, whole=(56, 32)) for name in NAMES}
    alone = pool(sizes).pooled(NAMES[0], known)
    assert_close(alone.moments(NAMES[0], centred=False).gram, known.gram(NAMES[0]))


def test_unreached_experts_are_told_and_compressed() -> None:
    model = qwen_moe()
    router = model.model.layers[1].mlp.gate
    with torch.no_grad():
        router.weight[3] = 0.0
        router.weight[3, 0] = -1e3
    experts = model.model.layers[1].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: (args[0], args[1].clamp(max=2), args[2]))
    config = ReparamConfig(target_modules=[], target_parameters="all-experts", keep=0.5)
    with pytest.warns(UserWarning, match=rf"reached 2 experts.*{LAYER}\.3"):
        small = compress(model, config, BATCHES, progress=False)
    hook.remove()
    assert small.size_report().keep <= 0.5
    assert f"{LAYER}.3" in small.peft_config["default"].rank_pattern


def test_a_parameter_of_a_single_matrix_is_not_pooled_with_itself() -> None:
    config = ReparamConfig(target_parameters={"one.q": "(d) -> (n h)", "many.w": "e (d) -> (m)", "fused.up_proj": ""})
    assert [is_expert(f"{name}.0", config) for name in ("one.q", "many.w", "fused.up_proj", "other")] == [
        False,
        True,
        True,
        False,
    ]
