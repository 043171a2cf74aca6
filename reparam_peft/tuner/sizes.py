"""What an adapter stores, and what it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..config.reparam_config import ReparamConfig
from ..layers.kinds import stored_weight
from ..layers.quantized_bases import stored_bytes
from ..numerics.storage import OF_THE_BASE
from .layer import ReparamLayer, reparam_layers
from .matrices import base_dtype, matrix_storage, unwrapped


@dataclass(frozen=True)
class MatrixSize:
    """The size of one targeted matrix.

    Attributes:
        name: of the module.
        shape: (out, in), before neurons were left out.
        rank: of its factors, or None where it stays dense.
        stored_parameters: what a checkpoint holds.
        bytes_per_parameter: in the base model's dtype.
        mask_bytes: how many of the stored parameters are bytes of masks: of the pivot form, and of the neurons that are left.
        bytes_in_few_bits: what a checkpoint holds where numbers are in few bits, with their scales, or the base model of a
            matrix that arrived so and stays dense; else None.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    stored_parameters: int
    bytes_per_parameter: int
    mask_bytes: int = 0
    bytes_in_few_bits: int | None = None

    @property
    def dense_parameters(self) -> int:
        """out · in."""
        return self.shape[0] * self.shape[1]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the original matrix."""
        return self.dense_parameters * self.bytes_per_parameter

    @property
    def stored_bytes(self) -> int:
        """Bytes of the factors, or of the matrix where it stays dense."""
        if self.bytes_in_few_bits is not None:
            return self.bytes_in_few_bits
        return (self.stored_parameters - self.mask_bytes) * self.bytes_per_parameter + self.mask_bytes


@dataclass(frozen=True)
class SizeReport:
    """Parameters and bytes of the targeted matrices and of the whole model, before and after.

    Attributes:
        matrices: one entry per target.
        other_parameters: parameters of everything that is not a targeted matrix; tied ones count once.
        other_bytes: their bytes.
    """

    matrices: list[MatrixSize]
    other_parameters: int
    other_bytes: int

    @property
    def keep(self) -> float:
        """Stored over original parameters of the targets; 1 without targets."""
        sizes = self.to_dict()["targets"]
        return sizes["stored_parameters"] / sizes["dense_parameters"] if sizes["dense_parameters"] else 1.0

    @property
    def dense_modules(self) -> list[str]:
        """Names of the targets that stay dense."""
        return [matrix.name for matrix in self.matrices if matrix.rank is None]

    def to_dict(self) -> dict[str, dict[str, int]]:
        """`{"targets": …, "model": …}`, each with dense and stored parameters and bytes."""
        fields = ("dense_parameters", "stored_parameters", "dense_bytes", "stored_bytes")
        targets = {name: sum(getattr(matrix, name) for matrix in self.matrices) for name in fields}
        rest = {name: self.other_parameters if "parameters" in name else self.other_bytes for name in fields}
        return {"targets": targets, "model": {name: targets[name] + rest[name] for name in fields}}

    def rows(self) -> list[tuple[str, str, int, int, float]]:
        """The table: part (targets or model), unit (parameters or bytes), before, after, and after over before."""
        return [
            (part, unit, before := sizes[f"dense_{unit}"], after := sizes[f"stored_{unit}"], after / before if before else 1.0)
            for part, sizes in self.to_dict().items()
            for unit in ("parameters", "bytes")
        ]

    def __str__(self) -> str:
        lines = [f"{'':14}{'before':>16}{'after':>16}{'kept':>8}"]
        for part, unit, before, after, kept in self.rows():
            lines.append(f"{part + ' ' + unit:18}{before:>12,}{after:>16,}{kept:>8.1%}")
        dense = self.dense_modules
        lines.append(f"{len(self.matrices) - len(dense)} matrices factorised, {len(dense)} left dense")
        return "\n".join(lines + [f"  dense: {name}" for name in dense])


def matrix_size(name: str, module: nn.Module, rank: int | None, config: ReparamConfig) -> MatrixSize:
    """The size of a target, wrapped or not, at a rank."""
    storage = matrix_storage(module, name, config)
    masks = 0 if rank is None else storage.mask(rank)
    itemsize = base_dtype(module).itemsize
    is_in_few_bits = storage.arrived is not None if rank is None else bool(storage.widths(rank))
    in_few_bits = storage.bytes(rank, itemsize) if is_in_few_bits else None
    if isinstance(module, ReparamLayer) and storage.bits == OF_THE_BASE:  # what it corrects is needed, and not stored with it
        in_few_bits = storage.bytes(rank, itemsize) + stored_bytes(module.own_layer)
    return MatrixSize(name, storage.whole_shape, rank, storage.stored(rank), itemsize, masks, in_few_bits)


def size_report(model: nn.Module, config: ReparamConfig) -> SizeReport:
    """Parameters and bytes of an adapter's targets and of the whole model.

    Args:
        model: that holds the adapter, without PEFT's models around it.
        config: of the adapter, with ranks and dense modules resolved.
    """
    modules = dict(model.named_modules())
    dense = {name: unwrapped(modules[name]) for name in config.dense_modules or ()}
    matrices = [matrix_size(name, modules[name], rank, config) for name, rank in config.rank_pattern.items()]
    matrices += [matrix_size(name, module, None, config) for name, module in dense.items()]
    # Every other parameter counts once: not those of factors or matrices, which are counted above, and of a module that is
    # saved whole beside the factors only its original, though there is a copy for each adapter.
    copies = [module.modules_to_save for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    layers = [layer for _, layer in reparam_layers(model)]
    counted = {id(p) for module in [*copies, *(layer.reparam_factors for layer in layers)] for p in module.parameters()}
    counted |= {id(layer.base_layer.weight) for layer in layers if layer.base_layer.weight is not None}
    counted |= {id(stored_weight(module)) for module in dense.values()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in counted]
    return SizeReport(
        matrices=matrices,
        other_parameters=sum(parameter.numel() for parameter in others),
        other_bytes=sum(parameter.numel() * parameter.element_size() for parameter in others),
    )
