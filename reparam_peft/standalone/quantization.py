"""Factors in 8 or 4 bits: the matrices of standalone models, through torchao and bitsandbytes."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..layers.factorized import FactorizedModule
from ..numerics.rounding import Grid
from ..numerics.storage import LEAST_INPUTS, NF4_BLOCK
from ..runtime.modules import set_module

INT8_MOST = 127
SMALLEST_SCALE = 1e-30  # of matrices of zeros


class Scheme(ABC):
    """How the matrix of an `nn.Linear` (out, in) is stored: tensors by name, of which `weight` has the numbers."""

    library: str

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
    def grid(self, weight: Tensor) -> Grid:
        """The numbers that the tensors of a matrix like this one can hold, with the scales of this one."""

    @abstractmethod
    def packed(self, numbers: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The tensors of a matrix whose numbers are on a grid that `grid` has made."""

    @abstractmethod
    def linear(self, plain: nn.Linear, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Linear:
        """A layer that computes with the tensors, in place of a plain one; dtype is that of the rest of the model."""

    @abstractmethod
    def tensors(self, linear: nn.Linear) -> dict[str, Tensor]:
        """The tensors of a layer that `linear` has made."""


class Int8(Scheme):
    """`weight`, int8 (out, in), times `weight_scale`, float32 (out, 1): torchao's weight-only int8."""

    library = "torchao"

    def empty(self, out_features: int, in_features: int) -> dict[str, Tensor]:
        with torch.device("meta"):
            return {
                "weight": torch.empty(out_features, in_features, dtype=torch.int8),
                "weight_scale": torch.empty(out_features, 1, dtype=torch.float32),
            }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        quantized = self._classes().Int8Tensor.from_hp(weight.detach(), self._classes().PerRow())
        return {"weight": quantized.qdata, "weight_scale": quantized.scale}

    def grid(self, weight: Tensor) -> Grid:
        scale = weight.abs().amax(1, keepdim=True).clamp(min=SMALLEST_SCALE) / INT8_MOST
        return Grid(scale.float().double(), torch.arange(-INT8_MOST, INT8_MOST + 1, device=weight.device).double())

    def packed(self, numbers: Tensor, grid: Grid) -> dict[str, Tensor]:
        return {"weight": (grid.indices(numbers) - INT8_MOST).to(torch.int8), "weight_scale": grid.scale.float()}

    def matrix(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """A tensor that computes with the numbers, and in which rows can be looked up."""
        numbers = tensors["weight"]
        quantized: Tensor = self._classes().Int8Tensor(numbers, tensors["weight_scale"], [1, numbers.shape[1]], dtype)
        return quantized

    def linear(self, plain: nn.Linear, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Linear:
        plain.weight = nn.Parameter(self.matrix(tensors, dtype), requires_grad=False)
        return plain

    def tensors(self, linear: nn.Module) -> dict[str, Tensor]:
        weight: Any = linear.get_parameter("weight").data
        return {"weight": weight.qdata, "weight_scale": weight.scale}

    def _classes(self) -> Any:
        self.imported()
        return importlib.import_module("torchao.quantization")


class Int4(Scheme):
    """`weight`, uint8 (⌈out · in / 2⌉, 1), two numbers each, and `weight_absmax`, float32, for each 64: bitsandbytes' NF4."""

    library = "bitsandbytes"

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

    def grid(self, weight: Tensor) -> Grid:
        largest = _in_blocks(weight).abs().amax(1, keepdim=True).clamp(min=SMALLEST_SCALE).float().double()
        scale = largest.expand(-1, NF4_BLOCK).flatten()[: weight.numel()].view(weight.shape)
        return Grid(scale, self.imported().functional.get_4bit_type("nf4", device=weight.device).double())

    def packed(self, numbers: Tensor, grid: Grid) -> dict[str, Tensor]:
        indices = grid.indices(numbers).flatten()
        upper, lower = nn.functional.pad(indices, (0, len(indices) % 2)).view(-1, 2).unbind(1)
        scales = _in_blocks(grid.scale)[:, 0].float().contiguous()
        return {"weight": (16 * upper + lower).to(torch.uint8)[:, None], "weight_absmax": scales}

    def linear(self, plain: nn.Linear, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Linear:
        library = self.imported()
        with torch.device("meta"):
            linear = library.nn.Linear4bit(
                plain.in_features, plain.out_features, bias=False, quant_type="nf4", compress_statistics=False
            )
        # Its faster order of the numbers on some CPUs takes only certain shapes, and changes what would be saved.
        linear.support_avx512bf16_for_cpu = False
        code = library.functional.get_4bit_type("nf4", device=tensors["weight"].device)
        state = library.functional.QuantState(
            absmax=tensors["weight_absmax"],
            shape=torch.Size((plain.out_features, plain.in_features)),
            code=code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
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
        return linear.train(plain.training)

    def tensors(self, linear: nn.Linear) -> dict[str, Tensor]:
        weight: Any = linear.weight
        return {"weight": weight.data, "weight_absmax": weight.quant_state.absmax}


def _in_blocks(weight: Tensor) -> Tensor:
    """All numbers, row by row, in blocks with a scale of their own, the last filled up with zeros."""
    return nn.functional.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)


SchemeName = Literal["int8", "int4"]  # the names below, for type checkers
SCHEMES: dict[str, Scheme] = {"int8": Int8(), "int4": Int4()}


def check_scheme(name: str | None) -> None:
    """Raise where there is no such scheme, or its library is not installed.

    Raises:
        ValueError, ImportError
    """
    if name is not None:
        if name not in SCHEMES:
            raise ValueError(f"`quantize` must be one of {list(SCHEMES)} or None, got {name!r}.")
        SCHEMES[name].imported()


class Rounding(Protocol):
    """How the matrices of a factorised module are rounded together."""

    def __call__(self, name: str, module: FactorizedModule, scheme: Scheme) -> Mapping[str, dict[str, Tensor]]:
        """The tensors of some of its linear layers, by their names in it; the others are rounded to nearest."""


def quantize(model: nn.Module, scheme: str, rounding: Rounding | None = None) -> None:
    """Quantise the factors of a model in place: matrices of linear layers with rows of at least `LEAST_INPUTS` numbers.

    Args:
        model: with factorised modules.
        scheme: one of `SCHEMES`.
        rounding: of the matrices; None: each number to the nearest one.
    """
    stored = SCHEMES[scheme]
    for prefix, module in _factorized(model):
        rounded = {} if rounding is None else rounding(prefix, module, stored)
        for name, linear in linears_of(module):
            dtype = linear.weight.dtype
            tensors = rounded[name] if name in rounded else stored.quantize(linear.weight)
            set_module(module, name, stored.linear(linear, tensors, dtype))


def prepare(module: FactorizedModule, scheme: str) -> None:
    """Give factors on the meta device the tensors that a checkpoint is to fill in."""
    for _, linear in linears_of(module):
        for key, tensor in SCHEMES[scheme].empty(linear.out_features, linear.in_features).items():
            if key == "weight":
                linear.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                linear.register_buffer(key, tensor)


def finish(prefix: str, module: FactorizedModule, scheme: str, dtype: torch.dtype) -> None:
    """Make layers that compute, of those that `prepare` has made and a checkpoint has filled in.

    Raises:
        ValueError: they are not on a device.
    """
    for name, linear in linears_of(module):
        tensors = {key: getattr(linear, key).detach() for key in SCHEMES[scheme].empty(1, 1)}
        if linear.weight.is_meta:
            raise ValueError(
                f"{prefix}.{name}: quantised factors cannot be offloaded; give a `device_map` without disk or spare CPU."
            )
        for key in tensors.keys() - {"weight"}:
            delattr(linear, key)
        set_module(module, name, SCHEMES[scheme].linear(linear, tensors, dtype))


def state_dict(model: nn.Module, scheme: str) -> dict[str, Tensor]:
    """What a checkpoint holds of a model with quantised factors."""
    linears = {f"{prefix}.{name}": linear for prefix, module in _factorized(model) for name, linear in linears_of(module)}
    state = {}
    for key, value in model.state_dict().items():
        name, _, rest = key.partition(".weight")
        if name not in linears:
            state[key] = value
        elif not rest:  # what else a library adds follows from these
            state |= {f"{name}.{part}": tensor for part, tensor in SCHEMES[scheme].tensors(linears[name]).items()}
    return state


def _factorized(model: nn.Module) -> list[tuple[str, FactorizedModule]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FactorizedModule)]


def linears_of(module: FactorizedModule) -> list[tuple[str, nn.Linear]]:
    """What is quantised of a factorised module."""
    linears = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return [(name, linear) for name, linear in linears if linear.in_features >= LEAST_INPUTS]
