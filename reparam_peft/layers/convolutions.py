"""Convolutions of one and two dimensions as matrices: plain, grouped and transposed ones."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from .coded import ALL_AS_THE_MODEL, Widths
from .factorized import Dtype, FactorizedModule
from .kind import LayerKind

PLAIN: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}  # by the number of dimensions
COMPUTED: dict[int, Any] = {1: F.conv1d, 2: F.conv2d}


def dimensions(layer: Any) -> int:
    """How many dimensions a kernel has."""
    return len(layer.kernel_size)


class FactorizedConv(FactorizedModule):
    """A convolution of a product: B is the convolution with r output channels, A one with a kernel of one element.

    Args:
        layer: whose geometry it has.
        B: the convolution of r channels that A follows; None: one as the layer.
    """

    def __init__(
        self,
        layer: Any,
        rank: int,
        form: str = "factors",
        bias: bool = False,
        device: Device = None,
        dtype: Dtype = None,
        B: nn.Module | None = None,
    ) -> None:
        self.kernel_dimensions = n = dimensions(layer)
        B = _convolution(layer, layer.in_channels, rank, device, dtype) if B is None else B
        expand = partial(PLAIN[n], rank, kernel_size=1, bias=False, device=device, dtype=dtype)
        super().__init__(B, expand, rank, layer.out_channels, form, bias, dim=-1 - n, device=device, dtype=dtype)

    def shaped_bias(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *[1] * self.kernel_dimensions)


def _convolution(layer: Any, channels: int, rank: int, device: Device, dtype: Dtype) -> nn.Module:
    """B of a convolution: of all its channels, or of those of one group."""
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    mode = layer.padding_mode
    return PLAIN[dimensions(layer)](channels, rank, *geometry, bias=False, padding_mode=mode, device=device, dtype=dtype)


class FactorizedGroupedConv(FactorizedConv):
    """A grouped convolution of a product, of which B is one convolution for all groups: group j has W_j ≈ A_j B.

    So its matrix is W_1, W_2, … one below the other, (out, in / groups · elements of the kernel), and A likewise.
    """

    def __init__(
        self, layer: Any, rank: int, form: str = "factors", bias: bool = False, device: Device = None, dtype: Dtype = None
    ) -> None:
        self.channel_groups: int = layer.groups
        B = _convolution(layer, layer.in_channels // layer.groups, rank, device, dtype)
        super().__init__(layer, rank, form, bias, device, dtype, B)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        n = self.kernel_dimensions
        one = x.ndim == n + 1
        x = x[None] if one else x
        z = self.B(x.unflatten(1, (self.channel_groups, -1)).flatten(0, 1))
        z = z.unflatten(0, (-1, self.channel_groups)).flatten(1, 2)
        A = self.factors.A
        y = COMPUTED[n](z.to(A.dtype), A.view(*A.shape, *[1] * n), groups=self.channel_groups)
        bias = bias if self.bias is None else self.bias
        y = y if bias is None else y + self.shaped_bias(bias).to(y.dtype)
        return y[0] if one else y


class FactorizedTransposedConv(FactorizedConv):
    """`nn.ConvTranspose1d` of a product: B is the transposed convolution with r output channels."""

    def __init__(
        self, layer: Any, rank: int, form: str = "factors", bias: bool = False, device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__(layer, rank, form, bias, device, dtype, StretchingConv1d(layer, rank, device, dtype))


class StretchingConv1d(nn.Module):
    """A transposed convolution without bias, whose weight (out, in, elements) has the outputs first, as of other layers."""

    def __init__(self, layer: nn.ConvTranspose1d, out_channels: int, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        elements = layer.kernel_size[0]
        self.weight = nn.Parameter(torch.empty(out_channels, layer.in_channels, elements, device=device, dtype=dtype))
        # torch types the padding as one of a plain convolution, which may be a word.
        self.geometry: tuple[Any, ...] = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight at random, as torch does for its convolutions."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, output_padding, groups, dilation = self.geometry
        weight = self.weight.transpose(0, 1)
        return F.conv_transpose1d(x, weight, None, stride, padding, output_padding, groups, dilation)


class ConvKind(LayerKind[Any]):
    """`nn.Conv1d` or `nn.Conv2d` of one group: the kernel as a matrix (out, in · its elements), the input as its patches."""

    def __init__(self, layer_class: type[nn.Module]) -> None:
        self.layer_class = layer_class

    def computes_alike(self, layer: Any) -> bool:
        own: Any = self.layer_class
        return super().computes_alike(layer) and type(layer)._conv_forward is own._conv_forward

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.reshape(shape).contiguous()

    def reading(self, layer: Any) -> tuple[Any, ...]:
        return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode, layer.groups)

    def patches(self, layer: Any, inputs: Tensor) -> Tensor:
        """What the kernel multiplies, shape (images, places, channels · elements of the kernel)."""
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        return _unfolded(padded, layer.kernel_size, layer.dilation, layer.stride)

    def rows(self, layer: Any, inputs: Tensor) -> Tensor:
        return self.patches(layer, inputs).flatten(0, 1)

    def gradient_rows(self, layer: Any, gradients: Tensor) -> Tensor:
        return _by_place(gradients, dimensions(layer)).flatten(0, 1)

    def factorized(
        self,
        layer: Any,
        rank: int,
        form: str = "factors",
        bias: bool = False,
        size: tuple[int, int] | None = None,
        device: Device = None,
        dtype: Dtype = None,
        widths: Widths = ALL_AS_THE_MODEL,
    ) -> FactorizedConv:
        self.check_size(layer, size)
        return FactorizedConv(layer, rank, form, bias, device=device, dtype=dtype)


def _unfolded(padded: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Patches (images, places, channels · elements) of inputs with one or two dimensions, of one image or several."""
    if len(kernel) == 1:
        padded, kernel, dilation, stride = padded.unsqueeze(-2), (1, *kernel), (1, *dilation), (1, *stride)
    patches = F.unfold(padded if padded.ndim == 4 else padded[None], kernel, dilation, stride=stride)
    return patches.mT


def _by_place(outputs: Tensor, n: int) -> Tensor:
    """Outputs (images, places, channels) of those of a layer, (images, channels, …) or of one image (channels, …)."""
    outputs = outputs[None] if outputs.ndim == n + 1 else outputs
    return outputs.flatten(2).mT


class GroupedConvKind(ConvKind):
    """`nn.Conv1d` or `nn.Conv2d` of several groups: their matrices one below the other, each group of a patch a row.

    A row makes the outputs of its group, and the gradient that goes with it is zero elsewhere.
    """

    has_one_mean = False

    def fits(self, layer: nn.Module) -> bool:
        return super().fits(layer) and self._groups(layer) > 1

    @staticmethod
    def _groups(layer: Any) -> int:
        return int(layer.groups)

    def check(self, layer: Any) -> None:
        super().check(layer)
        if layer.groups == layer.in_channels:
            raise ValueError(
                f"`groups` of a {type(layer).__name__} must be fewer than its {layer.in_channels} input channels: the matrix "
                f"of a depthwise convolution has {math.prod(layer.kernel_size)} columns, so that a product would save next to "
                "nothing; leave it out with `exclude_modules`."
            )

    def rows(self, layer: Any, inputs: Tensor) -> Tensor:
        return self.patches(layer, inputs).unflatten(2, (layer.groups, -1)).flatten(0, 2)

    def gradient_rows(self, layer: Any, gradients: Tensor) -> Tensor:
        of_groups = _by_place(gradients, dimensions(layer)).unflatten(2, (layer.groups, -1)).flatten(0, 1)
        rows = of_groups.new_zeros(len(of_groups), layer.groups, *of_groups.shape[1:])
        rows.diagonal(dim1=1, dim2=2).copy_(of_groups.mT)
        return rows.flatten(2).flatten(0, 1)

    def factorized(
        self,
        layer: Any,
        rank: int,
        form: str = "factors",
        bias: bool = False,
        size: tuple[int, int] | None = None,
        device: Device = None,
        dtype: Dtype = None,
        widths: Widths = ALL_AS_THE_MODEL,
    ) -> FactorizedConv:
        self.check_size(layer, size)
        return FactorizedGroupedConv(layer, rank, form, bias, device=device, dtype=dtype)


class TransposedConvKind(ConvKind):
    """`nn.ConvTranspose1d` of one group: a convolution of the input with zeros between its elements.

    The matrix is (out, in · elements of the kernel), as that of an `nn.Conv1d`; of a weight (in, out, elements) it is a copy.
    """

    def __init__(self) -> None:
        super().__init__(nn.ConvTranspose1d)

    def computes_alike(self, layer: Any) -> bool:
        return LayerKind.computes_alike(self, layer)

    def check(self, layer: Any) -> None:
        super().check(layer)
        if layer.groups != 1:
            raise ValueError(
                f"`groups` of a {type(layer).__name__} must be 1, got {layer.groups}; leave it out with `exclude_modules`."
            )

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1).flatten(1)

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.unflatten(1, (shape[0], shape[2])).transpose(0, 1).contiguous()

    def reading(self, layer: Any) -> tuple[Any, ...]:
        return (type(layer).__name__, *super().reading(layer), layer.output_padding)

    def patches(self, layer: Any, inputs: Tensor) -> Tensor:
        (stride,), (padding,), (dilation,) = layer.stride, layer.padding, layer.dilation
        reach = dilation * (layer.kernel_size[0] - 1)
        inputs = inputs if inputs.ndim == 3 else inputs[None]
        stretched = F.pad(inputs[..., None], (0, stride - 1)).flatten(2)[..., : (inputs.shape[-1] - 1) * stride + 1]
        padded = F.pad(stretched, (reach - padding, reach - padding + layer.output_padding[0]))
        patches = _unfolded(padded, layer.kernel_size, layer.dilation, (1,))
        return patches.unflatten(2, (layer.in_channels, -1)).flip(-1).flatten(2)  # what comes first meets the kernel's last

    def factorized(
        self,
        layer: Any,
        rank: int,
        form: str = "factors",
        bias: bool = False,
        size: tuple[int, int] | None = None,
        device: Device = None,
        dtype: Dtype = None,
        widths: Widths = ALL_AS_THE_MODEL,
    ) -> FactorizedConv:
        self.check_size(layer, size)
        return FactorizedTransposedConv(layer, rank, form, bias, device=device, dtype=dtype)
