"""How a matrix is stored in 8 or 4 bits, and multiplied: through torchao and bitsandbytes."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics.rounding import Grid
from ..numerics.storage import NF4_BLOCK
from .dequantizing import int4_linear, product, quant_state, read
from .factor_linear import FactorLinear

Multiply: TypeAlias = Callable[[Tensor], Tensor]
INT8_LEAST, INT8_MOST = -128, 127
SMALLEST_SCALE = 1e-30  # of matrices of zeros


class Scheme(ABC):
    """How the matrix of an `nn.Linear` (out, in) is stored: tensors by name, of which `weight` has the numbers."""

    library: str
    scale: str  # name of the tensor that has the scales
    largest: int  # number that a scale is multiplied by

    def imported(self) -> ModuleType:
        """The library that computes with such matrices.

        Raises:
            ImportError: it is not installed.
        """
        try:
            return importlib.import_module(self.library)
        except ImportError as error:
            raise ImportError(f"quantised factors need {self.library}: pip install {self.library}") from error

    @abstractmethod
    def empty(self, out_features: int, in_features: int) -> dict[str, Tensor]:
        """Tensors of the shapes and dtypes that a checkpoint holds, on the meta device."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a matrix."""

    @abstractmethod
    def scales(self, weight: Tensor) -> Tensor:
        """The scales with which a matrix fits into the numbers there are: float32, of the shape that a checkpoint holds."""

    @abstractmethod
    def grid_of(self, scales: Tensor, shape: Sequence[int]) -> Grid:
        """The numbers that the tensors of a matrix of this shape can hold with these scales."""

    def grid(self, weight: Tensor) -> Grid:
        """The numbers that the tensors of a matrix like this one can hold, with the scales of this one."""
        return self.grid_of(self.scales(weight), weight.shape)

    @abstractmethod
    def scales_of(self, grid: Grid) -> Tensor:
        """The scales that a grid was made of: the inverse of `grid_of`."""

    @abstractmethod
    def packed(self, numbers: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The tensors of a matrix whose numbers are on a grid that `grid` has made."""

    @abstractmethod
    def numbers(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """The matrix that the tensors stand for, float64: the inverse of `packed`."""

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` where tensors of the right shapes and dtypes hold what no matrix has."""
        scales = tensors[self.scale]
        if not ((scales * self.largest).isfinite().all() and (scales >= 0).all()):
            raise ValueError(f"`{self.scale}` holds scales that are negative, NaN, or too large for a number.")

    @abstractmethod
    def multiply(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Multiply:
        """x (…, in) of a dtype → x Wᵀ (…, out), by the library's own kernels, with gradients to x."""

    @abstractmethod
    def traced(self, x: Tensor, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """x Wᵀ in operators that PyTorch's compiler can follow; the library was imported before."""

    @abstractmethod
    def linear(self, plain: nn.Linear, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Linear:
        """A layer that computes with the tensors, in place of a plain one; dtype is that of the rest of the model."""

    @abstractmethod
    def tensors(self, linear: nn.Linear) -> dict[str, Tensor]:
        """The tensors of a layer that `linear` has made."""


class Int8(Scheme):
    """`weight`, int8 (out, in), times `weight_scale`, float32 (out, 1): torchao's weight-only int8."""

    library = "torchao"
    scale = "weight_scale"
    largest = INT8_MOST

    def empty(self, out_features: int, in_features: int) -> dict[str, Tensor]:
        with torch.device("meta"):
            return {
                "weight": torch.empty(out_features, in_features, dtype=torch.int8),
                "weight_scale": torch.empty(out_features, 1, dtype=torch.float32),
            }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        quantized = self._classes().Int8Tensor.from_hp(weight.detach(), self._classes().PerRow())
        return {"weight": quantized.qdata, "weight_scale": quantized.scale}

    def scales(self, weight: Tensor) -> Tensor:
        return (weight.abs().amax(1, keepdim=True).clamp(min=SMALLEST_SCALE) / INT8_MOST).float()

    def grid_of(self, scales: Tensor, shape: Sequence[int]) -> Grid:
        return Grid(scales.double(), torch.arange(INT8_LEAST, INT8_MOST + 1, device=scales.device).double())

    def scales_of(self, grid: Grid) -> Tensor:
        return grid.scale.float()

    def packed(self, numbers: Tensor, grid: Grid) -> dict[str, Tensor]:
        return {"weight": (grid.indices(numbers) + INT8_LEAST).to(torch.int8), "weight_scale": self.scales_of(grid)}

    def numbers(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        return tensors["weight"].double() * tensors["weight_scale"].double()

    def multiply(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Multiply:
        if dtype == torch.float16:
            return lambda x: self.traced(x, tensors, shape)
        matrix = self.matrix(tensors, dtype)
        return lambda x: F.linear(x, matrix)

    def traced(self, x: Tensor, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        if x.dtype == torch.float16:  # whose range sums of products with the whole numbers leave, before they are scaled
            return F.linear(x, (tensors["weight"] * tensors["weight_scale"]).to(x.dtype))
        return F.linear(x, tensors["weight"].to(x.dtype)) * tensors["weight_scale"][:, 0].to(x.dtype)

    def matrix(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """A tensor that computes with the numbers, and in which rows can be looked up."""
        numbers = tensors["weight"]
        quantized: Tensor = self._classes().Int8Tensor(numbers, tensors["weight_scale"], [1, numbers.shape[1]], dtype)
        return quantized

    def linear(self, plain: nn.Linear, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Linear:
        plain.weight = nn.Parameter(self.matrix(tensors, dtype), requires_grad=False)
        plain.__class__ = Int8Linear
        return plain

    def tensors(self, linear: nn.Module) -> dict[str, Tensor]:
        weight: Any = linear.get_parameter("weight").data
        return {"weight": weight.qdata, "weight_scale": weight.scale}

    def _classes(self) -> Any:
        self.imported()
        return importlib.import_module("torchao.quantization")


class Int8Linear(FactorLinear):
    """A linear layer whose weight is torchao's int8, and whose sums stay within the range of float16."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            scheme = SCHEMES["int8"]
            y = scheme.traced(x, scheme.tensors(self), (self.out_features, self.in_features))
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class Int4(Scheme):
    """`weight`, uint8 (⌈out · in / 2⌉, 1), two numbers each, and `weight_absmax`, float32, for each 64: bitsandbytes' NF4."""

    library = "bitsandbytes"
    scale = "weight_absmax"
    largest = 1

    def empty(self, out_features: int, in_features: int) -> dict[str, Tensor]:
        count = out_features * in_features
        with torch.device("meta"):
            return {
                "weight": torch.empty(math.ceil(count / 2), 1, dtype=torch.uint8),
                "weight_absmax": torch.empty(math.ceil(count / NF4_BLOCK), dtype=torch.float32),
            }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        functional = self.imported().functional
        packed, state = functional.quantize_4bit(weight.detach(), blocksize=NF4_BLOCK, quant_type="nf4")
        return {"weight": packed, "weight_absmax": state.absmax}

    def scales(self, weight: Tensor) -> Tensor:
        return _in_blocks(weight).abs().amax(1).clamp(min=SMALLEST_SCALE).float()

    def grid_of(self, scales: Tensor, shape: Sequence[int]) -> Grid:
        expanded = scales.double()[:, None].expand(-1, NF4_BLOCK).flatten()[: math.prod(shape)].view(*shape)
        return Grid(expanded, self._levels(scales.device).double())

    def scales_of(self, grid: Grid) -> Tensor:
        return _in_blocks(grid.scale)[:, 0].float().contiguous()

    def packed(self, numbers: Tensor, grid: Grid) -> dict[str, Tensor]:
        indices = grid.indices(numbers).flatten()
        upper, lower = F.pad(indices, (0, len(indices) % 2)).view(-1, 2).unbind(1)
        return {"weight": (16 * upper + lower).to(torch.uint8)[:, None], "weight_absmax": self.scales_of(grid)}

    def numbers(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        codes, grid = tensors["weight"].flatten().int(), self.grid_of(tensors["weight_absmax"], shape)
        indices = torch.stack([codes // 16, codes % 16], 1).flatten()[: math.prod(shape)].view(*shape)
        return grid.levels[indices] * grid.scale

    def multiply(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Multiply:
        codes = tensors["weight"]
        if codes.device.type == "cpu" or dtype == torch.float64:
            return lambda x: product(x, partial(self._dequantized, tensors, shape))
        multiply, state = self.imported().matmul_4bit, self._state(tensors, shape, dtype)
        return lambda x: multiply(x, codes, quant_state=state)

    def traced(self, x: Tensor, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        return F.linear(x, self._dequantized(tensors, shape, x.dtype))

    def _dequantized(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return read(tensors["weight"], tensors["weight_absmax"], NF4_BLOCK, "nf4", shape, dtype)

    def _levels(self, device: torch.device) -> Tensor:
        levels: Tensor = self.imported().functional.get_4bit_type("nf4", device=device)
        return levels

    def _state(self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Any:
        return self.imported().functional.QuantState(
            absmax=tensors["weight_absmax"],
            shape=torch.Size(shape),
            code=self._levels(tensors["weight"].device),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )

    def linear(self, plain: nn.Linear, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Linear:
        library = self.imported()
        with torch.device("meta"):
            linear = library.nn.Linear4bit(
                plain.in_features, plain.out_features, bias=False, quant_type="nf4", compress_statistics=False
            )
        # Its faster order of the numbers on some CPUs takes only certain shapes, and changes what would be saved.
        linear.support_avx512bf16_for_cpu = False
        state = self._state(tensors, (plain.out_features, plain.in_features), dtype)
        linear.weight = library.nn.Params4bit(
            tensors["weight"],
            quant_state=state,
            blocksize=NF4_BLOCK,
            compress_statistics=False,
            quant_type="nf4",
            module=linear,
            bnb_quantized=True,
        )
        linear.quant_state = state
        linear.__class__ = int4_linear()
        return linear.train(plain.training)

    def tensors(self, linear: nn.Linear) -> dict[str, Tensor]:
        return {"weight": linear.weight.data, "weight_absmax": quant_state(linear).absmax}


def _in_blocks(weight: Tensor) -> Tensor:
    """All numbers, row by row, in blocks with a scale of their own, the last filled up with zeros."""
    return F.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)


SchemeName = Literal["int8", "int4"]  # the names below, for type checkers
SCHEMES: dict[str, Scheme] = {"int8": Int8(), "int4": Int4()}
SCHEME_OF: dict[int, Scheme] = {8: SCHEMES["int8"], 4: SCHEMES["int4"]}  # by the bits of a number


def check_scheme(name: str | None) -> None:
    """Raise where there is no such scheme, or its library is not installed.

    Raises:
        ValueError, ImportError
    """
    if name is not None:
        if name not in SCHEMES:
            raise ValueError(f"`quantize` must be one of {list(SCHEMES)} or None, got {name!r}.")
        SCHEMES[name].imported()
