"""What a device computes fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm, torch.addmm)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 numbers at least as fast as float32 ones.

    A processor without the instructions emulates them: then a product takes some twenty times as long.
    """
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def fast_products() -> Iterator[None]:
    """Within this block products of bfloat16 matrices are computed in float32 where a processor would emulate them.

    They are rounded to bfloat16 as those of processors with the instructions are, which add up in float32, too.
    """
    if computes_bfloat16(torch.device("cpu")):
        yield
        return
    with _InFloat32():
        yield


class _InFloat32(TorchFunctionMode):
    """Computes products of bfloat16 matrices on the CPU in float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Of what multiplies in its own way, such as a quantised weight, and of what is written into a tensor, nothing is known.
        is_plain = "out" not in kwargs and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        if func not in PRODUCTS or not is_plain or not any(map(_is_emulated, tensors)):
            return func(*args, **kwargs)
        if (
            func is F.linear
            and len(args) > 1
            and not any(weight.requires_grad for weight in tree_leaves((args[1:], kwargs)) if weight is not None)
        ):
            return _Frozen.apply(*args, *kwargs.values())
        args, kwargs = tree_map(lambda leaf: leaf.float() if _is_emulated(leaf) else leaf, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs).to(torch.bfloat16)


class _Frozen(torch.autograd.Function):
    """`F.linear` of a weight that is not trained, of which no float32 copy is kept for the pass backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        inputs = (above[0].float() @ weight.float()).to(above[0].dtype) if ctx.needs_input_grad[0] else None
        return (inputs, None, None)[: len(ctx.needs_input_grad)]


def _is_emulated(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 and leaf.device.type == "cpu"
