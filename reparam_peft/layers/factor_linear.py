"""The linear layers that products consist of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The operator that PyTorch's compiler emits for linear layers on a CPU; None in builds without oneDNN.
SINGLE_ROW_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
SINGLE_ROW_LEAST = 2**20  # parameters below which waking the other threads costs more than they save


class FactorLinear(nn.Linear):
    """An `nn.Linear` that starts sooner, and multiplies single rows by oneDNN where PyTorch's own product is slow.

    For one row, as in decoding, PyTorch calls a matrix–vector product that runs on one core. Where it may use several it is
    replaced, in float32 on a CPU, outside of autograd, autocast and tracing; results agree to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        parameters = self._parameters  # by attribute, looking up the weight would take half as long as a small product
        weight = parameters.get("weight")
        if weight is None:  # it is parametrised, or a replica
            return super().forward(x)
        bias = parameters.get("bias")
        if SINGLE_ROW_PRODUCT is None or torch.compiler.is_compiling():
            return F.linear(x, weight, bias)
        if torch.get_num_threads() > 1 and _is_slow(x, weight):
            return SINGLE_ROW_PRODUCT(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)


def _is_slow(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's own product of a single row is slow, and nothing around the call needs to see it."""
    return (
        weight.numel() >= SINGLE_ROW_LEAST
        and x.numel() == weight.shape[1]
        and type(x) is Tensor
        and type(weight) is nn.Parameter
        and x.device.type == "cpu"
        and x.dim() > 0
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )
