"""Grouped convolutions, whose rows make the outputs of one group each, and a model of all kinds of convolutions.

Rows and products of the other kinds are in test_kinds.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.standalone import IDS
from support.tolerances import assert_close
from torch import Tensor, nn
from transformers import (
    AutoModel,
    PreTrainedModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    SqueezeBertConfig,
    SqueezeBertModel,
)

from reparam_peft import ReparamConfig, compress
from reparam_peft.calibration.gather import gather_statistics
from reparam_peft.layers.convolutions import FactorizedGroupedConv
from reparam_peft.layers.kinds import layer_kind
from reparam_peft.numerics.decompositions import factorize, random_factors
from reparam_peft.standalone.self_contained import save_self_contained

LAYERS = [
    (nn.Conv1d(6, 8, 3, stride=2, padding=1, groups=2), (2, 6, 9)),
    (nn.Conv1d(6, 9, 1, groups=3, bias=False), (6, 5)),
    (nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect", groups=2), (2, 4, 5, 6)),
]


@pytest.fixture(params=LAYERS, ids=lambda case: str(case[0]))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    layer, shape = request.param
    return layer.double(), torch.randn(shape, dtype=torch.float64)


@torch.no_grad()
def test_rows_make_the_outputs_of_their_group(case: tuple[nn.Module, torch.Tensor]) -> None:
    layer, x = case
    kind = layer_kind(layer)
    W, X = kind.matrix(layer.weight), kind.rows(layer, x)
    assert W.shape == kind.shape(layer) == (len(W), X.shape[1])
    blocks = (X @ W.mT).view(-1, layer.groups, layer.groups, len(W) // layer.groups)
    rows = blocks.diagonal(dim1=1, dim2=2).mT.flatten(1)
    rows = rows if layer.bias is None else rows + layer.bias
    y = layer(x)
    n = len(layer.kernel_size)
    assert_close(rows, y.movedim(-1 - n, -1).reshape(-1, len(W)))


def test_gradient_rows_belong_to_rows(case: tuple[nn.Module, torch.Tensor]) -> None:
    layer, x = case
    kind = layer_kind(layer)
    y = layer(x)
    probe = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * probe).sum(), layer.weight)
    g, X = kind.gradient_rows(layer, probe), kind.rows(layer, x)
    assert g.shape == (len(X), layer.out_channels)
    assert_close(g.mT @ X, kind.matrix(gradient))


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_the_factorised_module_is_the_layer_of_the_product(case: tuple[nn.Module, torch.Tensor], form: str) -> None:
    layer, x = case
    kind = layer_kind(layer)
    W = kind.matrix(layer.weight.detach())
    for rank, factors in ((min(W.shape), factorize(W, min(W.shape))), (2, random_factors(W, 2))):
        module = kind.factorized(layer, rank, form, dtype=torch.float64)
        module.set_factors(factors)
        assert isinstance(module, FactorizedGroupedConv)
        weight = kind.weight(factors.A @ factors.B, layer.weight.shape)
        expected = torch.func.functional_call(layer, {"weight": weight}, x)
        assert_close(module(x, layer.bias).detach(), expected.detach())
        module(x).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


class Sequences(nn.Module):
    """Convolutions of every kind of one dimension, two of which read one tensor, each in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv1d(8, 12, 3, padding=1)
        self.narrow = nn.Conv1d(8, 12, 1)
        self.grouped = nn.Conv1d(12, 12, 3, groups=2)
        self.stretching = nn.ConvTranspose1d(12, 10, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.stretching(self.grouped((self.plain(x) + self.narrow(x)).relu()).relu())


def sequences() -> Sequences:
    torch.manual_seed(0)
    return Sequences().eval()


BATCHES = [{"x": torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(i))} for i in range(3)]
TARGETS = ["plain", "narrow", "grouped", "stretching"]


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_convolutions_are_compressed_saved_loaded_merged_and_trained(form: str, tmp_path: Path) -> None:
    config = ReparamConfig(target_modules=TARGETS, keep=0.7, form=form, allocation="uniform")
    model = compress(sequences(), config, BATCHES, progress=False).eval()
    x = BATCHES[0]["x"]
    model(x).square().sum().backward()
    factors = [parameter for name, parameter in model.named_parameters() if ".reparam_factors." in name]
    assert factors
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in factors)
    with torch.no_grad():
        expected = model(x)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(sequences(), tmp_path)(x), expected)
        merged = model.merge_and_unload()
        assert {type(merged.get_submodule(name)) for name in TARGETS} == {nn.Conv1d, nn.ConvTranspose1d}
        torch.testing.assert_close(merged(x), expected)


def test_statistics_of_convolutions_are_those_of_their_rows() -> None:
    """Also where two read one tensor, and where it has as many channels as there are tokens."""
    model = sequences()
    batch = BATCHES[0] | {"attention_mask": torch.arange(64).view(8, 8) % 3}
    model.forward = lambda x, attention_mask: Sequences.forward(model, x)  # type: ignore[method-assign]
    modules = {name: model.get_submodule(name) for name in TARGETS}
    statistics = gather_statistics(model, modules, [batch], progress=False)
    assert statistics.reads == {name: name for name in TARGETS}
    rows = layer_kind(model.plain).rows(model.plain, batch["x"]).double()
    assert statistics.input_rows("plain") == len(rows)
    torch.testing.assert_close(statistics.gram("plain"), rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-5)


def test_only_a_bias_of_which_the_mean_is_known_is_moved() -> None:
    config = ReparamConfig(target_modules=TARGETS, keep=0.6, allocation="uniform")
    model = compress(sequences(), config, BATCHES, progress=False)
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in TARGETS}
    moved = {name for name, layer in layers.items() if layer.factorized("default").bias is not None}
    assert moved == {"plain", "narrow", "stretching"}


def squeezebert() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return SqueezeBertModel(SqueezeBertConfig(vocab_size=100, num_attention_heads=4, **sizes))


def vocoder() -> PreTrainedModel:
    sizes: dict[str, Any] = {"model_in_dim": 16, "upsample_initial_channel": 32, "upsample_rates": [2, 2]}
    kernels: dict[str, Any] = {
        "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
    }
    return SpeechT5HifiGan(SpeechT5HifiGanConfig(**sizes, **kernels, normalize_before=False))


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize(
    ("make", "targets", "inputs"),
    [(squeezebert, r".*(query|key|conv1d)", IDS), (vocoder, r".*(upsampler\.\d|conv_pre|convs1\.\d)", torch.randn(7, 16))],
    ids=["SqueezeBERT", "a vocoder"],
)
def test_standalone_checkpoints(make: Any, targets: str, inputs: Tensor, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = make().eval()
    config = ReparamConfig(target_modules=targets, keep=0.6, form=form)
    plain = get_peft_model(dense, config).eval().to_standalone()
    plain.save_pretrained(tmp_path / "plain")
    save_self_contained(plain, tmp_path / "self")

    def output(model: nn.Module) -> Tensor:
        with torch.no_grad():
            result = model(inputs)
        return result if isinstance(result, Tensor) else result.last_hidden_state

    assert torch.equal(output(type(plain).from_pretrained(tmp_path / "plain")), output(plain))
    if make is squeezebert:
        read = AutoModel.from_pretrained(tmp_path / "self", trust_remote_code=True)
        torch.testing.assert_close(output(read), output(plain))
