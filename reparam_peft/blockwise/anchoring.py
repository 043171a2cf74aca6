"""What a module of a block sees in the original and in the compressed part, and the matrix that makes up for the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..calibration.statistics import Moments
from ..layers.experts import RoutedRows, routed_rows
from ..layers.kinds import layer_kind
from ..numerics.grams import add_gram, block_rows, cross_product, packed_diagonal, packed_zeros, unpack, wide_rows
from ..numerics.metrics import exact, solve
from .blocks import Call, main_tensor


@dataclass(frozen=True)
class Anchoring:
    """How far matrices are fitted to outputs of the original that the compressed part before them changes.

    A matrix W sees x̂ in place of x. It is replaced by the W' that minimises E‖y − W' x̂‖², with the target
    y = W (β x + (1 − β) x̂) + γ (h − ĥ), where h is the residual stream that the output is added to, if it is to one.

    Attributes:
        original: β, in [0, 1]: 0 fits what W makes of x̂, 1 what the original computes.
        residual: γ, in [0, 1]: how much of the deviation of the residual stream is made up for.

    Source: AA-SVD, arXiv:2604.02119.
    """

    original: float = 0.5
    residual: float = 0.0

    def __post_init__(self) -> None:
        for name in ("original", "residual"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)!r}.")


@dataclass
class Deviation:
    """Sums over rows of a deviation d of the compressed part from the original, and of the inputs x̂ (in,) beside it.

    Attributes:
        cross: Σ d x̂ᵀ, shape (in, in) or (out, in), float64.
        sum: Σ d, shape (in,) or (out,), float64.
    """

    cross: Tensor
    sum: Tensor

    @classmethod
    def between(cls, deviations: int, inputs: int, device: torch.device) -> Deviation:
        """Sums over no rows yet, of deviations and inputs of these sizes."""
        cross = torch.zeros(deviations, inputs, dtype=torch.float64, device=device)
        return cls(cross, cross.new_zeros(deviations))

    def add(self, D: Tensor, X: Tensor) -> None:
        """Add rows D and X, both in float32 or wider, in place."""
        rows = block_rows(D.device)
        for start in range(0, D.shape[1], rows):
            some = slice(start, start + rows)
            self.cross[some] += cross_product(D[:, some], X)
        self.sum += D.sum(0, dtype=torch.float64)


@dataclass(frozen=True)
class Expansion:
    """An estimate of all inputs x (in,) of a module from those k that are left, x̂: these as they are, the others as M x̂ + o.

    Attributes:
        kept: indices of those that are left, shape (k,), ascending.
        gone: indices of the others, shape (in − k,).
        matrix: M, shape (in − k, k).
        offset: o, shape (in − k,); zero unless a bias is moved.
    """

    kept: Tensor
    gone: Tensor
    matrix: Tensor
    offset: Tensor

    def of_rows(self, X: Tensor) -> Tensor:
        """The estimates (n, in) of rows (n, k)."""
        estimates = X.new_empty(len(X), len(self.kept) + len(self.gone))
        estimates[:, self.kept.to(X.device)] = X
        estimates[:, self.gone.to(X.device)] = X @ self.matrix.mT.to(X) + self.offset.to(X)
        return estimates

    def narrowed(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """What a matrix W (out, in) makes of the estimate of x, as a matrix (out, k) of x̂, and what it adds to that, (out,)."""
        of_gone = W[:, self.gone.to(W.device)]
        return W[:, self.kept.to(W.device)] + of_gone @ self.matrix.to(W), of_gone @ self.offset.to(W)


@dataclass
class Observed:
    """Sums over the rows of a module's inputs: x̂ in the compressed part, x in the original.

    Attributes:
        rows: their number.
        gram: Σ x̂ x̂ᵀ of (in, in), packed, float64.
        sum: Σ x̂, shape (in,), float64.
        drift: of x − x̂; None where rows cannot be paired, as those of routed experts, are not compared, or once it is used up.
        residuals: module → of h − ĥ (out,), for those that are added to a residual stream.
    """

    rows: int
    gram: Tensor
    sum: Tensor
    drift: Deviation | None = None
    residuals: dict[str, Deviation] = field(default_factory=dict)

    def moments(self, centred: bool) -> Moments:
        """Moments of the inputs in the compressed part, with their covariance if `centred`, else with E[x̂ x̂ᵀ]."""
        mean = self.sum / self.rows
        gram = unpack(self.gram).div_(self.rows)
        if centred:
            gram.addr_(mean, mean, alpha=-1)
            # Of constant channels only rounding is left, which may be negative.
            gram.diagonal().clamp_(min=1e-14 * (packed_diagonal(self.gram) / self.rows))
        return Moments(gram, mean, self.rows)


def input_groups(block: nn.Module, call: Call, names: Sequence[str]) -> list[list[str]]:
    """Modules of a block that read the same tensor, in the order in which they run; those that do not run come last, alone.

    Args:
        block: in eval mode.
        call: what it is called with.
        names: of modules in the block.

    Returns:
        Groups of names, each of which is in one.
    """
    readers: dict[tuple[int, int], list[str]] = {}
    held: list[Tensor] = []  # so that no identity is used twice

    def hook(name: str, x: Tensor) -> None:
        held.append(x)
        readers.setdefault((id(x), x._version), []).append(name)

    _run(block, call, dict.fromkeys(names, hook))
    in_order = [list(dict.fromkeys(group)) for group in readers.values()]
    placed: set[str] = set()
    for group in in_order:  # a module that runs twice belongs where it ran first
        group[:] = [name for name in group if name not in placed]
        placed.update(group)
    return [group for group in in_order if group] + [[name] for name in names if name not in placed]


def residual_sources(block: nn.Module, call: Call, names: Sequence[str]) -> dict[str, str]:
    """Modules whose output is added to a stream → the module whose input that stream is ("" for the block itself).

    They are told by their numbers, since the sum itself is code of the model that no hook sees: an output y and two tensors
    s and h of the block with s = h + y.

    Args:
        block: in eval mode.
        call: what it is called with.
        names: of modules in the block.
    """
    inputs: list[tuple[str, Tensor]] = []
    outputs: dict[str, tuple[int, Tensor]] = {}

    def hook(name: str, x: Tensor) -> None:
        inputs.append((name, x.detach().clone()))

    def after(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = (len(inputs), output.detach().clone())

        return keep

    with ExitStack() as stack:
        for name in names:
            stack.callback(block.get_submodule(name).register_forward_hook(after(name)).remove)
        result = _run(block, call, {name: hook for name, _ in block.named_modules()})
    final = main_tensor(result)
    sources = {}
    for name, (count, y) in outputs.items():
        later = [s for _, s in inputs[count:] if s.shape == y.shape]
        later += [final] if final.shape == y.shape else []
        for source, h in reversed(inputs[:count]):
            if h.shape == y.shape and h.is_floating_point() and any(_is_sum(s, h, y) for s in later):
                sources[name] = source
                break
    return sources


def _is_sum(s: Tensor, h: Tensor, y: Tensor) -> bool:
    size = y.float().abs().max()
    return bool(size > 0 and (s.float() - h.float() - y.float()).abs().max() <= 0.02 * size)


def observe(
    original: nn.Module,
    compressed: nn.Module,
    calls: Iterable[tuple[Call, Call, Callable[[Tensor], Tensor | None]]],
    group: Sequence[str],
    sources: Mapping[str, str],
    expansion: Expansion | None = None,
    compares: bool = True,
) -> Observed | None:
    """Add up what a group of modules, which share their input, sees in a block and in its compressed copy.

    Args:
        original: the block.
        compressed: its copy, in which the modules of the group are still those of the block.
        calls: for each batch, what the two are called with, and a function that says which rows of an input count, bool, or
            None: all.
        group: names of the modules.
        sources: from `residual_sources`.
        expansion: where the compressed inputs x̂ are but some of them: x is compared with their estimate; None: with x̂.
        compares: whether there are sums of deviations, too, and not of the compressed inputs alone.

    Returns:
        The sums; None where no rows come, or for layers whose rows are one-hot.

    Raises:
        ValueError: an input is NaN or infinite.
    """
    leader = group[0]
    module = original.get_submodule(leader)
    kind = layer_kind(module)
    if kind.one_hot:
        return None
    centred = getattr(module, "bias", None) is not None
    observed: Observed | None = None
    streams = {name: sources[name] for name in group if name in sources}
    for call, call_compressed, mask in calls:
        names = [*dict.fromkeys(streams.values()), leader]
        inputs = _inputs(original, call, names)[0] if compares else {}
        inputs_compressed, routed = _inputs(compressed, call_compressed, names)
        if leader not in inputs_compressed:
            continue
        x = inputs_compressed[leader]
        rows = mask(x) if routed is None else _rows_of_expert(mask(x.new_empty(routed.count, 1)), routed)
        rows = rows if kind.has_positions else None
        X = wide_rows(kind.rows(module, x), rows)
        if not torch.isfinite(X).all():
            raise ValueError("its inputs in the compressed model are NaN or infinite; raise `keep`.")
        if not len(X):
            continue
        if observed is None:
            total = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device)
            observed = Observed(rows=0, gram=packed_zeros(X.shape[1], X.device), sum=total)
        sums = X.sum(0, dtype=torch.float64)
        add_gram(observed.gram, X, sums if centred else None)
        observed.rows += len(X)
        observed.sum += sums
        if leader not in inputs or not _paired(inputs[leader], x, call_compressed):
            continue
        D = wide_rows(kind.rows(module, inputs[leader]), rows) - (X if expansion is None else expansion.of_rows(X))
        if observed.drift is None:
            observed.drift = Deviation.between(D.shape[1], X.shape[1], X.device)
        observed.drift.add(D, X)
        for name, source in streams.items():
            h, h_compressed = (kind.gradient_rows(module, stream[source]) for stream in (inputs, inputs_compressed))
            H = wide_rows((h - h_compressed).detach(), rows)
            if len(H) == len(X):
                if name not in observed.residuals:
                    observed.residuals[name] = Deviation.between(H.shape[1], X.shape[1], X.device)
                observed.residuals[name].add(H, X)
    return observed


def anchored(
    W: Tensor,
    bias: Tensor | None,
    name: str,
    observed: Observed,
    gram: Tensor,
    anchoring: Anchoring,
    expansion: Expansion | None = None,
    used_up: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The matrix that takes the place of W, and with a bias the mean of the outputs that are to be fitted.

    W̃ = W + (β W D + γ R) Ĝ⁻¹ with D = E[(x − x̂) x̂ᵀ] and R = E[(h − ĥ) x̂ᵀ], all about the means where there is a bias: the
    regression of y on x̂, whose residual no W' can lower, so that E‖y − W' x̂‖² is least where ‖(W̃ − W') Ĝ^½‖² is.

    Args:
        W: shape (out, in).
        bias: of the module, shape (out,); None: none that is moved.
        name: of the module within its block.
        observed: what the group of the module saw, from `observe`.
        gram: Ĝ, shape (in, in), float64, shrunk, about the mean where there is a bias; of a singular one, as of inputs that are
            all zero, the pseudo-inverse is taken.
        anchoring: β and γ.
        expansion: of x̂, as for `observe`: what W makes of that estimate takes the place of W, and D is of x less the estimate.
        used_up: whether no other module needs the sums of deviations, which then leave `observed` before the solution is made.

    Returns:
        W̃ (out, in), or (out, k), float64, and E[y] (out,), float64, or None.
    """
    W = exact(W)
    start, added = (W, W.new_zeros(len(W))) if expansion is None else expansion.narrowed(W)
    mean = observed.sum / observed.rows
    target = start.new_zeros(start.shape)
    offset = start @ mean + added
    for weight, deviation, left in (
        (anchoring.original, observed.drift, W),
        (anchoring.residual, observed.residuals.get(name), None),
    ):
        if not weight or deviation is None:
            continue
        if left is None:
            target.add_(deviation.cross, alpha=weight / observed.rows)
            average = deviation.sum / observed.rows
        else:
            target.addmm_(left, deviation.cross, alpha=weight / observed.rows)
            average = left @ deviation.sum / observed.rows
        if bias is not None:
            target.addr_(average, mean, alpha=-weight)
        offset += weight * average
    del W  # in float64, and where there is an expansion as large as the solution
    if used_up:
        observed.drift = None
        observed.residuals.clear()
    found = start + solve(gram, target.mT).mT
    return found, None if bias is None else offset + exact(bias).to(offset.device)


class _Stop(Exception):
    """The last input that is wanted is there."""


def _run(block: nn.Module, call: Call, hooks: Mapping[str, Callable[[str, Tensor], None]]) -> Any:
    """Run a block; hooks get the first tensor that their module is called with."""

    def bind(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)), None)
            if x is not None:
                hooks[name](name, x)

        return before

    with ExitStack() as stack, torch.no_grad():
        for name in hooks:
            hook = block.get_submodule(name).register_forward_pre_hook(bind(name), with_kwargs=True)
            stack.callback(hook.remove)
        args, kwargs = call
        return block(*args, **kwargs)


def _inputs(block: nn.Module, call: Call, names: Sequence[str]) -> tuple[dict[str, Tensor], RoutedRows | None]:
    """First inputs of modules, the last of which ends the run; and of that, if it is an expert, the rows that it was given."""
    inputs: dict[str, Tensor] = {}
    routed: list[RoutedRows | None] = []

    def hook(name: str, x: Tensor) -> None:
        inputs[name] = x.detach() if name == names[-1] else x.detach().clone()
        if name == names[-1]:
            routed.append(routed_rows())
            raise _Stop

    with suppress(_Stop):
        _run(block, call, dict.fromkeys(names, hook))
    return inputs, routed[0] if routed else None


def _rows_of_expert(of_all: Tensor | None, routed: RoutedRows) -> Tensor | None:
    """Which rows of an expert's input count, bool, of those rows that it was given of all; None: all."""
    return None if of_all is None else of_all[routed.tokens.to(of_all.device)]


def _paired(x: Tensor, other: Tensor, call: Call) -> bool:
    """Whether rows of the same number are of the same token: not where tokens are routed, as to experts."""
    tensors = [leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, Tensor) and leaf.ndim]
    states = [tensor.shape[:-1] for tensor in tensors if tensor.is_floating_point()]
    tokens = next(iter([*states, *(tensor.shape for tensor in tensors)]))  # a block that has only token ids embeds them itself
    whole = x.shape[0] == tokens[0] if x.ndim > 2 or len(tokens) == 1 else len(x) == tokens.numel()
    return x.shape[:-1] == other.shape[:-1] and whole
