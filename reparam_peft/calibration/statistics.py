"""What calibration knows of a model: sums over the rows that its modules saw. Added up, saved, loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..layers.kinds import Wrapper, is_quantized, kind_and_layer, layer_kind

FORMAT = "reparam_peft statistics 1"


@dataclass
class Statistics:
    """What calibration knows of a model's modules: sums, not means, so that statistics of several runs add up.

    With the inputs x (in,) and the output gradients g (out,) of a module as rows:

    Attributes:
        inputs: module → the first module that reads the same input; they share the statistics under that name.
        rows: input → number of rows.
        grams: input → Σ x xᵀ, shape (in, in), float64; for embeddings, whose rows are one-hot, its diagonal (in,).
        sums: input → Σ x, shape (in,), float64.
        weighted_grams: input → Σ |h|² x xᵀ with h the gradient at the input, shape (in, in), float64; none for inputs that no
            gradient reaches, such as those of the first layers, nor for embeddings.
        weighted_sums: input → Σ |h|² x, shape (in,), float64.
        weights: input → Σ |h|².
        gradient_rows: module → number of gradient rows.
        output_grams: module → Σ g gᵀ, shape (out, out), float64.
        energies: module → Σ |x|² |g|² and Σ |x|² over the gradient rows, shape (2,), float64.
        predictions: module → labels sampled from the model in its passes, one for each position that predicts.
        weight_norms: module → ‖W‖_F, by which statistics of another model are told.
        seed: of the sampled labels.
    """

    inputs: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    weighted_grams: dict[str, Tensor] = field(default_factory=dict)
    weighted_sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    gradient_rows: dict[str, int] = field(default_factory=dict)
    output_grams: dict[str, Tensor] = field(default_factory=dict)
    energies: dict[str, Tensor] = field(default_factory=dict)
    predictions: dict[str, int] = field(default_factory=dict)
    weight_norms: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def nbytes(self) -> int:
        """Memory that the tensors take."""
        return sum(t.numel() * t.element_size() for _, _, t in self._tensors())

    @property
    def tokens(self) -> int:
        """Rows of the input that had most of them."""
        return max(self.rows.values(), default=0)

    @property
    def gradient_tokens(self) -> int:
        """Labels of the module that had most of them."""
        return max(self.predictions.values(), default=0)

    def gram(self, module: str) -> Tensor:
        """G = E[x xᵀ] of a module's input."""
        name = self.inputs[module]
        return self.grams[name] / self.rows[name]

    def mean(self, module: str) -> Tensor:
        """E[x] of a module's input, shape (in,)."""
        name = self.inputs[module]
        return self.sums[name] / self.rows[name]

    def covariance(self, module: str) -> Tensor:
        """E[(x − E[x]) (x − E[x])ᵀ] of a module's input."""
        mean = self.mean(module)
        gram = self.gram(module)
        covariance = gram - torch.outer(mean, mean)
        # Of constant channels only rounding is left, which may be negative.
        covariance.diagonal().clamp_(min=1e-14 * gram.diagonal())
        return covariance

    def weighted_gram(self, module: str, centre: Tensor | None = None) -> Tensor | None:
        """E[|h|² (x − c) (x − c)ᵀ] / E[|h|²] with the gradients h at the input; None where no gradient reaches it."""
        name = self.inputs[module]
        total = self.weights.get(name, 0.0)
        if not total > 0:
            return None
        gram = self.weighted_grams[name] / total
        if centre is None:
            return gram
        cross = torch.outer(self.weighted_sums[name] / total, centre)
        centred = gram - cross - cross.mT + torch.outer(centre, centre)
        centred.diagonal().clamp_(min=0)
        return centred

    def fisher(self, module: str) -> Tensor:
        """F = E[g gᵀ] at a module's output, shape (out, out)."""
        return self.output_grams[module] / max(self.gradient_rows[module], 1)

    def loss_scale(self, module: str) -> float:
        """What ½ tr(F Δ G Δᵀ) is multiplied by to become the predicted increase of the loss, in nats per prediction.

        Two corrections: rows per prediction; and E[|x|² |g|²] / (E[|x|²] E[|g|²]), because the product of F and G takes large
        inputs and large gradients for independent, and the largest inputs of transformers have the smallest gradients.
        """
        rows = self.gradient_rows[module]
        joint, squares = (float(value) for value in self.energies[module])
        gradients = float(self.output_grams[module].diagonal().sum())
        if not (rows and squares > 0 and gradients > 0):
            return 0.0
        return joint / (squares * gradients / rows) * rows / max(self.predictions[module], 1)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both runs together, with the seed of this one; neither is changed.

        Raises:
            ValueError: they are of different models, or of modules that share their inputs differently.
        """
        for module in self.weight_norms.keys() & other.weight_norms.keys():
            _check_norm(module, self.weight_norms[module], other.weight_norms[module])
        for module in self.inputs.keys() & other.inputs.keys():
            if self.inputs[module] != other.inputs[module]:
                raise ValueError(
                    f"{module}: it shares the input of {self.inputs[module]} in one of the statistics and of "
                    f"{other.inputs[module]} in the other; calibrate both with the same `target_modules`."
                )
        merged = Statistics({**self.inputs, **other.inputs}, seed=self.seed)
        for name in (*_TENSORS, *_COUNTS):
            one, two = getattr(self, name), getattr(other, name)
            both = {key: one[key] + two[key].to(one[key].device) if isinstance(one[key], Tensor) else one[key] + two[key]
                    for key in one.keys() & two.keys()}  # fmt: skip
            setattr(merged, name, {**one, **two, **both})
        merged.weight_norms = {**self.weight_norms, **other.weight_norms}
        return merged

    def check(self, modules: Mapping[str, nn.Module], gradients: bool = False) -> None:
        """Raise `ValueError` unless the statistics are of these modules, with these weights, and have gradients if needed."""
        for name, module in modules.items():
            if name not in self.weight_norms:
                raise ValueError(
                    f"{name}: the statistics do not hold this module; they are of another model or of other targets."
                )
            kind, layer = kind_and_layer(module)
            out_features, in_features = kind.shape(layer)
            gram, fisher = self.grams.get(self.inputs.get(name, "")), self.output_grams.get(name)
            for tensor, size in ((gram, in_features), (fisher, out_features)):
                if tensor is not None and tensor.shape[0] != size:
                    raise ValueError(
                        f"{name}: the statistics have shape {tuple(tensor.shape)}, and the weight is ({out_features}, "
                        f"{in_features}); they are of another model."
                    )
            # Rounding to bfloat16 changes the norm by less than 1e-5, bitsandbytes' reordering of 4 bits on a CPU by 1e-4.
            _check_norm(name, self.weight_norms[name], weight_norm(module), 1e-3 if is_quantized(module) else 1e-4)
            if gram is None or not self.rows[self.inputs[name]]:
                raise ValueError(
                    f"{name}: no batch reached this module. Give batches that use it, or leave it out with `exclude_modules`."
                )
            if gradients and fisher is None:
                raise ValueError(
                    f"{name}: the statistics hold no gradients, which `allocation='loss'` and `output_metric` need; gather "
                    "them anew."
                )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {f"{kind}/{key}": tensor.contiguous().cpu() for kind, key, tensor in self._tensors()}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}
        save_file(tensors, path, metadata={"format": FORMAT, "statistics": json.dumps(plain)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else, or is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path} does not hold statistics ({FORMAT!r}), but {metadata.get('format')!r}.")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again, or gather the statistics anew.") from error
        try:
            statistics = cls(**json.loads(metadata["statistics"]))
            for key, tensor in tensors.items():
                kind, _, name = key.partition("/")
                if kind not in _TENSORS:
                    raise ValueError(f"{key!r} is no part of statistics")
                getattr(statistics, kind)[name] = tensor
            statistics._check_whole()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} does not hold statistics that are whole: {error}; gather them anew.") from error
        return statistics

    def _check_whole(self) -> None:
        """Raise `ValueError` unless all parts are there, are finite and fit each other."""
        parts = (("rows", "grams", "sums"), ("weights", "weighted_grams", "weighted_sums"))
        for names in (*parts, ("gradient_rows", "output_grams", "energies", "predictions")):
            first, *others = (getattr(self, name).keys() for name in names)
            if any(other != first for other in others):
                raise ValueError(f"{', '.join(names)} are not of the same modules")
        known = self.weight_norms.keys() >= self.inputs.keys() | self.output_grams.keys()
        if not known or set(self.inputs.values()) != set(self.rows) or not self.rows.keys() >= self.weights.keys():
            raise ValueError("modules and their inputs do not fit each other")
        counts = [*self.gradient_rows.values(), *self.predictions.values()]
        if not all(isinstance(n, int) and n >= 0 for n in counts) or not all(
            isinstance(n, int) and n > 0 for n in self.rows.values()
        ):
            raise ValueError("a number of rows is no count")
        for kind, key, tensor in self._tensors():
            if tensor.dtype != torch.float64 or not torch.isfinite(tensor).all():
                raise ValueError(f"{kind} of {key} holds other than finite float64 numbers")
            size = {"energies": 2, "output_grams": len(tensor)}.get(kind) or len(self.sums[key])
            if tuple(tensor.shape) not in _shapes(kind, size):
                raise ValueError(f"{kind} of {key} has shape {tuple(tensor.shape)}")

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for kind in _TENSORS:
            for key, tensor in getattr(self, kind).items():
                yield kind, key, tensor


_TENSORS = ("grams", "sums", "weighted_grams", "weighted_sums", "output_grams", "energies")
_COUNTS = ("rows", "weights", "gradient_rows", "predictions")


def _shapes(kind: str, size: int) -> list[tuple[int, ...]]:
    """What shapes a tensor of statistics may have."""
    square = [(size, size)] if kind.endswith("grams") else []
    return square if kind in ("weighted_grams", "output_grams") else [*square, (size,)]


def weight_norm(module: nn.Module) -> float:
    """‖W‖_F of a layer, or of the product in its place."""
    if isinstance(module, Wrapper):
        weight = module.computed_matrix()
    else:
        weight = layer_kind(module).own_matrix(module) if is_quantized(module) else module.weight.detach()
    return float(torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))


def _check_norm(name: str, expected: float, got: float, tolerance: float = 1e-4) -> None:
    if abs(got - expected) > tolerance * max(got, expected):
        raise ValueError(
            f"{name}: the statistics are of a weight of norm {expected:.6g}, and this one has {got:.6g}; they are of another "
            "model."
        )


Batches: TypeAlias = Iterable[Mapping[str, Any]] | Statistics


@dataclass(frozen=True)
class Inputs:
    """Moments of what a module sees: E[x xᵀ], or the covariance where a bias is moved; E[x]; and the number of rows."""

    gram: Tensor
    mean: Tensor
    rows: int
