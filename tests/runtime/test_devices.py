"""What devices compute fast, and what is done where one does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reparam_peft.layers.schemes import SCHEMES
from reparam_peft.runtime.devices import computes_bfloat16, fast_products


@pytest.mark.parametrize("supported", [True, False])
def test_a_processor_is_asked_for_its_instructions(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert computes_bfloat16(torch.device("cpu")) == (supported and torch.backends.mkldnn.is_available())


def test_other_devices_than_cuda_and_cpu_are_trusted() -> None:
    assert computes_bfloat16(torch.device("mps"))


@pytest.mark.parametrize("supported", [True, False])
def test_products_that_are_emulated_are_computed_in_float32(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    x, W, b = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((4, 64), (8, 64), (8,)))
    seen = []
    half = x.bfloat16().requires_grad_()
    half.register_hook(lambda gradient: seen.append(gradient.dtype))
    with fast_products():
        outputs = [F.linear(half, W.bfloat16(), bias=b.bfloat16()), half @ W.bfloat16().mT + b.bfloat16()]
        assert (x @ W.mT).dtype == torch.float32
    expected = F.linear(half.float(), W.bfloat16().float(), b.bfloat16().float())
    for output in outputs:
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)
        output.sum().backward()
    assert seen == [torch.bfloat16] * 2
    if not supported:
        assert torch.equal(outputs[0], expected.bfloat16()), "rounded once"


def test_quantised_weights_multiply_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    plain = nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    eight = SCHEMES["int8"].linear(plain, SCHEMES["int8"].quantize(plain.weight), torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    x = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    expected = eight(x)
    with fast_products():
        y = eight(x)
        gradients = [torch.autograd.grad(output.sum(), x)[0] for output in (y, expected)]
    assert torch.equal(y, expected)
    assert torch.equal(*gradients)


def test_products_that_are_written_into_a_tensor_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    one, out = torch.ones(2, 2, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.bfloat16)
    with fast_products():
        torch.mm(one, one, out=out)
    assert out.eq(2).all()
