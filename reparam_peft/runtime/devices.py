"""What a device computes fast."""

from __future__ import annotations

import torch


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 numbers at least as fast as float32 ones.

    A processor without the instructions emulates them: then a product takes some twenty times as long.
    """
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
