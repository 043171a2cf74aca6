"""`nn.MultiheadAttention` as a target: taken as a module, computed by factors, given back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.models import Attending, attending, siglip
from support.tolerances import assert_close, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel

from reparam_peft import ReparamConfig, calibrate, compress, plan
from reparam_peft.layers.attention import open_attentions_of
from reparam_peft.standalone.self_contained import save_self_contained

MASK = torch.tensor([[1] * 10, [1] * 7 + [0] * 3, [1] * 10])
PIXELS = [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def tokens(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": MASK}


BATCHES = [tokens(seed) for seed in range(1, 5)]


def output(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(**tokens())
    return made


def pooled(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(pixel_values=PIXELS[0]).pooler_output
    return made


@pytest.mark.parametrize(
    ("options", "projections", "others"),
    [
        ({"target_modules": "all-linear"}, 9, 10),
        ({"target_modules": "all-linear", "exclude_modules": [r"cross", "out_proj"]}, 6, 7),
        ({"target_modules": ["self_attn", "linear1"]}, 6, 4),
        ({"target_modules": ["self_attn"], "layers_to_transform": 0}, 3, 1),
        ({"target_modules": r".*\.1\.self_attn|cross"}, 6, 2),
        ({"target_modules": ["out_proj"]}, 0, 3),
        ({"target_modules": [], "target_parameters": ["in_proj_weight", "v_proj_weight"]}, 7, 0),
        ({"target_modules": [], "target_parameters": ["cross.out_proj.weight"]}, 0, 1),
        ({"target_modules": ["linear2"], "target_parameters": {"in_proj_weight": "(q) <- (d)"}}, 2, 2),
    ],
)
def test_attentions_are_named_as_modules_or_by_their_parameters(
    options: dict[str, Any], projections: int, others: int, tmp_path: Path
) -> None:
    model = attending()
    expected, before = output(model), set(dict(model.named_parameters()))
    small = get_peft_model(model, ReparamConfig(r="full", keep_base=True, **options)).eval()
    ranks = small.peft_config["default"].rank_pattern
    assert sum("proj_weight." in name for name in ranks) == projections
    assert sum("proj_weight." not in name for name in ranks) == others
    assert_close(output(small), expected)
    small.save_pretrained(tmp_path)
    assert_close(output(PeftModel.from_pretrained(attending(), tmp_path).eval()), expected)
    plain = small.unload()
    assert not open_attentions_of(plain)
    assert set(dict(plain.named_parameters())) == before
    assert_close(output(plain), output(attending()))


def test_attentions_are_compressed_saved_loaded_merged_and_disabled(tmp_path: Path) -> None:
    model = attending()
    dense, before = output(model), dict(model.named_parameters())
    config = ReparamConfig(target_modules=["self_attn", "cross"], keep=0.6, keep_base=True)
    statistics = calibrate(model, config, BATCHES[:2], progress=False)
    chosen = plan(model, config, statistics, progress=False)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert not open_attentions_of(model)
    small = compress(model, config, statistics, plan=chosen, progress=False).eval()
    assert small.size_report().keep <= 0.6
    expected = output(small)
    assert relative_error(expected, dense) < 0.7 * relative_error(output(get_peft_model(attending(), config).eval()), dense)
    small.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = output(PeftModel.from_pretrained(attending(), tmp_path, **options).eval())
        torch.testing.assert_close(again, expected, msg=str(options))  # products of tensors out of files are rounded otherwise
    small.merge_adapter()
    assert_close(output(small), expected)
    small.unmerge_adapter()
    assert torch.equal(output(small), expected)
    with small.disable_adapter():
        assert_close(output(small), dense)
    merged = small.merge_and_unload()
    assert {name: p.shape for name, p in merged.named_parameters()} == {name: p.shape for name, p in before.items()}
    assert_close(output(merged), expected)


def test_block_by_block_they_follow_what_is_compressed_before_them() -> None:
    config = ReparamConfig(target_modules=["self_attn"], keep=0.6)
    dense = output(attending())
    free = relative_error(output(get_peft_model(attending(), config).eval()), dense)
    small = compress(attending(), config, BATCHES[:2], sequential=True, progress=False).eval()
    assert relative_error(output(small), dense) < 0.7 * free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_factors_are_trained(dtype: torch.dtype) -> None:
    config = ReparamConfig(target_modules="all-linear", keep=0.6)
    small = get_peft_model(attending().to(dtype), config).train()
    trained = {name: p for name, p in small.named_parameters() if p.requires_grad}
    assert sum("proj_weight." in name for name in trained) == 18
    small(**tokens()).float().square().mean().backward()
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    assert gradients.keys() == trained.keys()
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if "head" not in name)
    small.zero_grad()
    host: Attending = small.get_base_model()
    for layer in host.encoder.layers:
        layer.forward = lambda *args, layer=layer, **kwargs: checkpoint(  # type: ignore[method-assign]
            nn.TransformerEncoderLayer.forward, layer, *args, use_reentrant=False, **kwargs
        )
    small(**tokens()).float().square().mean().backward()
    for name, gradient in gradients.items():
        assert_close(trained[name].grad, gradient)


def test_nested_tensors_are_refused_by_name() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x, padding = torch.randn(2, 4, 16), torch.tensor([[False] * 4, [False, False, True, True]])
    for target in ("self_attn", "linear1"):
        encoder = nn.TransformerEncoder(layer, 2).eval()
        config = ReparamConfig(target_modules=[f"layers.1.{target}"], r=2)
        small = get_peft_model(encoder, config).eval()
        assert small(src=x).isfinite().all()
        with torch.no_grad(), pytest.raises(ValueError, match="enable_nested_tensor=False"):
            small(src=x, src_key_padding_mask=padding)


def test_attentions_of_transformers_become_standalone(tmp_path: Path) -> None:
    config = ReparamConfig(target_modules=None, keep=0.6, allocation="uniform", output_metric="none")
    batches = [{"pixel_values": pixels} for pixels in PIXELS[1:]]
    dense = pooled(siglip())
    small = compress(siglip(), config, batches, progress=False).eval()
    expected = pooled(small)
    assert sum("in_proj_weight." in name for name in small.peft_config["default"].rank_pattern) == 3
    free = pooled(get_peft_model(siglip(), ReparamConfig(target_modules="all-linear", keep=0.6)).eval())
    assert relative_error(expected, dense) < relative_error(free, dense)
    plain = small.base_model.to_standalone()
    assert torch.equal(pooled(plain), expected)
    plain.save_pretrained(tmp_path / "standalone")
    assert torch.equal(pooled(AutoModel.from_pretrained(tmp_path / "standalone").eval()), expected)
    assert pooled(AutoModel.from_config(plain.config).eval()).isfinite().all()
    with pytest.raises(ValueError, match="knows factorised layers only"):
        save_self_contained(plain, tmp_path / "alone")
    siglip().save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match=r"head.attention.out_proj: an nn.MultiheadAttention .* still being loaded"):
        loaded = AutoModel.from_pretrained(
            tmp_path / "dense", quantization_config=ReparamConfig(target_modules="all-linear", keep=0.6)
        )
    assert not any("attention" in name for name in loaded.config.quantization_config.layers if "head" in name)
