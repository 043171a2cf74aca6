"""The hooks that add statistics up."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..layers.experts import routed_rows
from ..layers.kinds import LayerKind
from ..layers.wrapper import features, kind_and_layer
from ..numerics.grams import add_gram, wide_rows
from ..numerics.metrics import exact
from ..runtime.batches import REFUSALS, fitting_mask, padding_masks, rows_in
from ..runtime.memory import return_freed
from ..runtime.modules import encoder_of, without_cache
from .given import Objective
from .heads import HeldBack
from .sampling import predicting_tensors, sampled_objective
from .statistics import Statistics
from .sums import InputSums, OutputSums, WeightedSums


class _InputError(ValueError):
    """Of a hook, to be told as it is, and not as one of the model."""


@dataclass(frozen=True)
class _ReadInput:
    """A tensor that a module has read in the running pass, as it was then."""

    tensor: weakref.ref[Tensor]
    version: int
    reader: str

    def is_still(self, x: Tensor) -> bool:
        """Whether another module reads the same values: the same tensor, not changed in place since."""
        return self.tensor() is x and self.version == _version(x)


class Recorder:
    """Adds up the statistics in hooks of the modules.

    Args:
        statistics: filled in place; lower triangles of Gram matrices are left out.
        modules: by name, of the known kinds.
        gradients: whether to add up what a backward pass brings, too.
        heads: by the name of an embedding among the modules, the heads that its matrix serves, too.
        objective: (model, batch) → the loss summed over the batch, or logits; None: the model is called with the batch.

    Attributes:
        gradient_tokens: labels sampled so far.
    """

    def __init__(
        self,
        statistics: Statistics,
        modules: Mapping[str, nn.Module],
        gradients: bool,
        heads: Mapping[str, Sequence[nn.Module]] | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.statistics, self.modules, self.gradients = statistics, modules, gradients
        self.heads, self.objective = heads or {}, objective
        self.gradient_tokens = 0
        # Where a bias is moved, the covariance E[x xᵀ] − E[x] E[x]ᵀ is wanted, and of a channel of large mean float32 products
        # would leave rounding only. So Gram matrices are added up about the mean, for which sums are kept along. Who shares
        # an input is known only while the model runs, so that one module with a bias makes this so for all.
        self.centred = any(getattr(module, "bias", None) is not None for module in modules.values())
        # By the identity of the tensor, which tells that q, k and v share one, in any model. An identity can go to another
        # tensor once this one is gone, and a tensor can be changed in place between two readers: the weak reference and
        # the version tell.
        self.inputs_read: dict[tuple[int, tuple[Any, ...]], _ReadInput] = {}
        # A module that is called several times in a pass may share some of its inputs only, and then has sums of its own.
        self.reads_in_pass: Counter[str] = Counter()
        self.diverged: set[str] = set()
        self.alone: set[str] = set()
        self.is_first = True
        self.head: HeldBack | None = None
        self.source_mask: Tensor | None = None
        self.target_mask: Tensor | None = None
        self.encoder_output: weakref.ref[Tensor] | None = None
        self.inside_encoder: set[nn.Module] = set()

    @contextmanager
    def hooks(self, model: nn.Module, starts: set[nn.Module]) -> Iterator[None]:
        """Within this block the modules' inputs and gradients are added up; gradients flow on from `starts` too."""
        encoder = encoder_of(model)
        self.head = HeldBack.of(model, {*self.modules.values(), *starts, *chain.from_iterable(self.heads.values())})
        handles = []
        try:
            if encoder is not None:
                self.inside_encoder = set(encoder.modules())
                handles.append(encoder.register_forward_hook(self._after_encoder))
            for name, module in self.modules.items():
                handles.append(module.register_forward_hook(_Hook(self, name, *kind_and_layer(module)), with_kwargs=True))
            for name, heads in self.heads.items():
                handles += [head.register_forward_hook(partial(self._at_head, name), with_kwargs=True) for head in heads]
            handles += [module.register_forward_hook(lambda module, args, output: _start(output)[1]) for module in starts]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, model: nn.Module, batch: dict[str, Any], index: int, first_row: int, seed: int) -> None:
        """One batch: forward and, for gradients, backward.

        The first is run again where it shows that modules share no inputs after all, or that logits cannot be held back.
        """
        self.run_as(batch, index, lambda: self.run_once(model, batch, index, first_row, seed))

    def run_as(self, batch: Mapping[str, Any], index: int, run: Callable[[], bool]) -> None:
        """One batch of the model, or of a part of it, which `run` takes forward and, for gradients, backward.

        Args:
            batch: keywords of the model, which say what is padding.
            index: its number, for messages.
            run: returns whether its pass counts; one that does not leaves sums behind, and is done again.
        """
        while not self._counts(batch, index, run) or self.diverged:
            self.alone |= self.diverged
            for sums in (self.statistics.inputs, self.statistics.outputs, self.statistics.reads):
                sums.clear()
            self.gradient_tokens = 0
        self.is_first = False
        return_freed()  # what is left of the graph, between sums and pieces of other sizes, is a fifth of the next one's memory

    def _counts(self, batch: Mapping[str, Any], index: int, run: Callable[[], bool]) -> bool:
        """One pass, and whether it counts. One that does not leaves sums behind that are to be thrown away."""
        self.inputs_read.clear()
        self.reads_in_pass.clear()
        self.diverged.clear()
        self.source_mask, self.target_mask = padding_masks(batch, bool(self.inside_encoder))
        if not run():
            return False
        for name, leader in self.statistics.reads.items():
            if self.reads_in_pass[name] != self.reads_in_pass[leader]:
                self._part(name, leader)
        for name, of_input in self.statistics.inputs.items():
            if not torch.isfinite(of_input.sum).all():
                raise ValueError(
                    f"{name}: its inputs hold NaN or infinite values in batch {index}; repair the model or its data."
                )
        for name, of_output in self.statistics.outputs.items():
            if not torch.isfinite(of_output.energies).all():
                raise ValueError(f"{name}: the gradients at its output are NaN or infinite in batch {index}.")
        return True

    def run_once(self, model: nn.Module, batch: dict[str, Any], index: int, first_row: int, seed: int) -> bool:
        """A pass of the whole model, for `run_as`, and whether it counts."""
        # With labels a model computes its loss of the logits itself.
        head = None if "labels" in batch or self.objective is not None else self.head
        with torch.set_grad_enabled(self.gradients), nullcontext() if head is None else head.hold():
            try:
                keywords = without_cache(model, batch)
                output = model(**keywords) if self.objective is None else self.objective(model, batch)
            except (torch.OutOfMemoryError, _InputError):
                raise
            except REFUSALS as error:
                if self.is_first and head is not None and head.ran:
                    self.head = None
                    return False
                raise ValueError(f"the model does not accept batch {index} ({sorted(batch)}): {error}") from error
        if self.gradients:
            if head is not None and head.ran and not any(head.gives(tensor) for tensor, _ in predicting_tensors(output)):
                if not self.is_first:
                    raise ValueError(f"batch {index}: the model makes its logits in another way than of the batches before.")
                self.head = None
                return False
            rows = self.target_mask if self.inside_encoder else self.source_mask
            with torch.enable_grad():
                objective, gradient_tokens = self._objective(model, output, rows, first_row, seed, batch, head)
            del output  # its logits are not wanted any more, and are large
            if head is not None:
                head.forget()
            self.gradient_tokens += gradient_tokens
            if objective.requires_grad:
                objective.backward()
        return True

    def _objective(
        self,
        model: nn.Module,
        output: Any,
        mask: Tensor | None,
        first_row: int,
        seed: int,
        batch: Mapping[str, Any],
        head: HeldBack | None,
    ) -> tuple[Tensor, int]:
        """What is differentiated, and how many gradient tokens it is of."""
        if self.objective is None:
            return sampled_objective(model, output, mask, first_row, seed, head)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise _InputError(f"`objective` must return a loss or logits, a tensor of floats, got a {type(output).__name__}.")
        if output.ndim == 0:
            return output, rows_in(batch)
        return sampled_objective(model, {"logits": output}, mask, first_row, seed)

    def mask_of(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Which rows of a module's input are no padding, bool, flattened; None: all."""
        of_encoder = self.encoder_output is not None and self.encoder_output() is x
        encodes = not self.inside_encoder or module in self.inside_encoder or of_encoder
        mask = self.source_mask if encodes else self.target_mask
        routed = routed_rows()
        if routed is None or mask is None:
            return fitting_mask(mask, x)
        return mask.flatten().to(x.device)[routed.tokens] if mask.numel() == routed.count else None

    def add_input(self, name: str, module: nn.Module, kind: LayerKind[Any], x: Tensor, mask: Tensor | None) -> None:
        """Add an input to its sums, unless another module has read the same tensor."""
        self.reads_in_pass[name] += 1
        reader = name if name in self.alone else self._reader(name, x, kind.reading(module))
        leader = self.statistics.reads.setdefault(name, reader)
        if leader != reader:
            self._part(name, leader)
        if leader != name:
            return
        if kind.one_hot:
            kept = x.flatten() if mask is None else x.flatten()[mask]
            counts = exact(kind.row_counts(module, kept))
            record = self._input_sums(name, counts, one_hot=True)
            record.gram += counts
            record.sum += counts
            record.rows += kept.numel()
            return
        X = wide_rows(kind.rows(module, x), mask)
        record = self._input_sums(name, X)
        sums = X.sum(0, dtype=torch.float64)
        add_gram(record.gram, X, sums if self.centred else None)
        record.sum += sums
        record.rows += len(X)
        if self.gradients and x.requires_grad:
            x.register_hook(partial(self.add_weighted, name, module, kind, x.detach(), x._version, mask))

    def _reader(self, name: str, x: Tensor, reading: tuple[Any, ...]) -> str:
        """The first module that has read this tensor so in the running pass: the one of this name where none has."""
        key = (id(x), reading)
        read = self.inputs_read.get(key)
        if read is None or not read.is_still(x):
            read = self.inputs_read[key] = _ReadInput(weakref.ref(x), _version(x), name)
        return read.reader

    def _part(self, name: str, leader: str) -> None:
        """Note that two modules do not share all of their inputs; after the first batch, whose sums are gone, an error."""
        if not self.is_first:
            raise _InputError(
                f"{name}: it read the same input as {leader} in one batch and not in another, so that they cannot share "
                "statistics. Give batches of one kind, or target the two in separate runs."
            )
        self.diverged.add(name)

    def _input_sums(self, name: str, rows: Tensor, one_hot: bool = False) -> InputSums:
        """The record of an input, made when its first rows, or their counts, have come."""
        if name not in self.statistics.inputs:
            self.statistics.inputs[name] = InputSums.zeros(rows.shape[-1], rows.device, one_hot)
        return self.statistics.inputs[name]

    @torch.no_grad()
    def add_weighted(
        self, name: str, module: nn.Module, kind: LayerKind[Any], x: Tensor, version: int, mask: Tensor | None, h: Tensor
    ) -> None:
        """Add an input, weighed by the gradients h there, unless it was changed in place since `version`."""
        if x._version != version:
            return
        X, H = (wide_rows(kind.rows(module, tensor), mask) for tensor in (x, h))
        record = self.statistics.inputs[name]
        if record.weighted is None:
            record.weighted = WeightedSums.zeros(X.shape[1], X.device)
        weights = _squares(H).double()
        sums = weights @ X.double()
        add_gram(record.weighted.gram, X, sums if self.centred else None, weights)
        record.weighted.sum += sums
        record.weighted.weight += float(weights.sum())

    def add_gradient(
        self, name: str, module: nn.Module, kind: LayerKind[Any], squares: Tensor, mask: Tensor | None, g: Tensor
    ) -> None:
        """Add a gradient g at the output, which the module made of inputs with these |x|², one for each row."""
        Y = wide_rows(kind.gradient_rows(module, g), None if mask is None else mask.to(g.device))
        if name not in self.statistics.outputs:
            self.statistics.outputs[name] = OutputSums.zeros(Y.shape[1], features(self.modules[name])[1], Y.device)
        record = self.statistics.outputs[name]
        record.add(Y)
        squares = (squares if mask is None else squares[mask]).to(Y.device).double()
        record.energies += torch.stack([squares @ _squares(Y).double(), squares.sum()])

    def _at_head(
        self, name: str, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Add what a head sees to the sums of the embedding whose table it shares.

        It multiplies by the transpose, so that its inputs count as gradients at the embedding's output do, and the squares of
        its gradients as the numbers of times that a token was read: the two uses add up.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        mask = self.mask_of(head, x)
        X = wide_rows(x.detach().flatten(0, -2), mask)
        tokens = output.shape[-1]
        record = self._input_sums(name, X.new_empty(0, tokens), one_hot=True)
        self.statistics.reads.setdefault(name, name)
        record.rows += len(X)
        if not (self.gradients and torch.is_grad_enabled()):
            record.gram += len(X) / tokens
            record.sum += len(X) / tokens
            return None
        output, replaced = _start(output)

        @torch.no_grad()
        def add(g: Tensor) -> None:
            squares = wide_rows(g.flatten(0, -2), None if mask is None else mask.to(g.device)).square()
            of_tokens, of_rows = squares.sum(0, dtype=torch.float64), squares.sum(1).double()
            record.gram += of_tokens
            record.sum += of_tokens
            outputs = self.statistics.outputs.setdefault(name, OutputSums.zeros(X.shape[1], tokens, X.device))
            outputs.add(X)
            outputs.energies += torch.stack([of_rows @ _squares(X).double(), of_rows.sum()])

        output.register_hook(add)
        return replaced

    def _after_encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        first = next((leaf for leaf in tree_leaves(output[0]) if isinstance(leaf, Tensor)), None)
        self.encoder_output = None if first is None else weakref.ref(first)


class _Hook:
    """The forward hook of one module, with the layer that has its geometry."""

    def __init__(self, recorder: Recorder, name: str, kind: LayerKind[Any], layer: nn.Module) -> None:
        self.recorder, self.name, self.kind, self.layer = recorder, name, kind, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        x = args[0] if args else next(iter(kwargs.values()))
        recorder = self.recorder
        mask = recorder.mask_of(module, x) if self.kind.has_positions else None
        if mask is not None and not mask.any():
            return None
        with torch.no_grad():
            recorder.add_input(self.name, self.layer, self.kind, x, mask)
        if not (recorder.gradients and torch.is_grad_enabled()):
            return None
        with torch.no_grad():
            one_hot, count = self.kind.one_hot, x.numel()
            squares = x.new_ones(count, dtype=torch.float32) if one_hot else _squares(self.kind.rows(self.layer, x))
        output, replaced = _start(output)

        @torch.no_grad()
        def add(g: Tensor) -> None:
            recorder.add_gradient(self.name, self.layer, self.kind, squares, mask, g)

        output.register_hook(add)
        return replaced


def _start(output: Tensor) -> tuple[Tensor, Tensor | None]:
    """An output that gradients flow back to, and what replaces it in the model; None: the output itself can stay.

    Weights and inputs need no gradients here, so the graph has to begin at the first target: its output becomes a leaf.
    The model goes on with a copy of the leaf, because what follows may change it in place (`nn.ReLU(inplace=True)`), which
    autograd forbids for leaves; the hook stays on the leaf, and its gradient is that of the output.
    """
    if not torch.is_grad_enabled():
        return output, None
    if output.requires_grad:
        # A change in place of a view, as `F.linear` with a bias gives of three dimensions, would take the place of the view in
        # the graph, and no gradient would come to its hook: the model goes on with the same memory, which is no view of it.
        return output, torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else None
    leaf = output.detach().requires_grad_()
    return leaf, leaf.clone()


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; inference mode does not count."""
    return 0 if x.is_inference() else x._version


def _squares(X: Tensor) -> Tensor:
    """|x|² of each row, in float32 or wider."""
    return torch.linalg.vector_norm(X, dim=1, dtype=torch.promote_types(X.dtype, torch.float32)).square()
