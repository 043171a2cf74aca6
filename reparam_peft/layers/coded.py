"""A linear layer whose matrix is in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.types import Device

from ..numerics.storage import AS_THE_MODEL
from .factor_linear import FactorLinear
from .schemes import SCHEME_OF, Multiply

Widths: TypeAlias = Mapping[str, int]  # the bits of those matrices of a product that are in few bits, by name
ALL_AS_THE_MODEL: Widths = MappingProxyType({})
CODES = "weight"


class CodedLinear(nn.Module):
    """x (…, in) → W x (…, out) for a matrix in 8 or 4 bits, which stays as it is: codes and scales are buffers.

    It computes in the dtype of its input, by the kernels of torchao or bitsandbytes, with gradients to the input. What these
    need beside the buffers is made when it is called first, and again where the buffers are others.

    Args:
        in_features, out_features: of W.
        bits: 8 or 4.
        device: of the buffers. Scales are NaN until they are filled in: what never arrives must not look like weights.
        dtype: of the model around it.

    Raises:
        ImportError: the library that computes with such numbers is not installed.

    Attributes:
        weight: the codes, as `Scheme.empty` has them.
        placeholder: of one element, in the dtype of the model around it; in no checkpoint.
    """

    weight: Tensor
    placeholder: Tensor
    _multiply: tuple[Tensor, Tensor, torch.dtype, Multiply] | None = None  # made of codes and scales, for a dtype

    def __init__(
        self, in_features: int, out_features: int, bits: int, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.scheme = SCHEME_OF[bits]
        self.scheme.imported()
        for name, empty in self.scheme.empty(out_features, in_features).items():
            unfilled = torch.nan if name == self.scheme.scale else 0
            self.register_buffer(name, torch.full(empty.shape, unfilled, dtype=empty.dtype, device=device))
        self.register_buffer("placeholder", torch.zeros((), dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model around it."""
        return self.placeholder.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def scales(self) -> Tensor:
        """Float32, of the shape of `numerics.storage.scale_shape`."""
        return cast(Tensor, self._buffers[self.scheme.scale])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales, by name."""
        return {CODES: self.weight, self.scheme.scale: self.scales}

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.scheme.traced(x, self.tensors, self.shape)
        codes, scales, made = self._buffers[CODES], self._buffers[self.scheme.scale], self._multiply
        if made is None or made[0] is not codes or made[1] is not scales or made[2] != x.dtype:
            self._check_filled()
            made = (self.weight, self.scales, x.dtype, self.scheme.multiply(self.tensors, self.shape, x.dtype))
            self._multiply = made
        return made[3](x)

    def _check_filled(self) -> None:
        if self.weight.is_meta:
            raise ValueError(
                "numbers in few bits are on the meta device, where they were not loaded or are offloaded, which these layers "
                "cannot be; load the model without offloading."
            )

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out, in), computed anew at each call; None: in the dtype of the model around it."""
        return self.scheme.numbers(self.tensors, self.shape).to(dtype or self.dtype)

    def set_matrix(self, matrix: Tensor, scales: Tensor) -> None:
        """Store a matrix whose numbers are on the grid of some scales. Works on meta, where it takes the device of the matrix.

        Args:
            matrix: shape (out, in), any floating dtype.
            scales: float32, of the shape of `numerics.storage.scale_shape`.

        Raises:
            ValueError: the shape is another.
        """
        if tuple(matrix.shape) != self.shape or scales.shape != self.scales.shape:
            raise ValueError(
                f"the matrix must be {self.shape} with scales {tuple(self.scales.shape)}, got {tuple(matrix.shape)} and "
                f"{tuple(scales.shape)}."
            )
        device = matrix.device if self.weight.is_meta else self.weight.device
        matrix, scales = matrix.detach().to(device), scales.detach().to(device, torch.float32)
        self.set_tensors(self.scheme.packed(matrix.double(), self.scheme.grid_of(scales, self.shape)))

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Have codes and scales, by name, which are not copied. Works on meta, where it takes their device."""
        if self.weight.is_meta:
            self.placeholder = torch.zeros((), dtype=self.dtype, device=tensors[CODES].device)
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def reset_parameters(self) -> None:
        """Make it a random matrix; on meta nothing."""
        if not self.weight.is_meta:
            random = torch.randn(self.shape, device=self.weight.device, dtype=torch.float64) / self.in_features**0.5
            grid = self.scheme.grid(random)
            self.set_matrix(grid.nearest(random), self.scheme.scales_of(grid))

    def share(self, other: CodedLinear) -> None:
        """Have the numbers of another layer of the same size and bits, in the same memory."""
        self.set_tensors(other.tensors)
        self.placeholder = other.placeholder.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedLinear:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # of a model that is cast; numbers in few bits have one dtype only
            setattr(self, self.scheme.scale, scales.to(self.scales.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_multiply"}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def linear(
    in_features: int, out_features: int, bits: int | None = None, device: Device = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A linear layer without bias, in 8 or 4 bits, or in the dtype of the model around it (16, None)."""
    if bits is None or bits == AS_THE_MODEL:
        return FactorLinear(in_features, out_features, bias=False, device=device, dtype=dtype)
    return CodedLinear(in_features, out_features, bits, device, dtype)
