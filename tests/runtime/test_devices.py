from __future__ import annotations

import pytest
import torch

from reparam_peft.runtime.devices import computes_bfloat16


@pytest.mark.parametrize("supported", [True, False])
def test_a_processor_is_asked_for_its_instructions(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert computes_bfloat16(torch.device("cpu")) == (supported and torch.backends.mkldnn.is_available())


def test_other_devices_than_cuda_and_cpu_are_trusted() -> None:
    assert computes_bfloat16(torch.device("mps"))
