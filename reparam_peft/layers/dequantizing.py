"""Matrices in 4 bits, read rightly on every processor, and multiplied without being kept.

On CPUs with AVX-512 bitsandbytes (tried: 0.50.2) reads a matrix wrongly whose rows are of a multiple of 16 numbers, and not of
a multiple of the block that shares a scale. So on CPUs it is never asked for a matrix in its own shape.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

Dequantize: TypeAlias = Callable[[torch.dtype], Tensor]  # the matrix (out, in) in a dtype


def read(codes: Tensor, scales: Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A matrix of this shape, of codes in "nf4" or "fp4" with a float32 scale for each block."""
    rows = _rows(math.prod(shape), block)
    known = torch.float32 if dtype == torch.float64 else dtype  # float64 the library fills with arbitrary numbers
    matrix: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, block, kind, rows, known)
    return matrix.view(*shape).to(dtype)


def _rows(count: int, block: int) -> list[int]:
    """A shape of so many numbers that every processor reads rightly, of as many rows as it can have, which threads share."""
    return [count // block, block] if count % block == 0 else [1, count]


def dequantized_matrix(layer: nn.Module) -> Tensor:
    """The matrix of a layer of bitsandbytes, torchao or HQQ, as PEFT has it, with rows of any length."""
    state = quant_state(layer)
    if state is None:
        return dequantize_module_weight(layer).detach()
    in_rows = copy.copy(state)
    in_rows.shape = torch.Size(_rows(math.prod(state.shape), state.blocksize))
    codes = layer.get_parameter("weight").data.reshape(-1, 1)
    matrix: Tensor = importlib.import_module("bitsandbytes").functional.dequantize_4bit(codes, in_rows)
    return matrix.reshape(state.shape)


def is_misread(layer: nn.Module) -> bool:
    """Whether bitsandbytes may compute with other numbers than those of a layer."""
    state = quant_state(layer)
    if state is None or layer.get_parameter("weight").device.type != "cpu":
        return False
    features: int = state.shape[-1]
    return features % 16 == 0 and features % state.blocksize != 0


def quant_state(layer: Any) -> Any:
    """What bitsandbytes knows of numbers in 4 bits, or None; the layer has it, too, in case others replaced its weight."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def holds_codes(layer: nn.Module) -> bool:
    """Whether the weight of a layer of bitsandbytes is numbers in 4 bits, and not a matrix that others put in their place."""
    weight = layer._parameters.get("weight")
    state = None if weight is None else quant_state(layer)
    return weight is not None and state is not None and weight.shape != state.shape


def product(x: Tensor, dequantize: Dequantize) -> Tensor:
    """x (…, in) → x Wᵀ (…, out) in the dtype of x; W is dequantised for it, backwards again, and not kept in between."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return F.linear(x, dequantize(x.dtype))
    y: Tensor = _Product.apply(x, dequantize)
    return y


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dequantize: Dequantize) -> Tensor:
        return F.linear(x, dequantize(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Dequantize], output: Tensor) -> None:
        ctx.dequantize = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.dequantize(gradients[0].dtype), None


@cache
def int4_linear() -> type[nn.Linear]:
    """The class `Int4Linear`: bitsandbytes' linear layer, with products that are right on every CPU."""
    linear4bit: Any = importlib.import_module("bitsandbytes").nn.Linear4bit

    class Int4Linear(linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            if x.device.type != "cpu":
                y: Tensor = super().forward(x)
                return y
            state = quant_state(self)
            y = product(x, partial(read, self.weight, state.absmax, state.blocksize, state.quant_type, state.shape))
            return y if self.bias is None else y + self.bias.to(y.dtype)

    Int4Linear.__qualname__ = "Int4Linear"  # pickle looks for it here
    return Int4Linear


def __getattr__(name: str) -> type[nn.Linear]:
    if name == "Int4Linear":
        return int4_linear()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
