"""Statistics of the inputs and of the output gradients of modules, gathered in one pass over the data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from .distributed import check_whole, fails_together, processes
from .evaluation import evaluating, input_device
from .factorized import LayerKind, stored_weight
from .layer import kind_and_layer
from .metrics import device_of_sums, exact
from .sampling import sampled_objective
from .statistics import Statistics, weight_norm
from .targets import matrix_shape

BLOCK = 256  # columns of a Gram matrix that are computed at a time, of which the lower triangle is left out


def gather_statistics(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    *,
    gradients: bool = True,
    seed: int = 0,
    progress: bool = True,
    starts: Iterable[nn.Module] = (),
    first_row: int = 0,
) -> Statistics:
    """Run the model over the batches and gather the statistics of some of its modules.

    Padding, by the attention mask, is left out. Gradients are those of the log-likelihood of labels sampled from the model
    itself: their second moments are the Fisher information. A model without logits is taken as the mean of a normal
    distribution of its last hidden state. Products are float32, sums float64. The model is run in eval mode; mode, gradients
    and hooks are put back as they were.

    Memory: 8 · (2 Σ in² over distinct inputs + Σ out² over modules) bytes, and one batch with its graph.

    In a distributed run every process gives the same batches; process i takes every i-th, and all get the sums. An input that
    the model changes in place before the backward pass has no gradient-weighted Gram.

    Args:
        model: any model that is called as `model(**batch)`.
        modules: of the model, by name, of the known kinds.
        batches: keyword batches; read once.
        gradients: whether to gather second moments of the output gradients too, by a backward pass.
        seed: of the sampled labels, which depend on it and the position in the data only, not on the split into batches.
        progress: whether to show a progress bar.
        starts: modules from whose outputs on gradients flow, beside `modules`: with the same, passes over parts of the
            modules give what one pass over all gives.
        first_row: number of the first row (sequence) of the batches in the whole of the data, where these are a part of it:
            then the statistics of the parts add up to those of the whole.

    Returns:
        The `Statistics`.

    Raises:
        ValueError: there are no batches, the model does not accept one, or a module's inputs or gradients are NaN or infinite;
            or each process of a distributed run has batches of its own.
        RuntimeError: in inference mode, where there are no gradients.
    """
    if gradients and torch.is_inference_mode_enabled():
        raise RuntimeError("calibration needs gradients, which `torch.inference_mode` rules out; leave it, or use `no_grad`.")
    statistics = Statistics(seed=seed, weight_norms={name: weight_norm(module) for name, module in modules.items()})
    world, own = processes()
    check_whole(batches)
    device = input_device(model)
    count = 0
    with fails_together(device), evaluating(model), _frozen(model), ExitStack() as stack:
        recorder = _Recorder(statistics, modules, gradients)
        stack.enter_context(recorder.hooks(model, set(starts) - set(modules.values())))
        bar = tqdm(batches, desc="Calibrating", unit="batch", delay=1, disable=None if progress and own == 0 else True)
        for index, batch in enumerate(bar):
            count += 1
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"`batches` must hold mappings of keyword arguments, got a {type(batch).__name__} as batch {index}."
                )
            if index % world == own:
                recorder.run(model, send_to_device(dict(batch), device), index, first_row, seed)
            first_row += _batch_size(batch)
        if count == 0:
            raise ValueError("`batches` must hold at least one batch, got none; a generator can be read only once.")
    if gradients:
        statistics.predictions = dict.fromkeys(modules, recorder.predictions)
    if world > 1:
        _reduce(statistics, modules, gradients)
    for name in modules.keys() - statistics.output_grams.keys() if gradients else ():  # no gradient came back
        module = modules[name]
        size = matrix_shape(module)[0]
        statistics.output_grams[name], statistics.energies[name] = _zeros(module, size, size), _zeros(module, 2)
        statistics.gradient_rows[name] = 0
    for gram in (*statistics.grams.values(), *statistics.weighted_grams.values(), *statistics.output_grams.values()):
        if gram.ndim == 2:
            mirror(gram)
    return statistics


class _InputError(ValueError):
    """Of a hook, to be told as it is, and not as one of the model."""


class _Recorder:
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

    def __init__(self, recorder: _Recorder, name: str, kind: LayerKind, layer: nn.Module) -> None:
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


def wide_rows(X: Tensor, mask: Tensor | None) -> Tensor:
    """The rows that count, in float32 or wider, where they can be added up in float64."""
    X = X if mask is None else X[mask]
    return X.to(device_of_sums(X.device), torch.promote_types(X.dtype, torch.float32))


def _zeros(module: nn.Module, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device_of_sums(stored_weight(module).device))


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in totals:
        totals[name] += value
    else:
        totals[name] = value


def add_gram(
    totals: dict[str, Tensor], name: str, X: Tensor, sums: Tensor | None = None, weights: Tensor | None = None
) -> None:
    """Add Σ w x xᵀ, float64, in the blocks on and above the diagonal; the weights w, shape (rows,), float64, are 1 if None.

    With `sums`, Σ w x in float64, x − c is multiplied, with c near the mean, and the rest added in float64: then the rounding
    of float32 products is relative to the variance of a channel and not to its mean square.
    """
    if name not in totals:
        totals[name] = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
    if not len(X):
        return
    total = totals[name]
    if sums is not None:
        whole = len(X) if weights is None else weights.sum()
        centre = (sums / (whole if weights is None else whole.clamp(min=1e-300))).to(X.dtype)
        c = centre.double()
        s = sums - whole * c  # of w (x − c), before that is rounded
        X = X - centre
    if weights is not None:
        X = X * weights.sqrt().to(X)[:, None]
    for start in range(0, len(total), BLOCK):
        rows = slice(start, start + BLOCK)
        total[rows, start:] += cross_product(X[:, rows], X[:, start:])
        if sums is not None:
            total[rows, start:] += torch.outer(c[rows], whole * c[start:] + s[start:]) + torch.outer(s[rows], c[start:])


def mirror(gram: Tensor) -> None:
    """Fill in the lower triangle of what `add_gram` added up."""
    for start in range(0, len(gram), BLOCK):
        end = start + BLOCK
        block = gram[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).mT)
        gram[end:, start:end] = gram[start:end, end:].mT


def cross_product(Y: Tensor, X: Tensor) -> Tensor:
    """Σ y xᵀ over rows, in the dtype of the rows and at its full precision."""
    with _full_precision(X.device):
        return Y.mT @ X


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products as such: neither half precision (autocast) nor TF32 or bfloat16 in their place."""
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]  # since PyTorch 2.9
    before = [backend.fp32_precision for backend in backends] or torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if not backends:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=False):
            backend.fp32_precision = value
        if not backends:
            torch.set_float32_matmul_precision(before)


def fitting_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask (sequences, positions), flattened, where an input has these positions; else None."""
    positions = x.shape[:-1] if x.is_floating_point() else x.shape
    fits = mask is not None and tuple(positions) in (tuple(mask.shape), (mask.numel(),))
    return mask.flatten().to(x.device) if fits else None


def padding_masks(batch: Mapping[str, Any], encoder_decoder: bool) -> tuple[Tensor | None, Tensor | None]:
    """What is no padding in the inputs of the model, or of its encoder, and in those of its decoder; None: all."""

    def as_bool(name: str) -> Tensor | None:
        mask = batch.get(name)
        return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None

    target = as_bool("decoder_attention_mask") if encoder_decoder else None
    if encoder_decoder and target is None and isinstance(batch.get("labels"), Tensor):
        target = batch["labels"] != -100
    source, target = (None if mask is None or mask.all() else mask for mask in (as_bool("attention_mask"), target))
    return source, target


def _batch_size(batch: Mapping[str, Any]) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Gradients flow through the model, and none is kept for its parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _reduce(statistics: Statistics, modules: Mapping[str, nn.Module], gradients: bool) -> None:
    """Add up the statistics of all processes, in each of them."""
    names = list(modules)
    device = stored_weight(next(iter(modules.values()))).device

    def total(value: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        dist.all_reduce(value, op)
        return value

    def sum_up(totals: dict[str, Tensor], name: str, *shape: int) -> None:
        totals[name] = total(totals[name].contiguous() if name in totals else _zeros(modules[name], *shape))

    def count(counts: dict[str, float], name: str, dtype: torch.dtype = torch.int64) -> None:
        counts[name] = total(torch.tensor(counts.get(name, 0), dtype=dtype, device=device)).item()

    leaders = torch.tensor([names.index(statistics.inputs[n]) if n in statistics.inputs else -1 for n in names], device=device)
    lowest = total(torch.where(leaders < 0, len(names), leaders), dist.ReduceOp.MIN)
    highest = total(leaders.clone(), dist.ReduceOp.MAX)
    for name, low, high in zip(names, lowest.tolist(), highest.tolist(), strict=True):
        if high < 0:
            continue
        if low != high:
            raise ValueError(
                f"{name}: it shares its input with different modules in different batches; give batches of one kind."
            )
        statistics.inputs[name] = names[high]
    for name in dict.fromkeys(statistics.inputs[n] for n in names if n in statistics.inputs):
        module = modules[name]
        size, one_hot = matrix_shape(module)[1], kind_and_layer(module)[0].one_hot
        sum_up(statistics.grams, name, *((size,) if one_hot else (size, size)))
        sum_up(statistics.sums, name, size)
        count(statistics.rows, name)
        if not gradients or one_hot:
            continue
        count(statistics.weights, name, torch.float64)
        sum_up(statistics.weighted_grams, name, size, size)
        sum_up(statistics.weighted_sums, name, size)
        if not statistics.weights[name] > 0:
            del statistics.weights[name], statistics.weighted_grams[name], statistics.weighted_sums[name]
    for name, module in modules.items() if gradients else ():
        size = matrix_shape(module)[0]
        sum_up(statistics.output_grams, name, size, size)
        sum_up(statistics.energies, name, 2)
        count(statistics.gradient_rows, name)
        count(statistics.predictions, name)
