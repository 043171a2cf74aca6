"""One adapter, many sizes: `from_pretrained(…, keep=…)` takes the first columns of A and rows of B."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import gpt2, llama, relative_error
from peft import PeftModel
from torch import nn

from reparam_peft import ReparamConfig, compress, retruncate
from reparam_peft.layer import ReparamLayer

LESS = [{"input_ids": torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(i))} for i in range(3)]


def nested(make: Callable[[], nn.Module] = llama, **options: object) -> PeftModel:
    given = {"target_modules": "all-linear", "keep": 0.8, "form": "factors", "rank_multiple": 4, **options}
    return compress(make(), ReparamConfig(**given), LESS, progress=False)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "other"}])
def test_an_adapter_loads_at_smaller_sizes(tmp_path: Path, options: dict[str, object]) -> None:
    large = nested()
    config = large.peft_config["default"]
    assert config.smaller_keeps[:3] == [0.75, 0.7, 0.65]
    large.save_pretrained(tmp_path)
    small = PeftModel.from_pretrained(llama(), tmp_path, keep=0.62, **options)
    own = small.peft_config[options.get("adapter_name", "default")]
    assert own.keep == 0.6
    assert 0.5 < small.size_report().keep <= 0.6
    for name, layer in small.get_base_model().named_modules():
        if isinstance(layer, ReparamLayer):
            got = layer.reparam_factors[options.get("adapter_name", "default")].factors
            whole = large.get_base_model().get_submodule(name).reparam_factors["default"].factors
            rank = own.rank_pattern[name]
            assert torch.equal(got.A, whole.A[:, :rank])
            assert torch.equal(got.B, whole.B[:rank])
            assert got.A.untyped_storage().nbytes() == got.A.nbytes


def test_it_is_nearly_as_good_as_what_compress_makes_at_that_size(tmp_path: Path) -> None:
    nested(ceiling=0.99).save_pretrained(tmp_path)
    small, made = PeftModel.from_pretrained(llama(), tmp_path, keep=0.5), nested(ceiling=0.99, keep=0.5)
    ranks, best = (model.peft_config["default"].rank_pattern for model in (small, made))
    assert sum(abs(ranks[name] - best[name]) for name in best) < 0.1 * sum(best.values())
    with torch.no_grad():
        dense = llama()(**LESS[0]).logits
        lost, least = (relative_error(model(**LESS[0]).logits, dense) for model in (small, made))
    assert lost < 1.05 * least


def test_a_smaller_one_is_saved_and_made_smaller_again(tmp_path: Path) -> None:
    nested(ceiling=0.99).save_pretrained(tmp_path / "large")
    small = PeftModel.from_pretrained(llama(), tmp_path / "large", keep=0.6)
    small.save_pretrained(tmp_path / "small")
    again = PeftModel.from_pretrained(llama(), tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(**LESS[0]).logits, small.eval()(**LESS[0]).logits)
    least = again.peft_config["default"].smaller_keeps[-1]
    twice = PeftModel.from_pretrained(llama(), tmp_path / "small", keep=least)
    assert twice.size_report().keep <= least
    direct = PeftModel.from_pretrained(llama(), tmp_path / "large", keep=least)
    assert direct.peft_config["default"].rank_pattern == twice.peft_config["default"].rank_pattern
    retruncate(again, 0.4, progress=False)
    assert again.peft_config["default"].smaller_keeps is None


def test_sizes_that_cannot_be_loaded(tmp_path: Path) -> None:
    nested().save_pretrained(tmp_path / "nested")
    for keep in (0.81, 0, -1, True, "0.5"):
        with pytest.raises(ValueError, match="`keep` must be a number"):
            PeftModel.from_pretrained(llama(), tmp_path / "nested", keep=keep)
    with pytest.raises(ValueError, match="`keep` must be at least"):
        PeftModel.from_pretrained(llama(), tmp_path / "nested", keep=0.001)
    whole = PeftModel.from_pretrained(llama(), tmp_path / "nested", keep=0.8)
    assert whole.size_report().keep > 0.75


@pytest.mark.parametrize(
    ("make", "options"),
    [(llama, {"form": "pivot"}), (llama, {"method": "autoencoder"}), (gpt2, {}), (llama, {"allocation": "uniform"})],
)
def test_products_without_an_order_say_so(tmp_path: Path, make: Callable[[], nn.Module], options: dict[str, object]) -> None:
    given = {"rank_multiple": None} if "allocation" in options else {}
    model = nested(make, **options, **given)
    assert model.peft_config["default"].smaller_keeps is None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not know its ranks at smaller sizes"):
        PeftModel.from_pretrained(make(), tmp_path, keep=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smaller_keeps": [0.9]}, "fractions below `keep`"),
        ({"smaller_keeps": [0.5, 0.6]}, "from large to small"),
        ({"smaller_keeps": None}, "fractions below `keep`"),
        ({"smaller_ranks": {}}, "dict of the modules"),
        ({"smaller_keeps": [0.5]}, "must hold 1 ints"),
    ],
)
def test_damaged_orders_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    nested().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((TypeError, ValueError), match=message):
        PeftModel.from_pretrained(llama(), tmp_path, keep=0.5)


def test_ranks_at_a_smaller_size_above_those_in_the_file_are_refused(tmp_path: Path) -> None:
    nested().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    name = next(iter(fields["smaller_ranks"]))
    fields["smaller_ranks"][name][0] = fields["rank_pattern"][name] + 1
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="`smaller_ranks` must fall from at most"):
        PeftModel.from_pretrained(llama(), tmp_path, keep=0.75)
