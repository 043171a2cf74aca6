"""The hooks that add statistics up."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.kinds import LayerKind, kind_and_layer
from ..numerics.grams import add_gram, wide_rows
from ..numerics.metrics import exact
from ..runtime.batches import fitting_mask, padding_masks
from .sampling import sampled_objective
from .statistics import Statistics


class _InputError(ValueError):
    """Of a hook, to be told as it is, and not as one of the model."""


class Recorder:
    """Adds up the statistics in hooks of the modules."""

    def __init__(self, statistics: Statistics, modules: Mapping[str, nn.Module], gradients: bool) -> None:
        self.statistics, self.modules, self.gradients = statistics, modules, gradients
        self.predictions = 0
        self.centred = any(getattr(module, "bias", None) is not None for module in modules.values())
        self.seen: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}  # inputs of the running pass, by identity
        self.source_mask: Tensor | None = None
        self.target_mask: Tensor | None = None
        self.encoder_output: weakref.ref[Tensor] | None = None
        self.inside_encoder: set[nn.Module] = set()

    @contextmanager
    def hooks(self, model: nn.Module, starts: set[nn.Module]) -> Iterator[None]:
        """Within this block the modules' inputs and gradients are added up; gradients flow on from `starts` too."""
        encoder = model.get_encoder() if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
        handles = []
        try:
            if encoder is not None:
                self.inside_encoder = set(encoder.modules())
                handles.append(encoder.register_forward_hook(self._after_encoder))
            for name, module in self.modules.items():
                handles.append(module.register_forward_hook(_Hook(self, name, *kind_and_layer(module)), with_kwargs=True))
            handles += [module.register_forward_hook(lambda module, args, output: _start(output)[1]) for module in starts]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, model: nn.Module, batch: dict[str, Any], index: int, first_row: int, seed: int) -> None:
        """One batch: forward and, for gradients, backward."""
        self.seen.clear()
        self.source_mask, self.target_mask = padding_masks(batch, bool(self.inside_encoder))
        with torch.set_grad_enabled(self.gradients):
            try:
                output = model(**batch)
            except (torch.OutOfMemoryError, _InputError):
                raise
            except (TypeError, ValueError, IndexError, KeyError, RuntimeError, AttributeError) as error:
                raise ValueError(f"the model does not accept batch {index} ({sorted(batch)}): {error}") from error
            if self.gradients:
                rows = self.target_mask if self.inside_encoder else self.source_mask
                objective, predictions = sampled_objective(model, output, rows, first_row, seed)
                self.predictions += predictions
                if objective.requires_grad:
                    objective.backward()
        for name, total in self.statistics.sums.items():
            if not torch.isfinite(total).all():
                raise ValueError(
                    f"{name}: its inputs hold NaN or infinite values in batch {index}; repair the model or its data."
                )
        for name, total in self.statistics.energies.items():
            if not torch.isfinite(total).all():
                raise ValueError(f"{name}: the gradients at its output are NaN or infinite in batch {index}.")

    def mask_of(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Which rows of a module's input are no padding, bool, flattened; None: all."""
        of_encoder = self.encoder_output is not None and self.encoder_output() is x
        encodes = not self.inside_encoder or module in self.inside_encoder or of_encoder
        mask = self.source_mask if encodes else self.target_mask
        return fitting_mask(mask, x)

    def add_input(self, name: str, module: nn.Module, kind: LayerKind, x: Tensor, mask: Tensor | None) -> None:
        """Add an input to its Gram, unless another module has read the same tensor."""
        statistics = self.statistics
        reference, version, leader = self.seen.get(id(x), (None, -1, ""))
        if reference is None or reference() is not x or version != _version(x):
            leader = name
            self.seen[id(x)] = (weakref.ref(x), _version(x), name)
        known = statistics.inputs.setdefault(name, leader)
        if known != leader:
            raise _InputError(
                f"{name}: it read the same input as {known} in one batch and not in another, so that they cannot share "
                "statistics. Give batches of one kind, or target the two in separate runs."
            )
        if leader != name:
            return
        if kind.one_hot:
            kept = x.flatten() if mask is None else x.flatten()[mask]
            counts = exact(kind.row_counts(module, kept))
            _add(statistics.grams, name, counts)
            _add(statistics.sums, name, counts.clone())
            statistics.rows[name] = statistics.rows.get(name, 0) + kept.numel()
            return
        X = wide_rows(kind.rows(module, x), mask)
        sums = X.sum(0, dtype=torch.float64)
        add_gram(statistics.grams, name, X, sums if self.centred else None)
        _add(statistics.sums, name, sums)
        statistics.rows[name] = statistics.rows.get(name, 0) + len(X)
        if self.gradients and x.requires_grad:
            x.register_hook(partial(self.add_weighted, name, module, kind, x.detach(), x._version, mask))

    @torch.no_grad()
    def add_weighted(
        self, name: str, module: nn.Module, kind: LayerKind, x: Tensor, version: int, mask: Tensor | None, h: Tensor
    ) -> None:
        """Add an input to the Gram in which its rows are weighed by the gradients there."""
        if x._version != version:
            return
        statistics = self.statistics
        X, H = (wide_rows(kind.rows(module, tensor), mask) for tensor in (x, h))
        weights = _squares(H).double()
        sums = weights @ X.double()
        add_gram(statistics.weighted_grams, name, X, sums if self.centred else None, weights)
        _add(statistics.weighted_sums, name, sums)
        statistics.weights[name] = statistics.weights.get(name, 0.0) + float(weights.sum())

    def add_gradient(self, name: str, module: nn.Module, kind: LayerKind, x: Tensor, mask: Tensor | None, g: Tensor) -> None:
        """Add a gradient at the output that the module made of x."""
        statistics = self.statistics
        Y = wide_rows(kind.gradient_rows(module, g), None if mask is None else mask.to(g.device))
        add_gram(statistics.output_grams, name, Y)
        squares = (x if mask is None else x[mask]).to(Y.device).double()
        _add(statistics.energies, name, torch.stack([squares @ _squares(Y).double(), squares.sum()]))
        statistics.gradient_rows[name] = statistics.gradient_rows.get(name, 0) + len(Y)

    def _after_encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        self.encoder_output = weakref.ref(output[0])


class _Hook:
    """The forward hook of one module, with the layer that has its geometry."""

    def __init__(self, recorder: Recorder, name: str, kind: LayerKind, layer: nn.Module) -> None:
        self.recorder, self.name, self.kind, self.layer = recorder, name, kind, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        x = args[0] if args else next(iter(kwargs.values()))
        recorder = self.recorder
        mask = recorder.mask_of(module, x)
        if mask is not None and not mask.any():
            return None
        with torch.no_grad():
            recorder.add_input(self.name, self.layer, self.kind, x, mask)
        if not (recorder.gradients and torch.is_grad_enabled()):
            return None
        with torch.no_grad():
            ones = x.new_ones(x.numel(), dtype=torch.float32)
            squares = ones if self.kind.one_hot else _squares(self.kind.rows(self.layer, x))
        output, replaced = _start(output)

        @torch.no_grad()
        def add(g: Tensor) -> None:
            recorder.add_gradient(self.name, self.layer, self.kind, squares, mask, g)

        output.register_hook(add)
        return replaced


def _start(output: Tensor) -> tuple[Tensor, Tensor | None]:
    """An output that gradients flow back to, and what replaces it in the model: they are needed from the first target on."""
    if output.requires_grad or not torch.is_grad_enabled():
        return output, None
    output = output.detach().requires_grad_()
    return output, output.clone()  # a leaf must not be changed in place by what follows


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; inference mode does not count."""
    return 0 if x.is_inference() else x._version


def _squares(X: Tensor) -> Tensor:
    """|x|² of each row, in float32 or wider."""
    return torch.linalg.vector_norm(X, dim=1, dtype=torch.promote_types(X.dtype, torch.float32)).square()


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in totals:
        totals[name] += value
    else:
        totals[name] = value
