"""Plans: which rank each target gets, what that stores, and what it is predicted to cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import check_names, check_text, is_finite, is_int
from ..config.reparam_config import ReparamConfig
from ..display.axes import grid_of, heat_map
from ..display.tables import html_table
from ..layers.neuron_groups import NeuronGroup
from ..numerics.storage import Storage
from ..runtime.files import write_whole
from ..runtime.json_files import read_json
from .neuron_plan import NeuronPlan, read_neuron_plan
from .neurons import Allotment

FORMAT = "reparam_peft plan 1"


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one target.

    Attributes:
        name: of the module.
        shape: (out, in) of its matrix.
        rank: of its product; None: it stays dense. Full rank where neurons are left out: what is left of it stays as it is.
        stored_parameters: numbers in a checkpoint, or out · in for a dense one.
        predicted_loss: predicted increase of the loss, nats per token; None without statistics.
        spectrum: what each direction of the factorisation is predicted to cost, nats per token, as `direction_losses` gives
            it: rank r loses the sum of all but the first r. Empty without statistics.
        size: (out, in) of what is left of the matrix where neurons are left out; None: all of it.
        tokens: rows of its input that calibration saw, of an expert those that it was given; None: not known.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    stored_parameters: int
    predicted_loss: float | None = None
    spectrum: tuple[float, ...] = field(default=(), repr=False)
    size: tuple[int, int] | None = None
    tokens: int | None = None

    @property
    def dense_parameters(self) -> int:
        """out · in."""
        return self.shape[0] * self.shape[1]

    @property
    def effective_rank(self) -> float:
        """How many directions count: exp of the entropy of the spectrum (Roy & Vetterli 2007); 0 without one."""
        total = sum(self.spectrum)
        parts = [value / total for value in self.spectrum] if total else []
        return math.exp(-sum(part * math.log(part) for part in parts if part > 0)) if parts else 0.0

    def energy(self, rank: int) -> float:
        """The fraction of the spectrum that the first `rank` directions hold, in [0, 1]; 1 where there is nothing to lose."""
        total = sum(self.spectrum)
        return sum(self.spectrum[:rank]) / total if total else 1.0


@dataclass(frozen=True)
class Plan:
    """The ranks of all targets under one budget. `print(plan)` shows it as a table.

    Attributes:
        modules: one entry per target.
        keep: the fraction of the targeted parameters that was asked for.
        method: how the matrices are factorised.
        allocation: how the ranks were chosen.
        form: how the products are stored.
        moved_bias: whether biases are stored along.
        calibration_tokens: input rows that the statistics were taken of.
        gradient_tokens: labels sampled for the gradients.
        seed: of the labels.
        ceiling: the most that was to be stored of a matrix, as a fraction; None: 1.
        neurons: the MLPs that lose neurons.
        unreached: names of modules that were left out, because no batch reached them.
    """

    modules: tuple[ModulePlan, ...]
    keep: float
    method: str
    allocation: str
    form: str
    moved_bias: bool = False
    calibration_tokens: int = 0
    gradient_tokens: int = 0
    seed: int = 0
    ceiling: float | None = None
    neurons: tuple[NeuronPlan, ...] = ()
    unreached: tuple[str, ...] = ()

    @property
    def dense_parameters(self) -> int:
        """Parameters of the targeted matrices."""
        return sum(module.dense_parameters for module in self.modules)

    @property
    def stored_parameters(self) -> int:
        """Numbers stored for them, dense ones included."""
        return sum(module.stored_parameters for module in self.modules)

    @property
    def predicted_loss(self) -> float | None:
        """Predicted increase of the loss, nats per token: the sum over the modules, and over the MLPs that lose neurons."""
        losses = [module.predicted_loss for module in self.modules if module.predicted_loss is not None]
        neurons = sum(planned.predicted_loss for planned in self.neurons)
        return sum(losses) + neurons if len(losses) == len(self.modules) else None

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module, without the dense ones."""
        return {module.name: module.rank for module in self.modules if module.rank is not None}

    @property
    def dense_modules(self) -> list[str]:
        """Names of the targets that stay dense."""
        return [module.name for module in self.modules if module.rank is None]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            OSError: writing failed. An earlier file is as it was.
        """
        write_whole(path, json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no plan, or a field of it is wrong.
        """
        fields = read_json(path)
        try:
            return cls.from_dict(fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} does not hold a plan: {error}") from error

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` gave.

        Raises:
            ValueError: another format, or a field is missing, unknown or wrong.
        """
        fields = dict(fields)
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f"`format` must be {FORMAT!r}.")
        try:
            neurons = tuple(map(read_neuron_plan, fields.pop("neurons", ())))
            unreached = fields.pop("unreached", [])
            check_names("unreached", unreached)
            plan = cls(tuple(map(_module_plan, fields.pop("modules"))), **fields, neurons=neurons, unreached=tuple(unreached))
            _check_sizes(plan)
            words: dict[str, Any] = {"method": plan.method, "allocation": plan.allocation, "form": plan.form}
            ReparamConfig(  # which checks them
                **words,
                keep=plan.keep,
                moved_bias=plan.moved_bias,
                calibration_tokens=plan.calibration_tokens,
                gradient_tokens=plan.gradient_tokens,
                seed=plan.seed,
                ceiling=plan.ceiling,
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"a field is missing, unknown or wrong: {error}") from error
        required = (plan.method, plan.allocation, plan.form, plan.calibration_tokens, plan.gradient_tokens, plan.seed)
        if None in required or len({module.name for module in plan.modules}) < len(plan.modules):
            raise ValueError("a field is missing, or a module is there twice.")
        return plan

    def check_fits(
        self,
        shapes: Mapping[str, tuple[int, int]],
        config: ReparamConfig,
        prescribed: Mapping[str, int | None],
        has_bias: bool,
    ) -> None:
        """Raise `ValueError` unless the plan is of these targets, and a config asks for nothing else.

        Args:
            shapes: (out, in) of each target.
            config: with the plan's choices where it makes none.
            prescribed: ranks that the config gives.
            has_bias: whether any target has a bias.
        """
        planned = {module.name: module.shape for module in self.modules}
        for name in shapes.keys() ^ planned.keys():
            raise ValueError(f"{name}: it is in the plan or among the targets, but not in both; the plan is of other targets.")
        for name, shape in shapes.items():
            if planned[name] != shape:
                raise ValueError(f"{name}: the plan is for a shape of {planned[name]}, and the weight is {shape}.")
        for choice in ("form", "allocation", "keep", "ceiling"):
            if getattr(self, choice) != getattr(config, choice):
                raise ValueError(
                    f"`plan` is for `{choice}={getattr(self, choice)!r}`, and the config says {getattr(config, choice)!r}; "
                    "leave it out of the config, or make a plan with it."
                )
        if has_bias and self.moved_bias != config.moved_bias:
            raise ValueError(
                f"`plan` is for `method={self.method!r}`, and the config says {config.method!r}, which stores other biases."
            )
        for name, rank in prescribed.items():
            if self.ranks.get(name) != rank:
                raise ValueError(
                    f"{name}: the config says rank {rank}, and the plan {self.ranks.get(name)}; leave `r`, `rank_pattern` and "
                    "`dense_modules` out of the config, or make a plan with them."
                )

    def check_neurons(self, neurons: bool | None) -> None:
        """Raise `ValueError` where a config says otherwise of neurons, or it is not known of which MLP some are left out.

        Args:
            neurons: whether the config has MLPs lose neurons; None: either way.
        """
        if neurons is not None and neurons != bool(self.neurons):
            lose = "lose" if self.neurons else "keep"
            raise ValueError(f"`plan` has MLPs {lose} neurons, and the config says `neurons={neurons}`; leave it out.")
        members = {name for planned in self.neurons for name in planned.group.names}
        unknown = [module.name for module in self.modules if module.size is not None and module.name not in members]
        if unknown:
            raise ValueError(f"{unknown[0]}: the plan does not say to which MLP its neurons belong; make one with `plan`.")

    def resistant(self, count: int = 10) -> list[ModulePlan]:
        """The targets that resist compression most: those whose effective rank is the largest part of their full rank."""
        return sorted(self.modules, key=lambda module: -module.effective_rank / min(module.shape))[:count]

    def plot(self, axes: Any = None) -> Any:
        """What is kept of each target, a heat map over depth; on matplotlib's axes, or new ones, which are returned."""
        return plot_plan(self, axes)

    @property
    def is_routed(self) -> bool:
        """Whether some of the targets saw fewer tokens than others, as experts do; then tables say how many."""
        return len({module.tokens for module in self.modules} - {None}) > 1

    def _repr_html_(self) -> str:
        head = ("module", "shape", "rank", "stored", "kept", "predicted loss", "effective rank")
        rows = [head, *((m.name, *_cells(m)) for m in self.modules)]
        if self.is_routed:
            rows = [(*row, tokens) for row, tokens in zip(rows, ("tokens", *map(_tokens, self.modules)), strict=True)]
        return html_table(rows, str(self).rpartition("\n")[2])

    def __str__(self) -> str:
        width = max([len(module.name) for module in self.modules] + [6])
        tokens = f"  {'tokens':>9}" if self.is_routed else ""
        lines = [f"{'module':{width}}  {'shape':>19}  {'rank':>5}  {'stored':>12}  {'kept':>6}  {'loss':>9}{tokens}"]
        for module in self.modules:
            shape, rank, stored, fraction, loss, _ = _cells(module)
            tokens = f"  {_tokens(module):>9}" if self.is_routed else ""
            lines.append(f"{module.name:{width}}  {shape:>19}  {rank:>5}  {stored:>12}  {fraction:>6}  {loss:>9}{tokens}")
        kept = self.stored_parameters / self.dense_parameters if self.dense_parameters else 1.0
        total = "" if self.predicted_loss is None else f", predicted loss +{self.predicted_loss:.4f} nats per token"
        neurons = f"{self.neurons_left}; " if self.neurons else ""
        lines.append(
            f"{self.stored_parameters:,} of {self.dense_parameters:,} parameters stored ({kept:.2%}), "
            f"{len(self.dense_modules)} of {len(self.modules)} matrices dense; {neurons}{self.method}, "
            f"{self.allocation}, {self.form}{total}"
        )
        return "\n".join(lines)

    @property
    def neurons_left(self) -> str:
        """How many neurons stay of the MLPs that lose some, in words; empty where none does."""
        if not self.neurons:
            return ""
        kept, total = sum(p.kept for p in self.neurons), sum(p.group.neurons for p in self.neurons)
        return f"{kept:,} of {total:,} neurons of {len(self.neurons)} MLPs stay"


def _cells(module: ModulePlan) -> tuple[str, ...]:
    """What the tables say of a target."""
    return (
        " x ".join(map(str, module.shape)) if module.size is None else _left(module.shape, module.size),
        _rank(module),
        f"{module.stored_parameters:,}",
        f"{module.stored_parameters / module.dense_parameters:.1%}",
        "" if module.predicted_loss is None else f"{module.predicted_loss:.2e}",
        f"{module.effective_rank:.0f}" if module.spectrum else "",
    )


def _tokens(module: ModulePlan) -> str:
    return "" if module.tokens is None else f"{module.tokens:,}"


def _rank(module: ModulePlan) -> str:
    """The rank, or "dense" where there is no product: of the whole matrix, or of what is left of it."""
    is_whole = module.rank is None or (module.size is not None and module.rank == min(module.size))
    return "dense" if is_whole else str(module.rank)


def _left(shape: tuple[int, int], size: tuple[int, int]) -> str:
    """What is left of a shape, "of" what there was.

    >>> _left((160, 64), (96, 64))
    '96 of 160 x 64'
    """
    return " x ".join(f"{left}" if left == whole else f"{left} of {whole}" for left, whole in zip(size, shape, strict=True))


def _module_plan(entry: Mapping[str, Any]) -> ModulePlan:
    shape, rank, spectrum = tuple(entry["shape"]), entry["rank"], tuple(entry["spectrum"])
    check_text("name", entry["name"])
    if len(shape) != 2 or not all(is_int(size) and size > 0 for size in shape):
        raise ValueError(f"{entry['name']}: `shape` must be two positive ints, got {shape!r}.")
    if rank is not None and not (is_int(rank) and 1 <= rank <= min(shape)):
        raise ValueError(f"{entry['name']}: `rank` must be None or in [1, {min(shape)}], got {rank!r}.")
    stored, lost = entry["stored_parameters"], entry["predicted_loss"]
    if not is_int(stored) or stored < 1:
        raise ValueError(f"{entry['name']}: `stored_parameters` must be a positive int, got {stored!r}.")
    tokens = entry.get("tokens")
    if tokens is not None and not (is_int(tokens) and tokens >= 0):
        raise ValueError(f"{entry['name']}: `tokens` must be a count or None, got {tokens!r}.")
    losses = [*spectrum, *([] if lost is None else [lost])]
    if not (all(map(is_finite, losses)) and math.isfinite(sum(map(abs, losses))) and len(spectrum) <= min(shape)):
        raise ValueError(
            f"{entry['name']}: `predicted_loss` and `spectrum` must be finite numbers, at most {min(shape)} of them."
        )
    size = entry.get("size")
    return ModulePlan(**{**entry, "shape": shape, "spectrum": spectrum, "size": None if size is None else tuple(size)})


def _check_sizes(plan: Plan) -> None:
    """Raise `ValueError` unless modules have the sizes that the numbers of neurons give them."""
    shapes = {module.name: module.shape for module in plan.modules}
    for planned in plan.neurons:
        missing = sorted(set(planned.group.names) - shapes.keys())
        if missing:
            raise ValueError(f"{planned.consumer}: modules {missing} of its MLP are not in the plan.")
    sizes = {name: size for planned in plan.neurons for name, size in planned.sizes(shapes).items()}
    for module in plan.modules:
        size = module.size
        fits = size is not None and len(size) == 2 and all(map(is_int, size))
        if size is not None and fits:
            fits = all(1 <= left <= whole for left, whole in zip(size, module.shape, strict=True))
        if (size is not None and not fits) or (module.name in sizes and sizes[module.name] != size):
            raise ValueError(f"{module.name}: `size` does not fit the shape {module.shape}, or the neurons, got {size}.")
        if size is not None and (module.rank is None or module.rank > min(size)):
            raise ValueError(f"{module.name}: `rank` must be in [1, {min(size)}] by its `size`, got {module.rank}.")


def make_plan(
    config: ReparamConfig,
    keep: float,
    storages: Mapping[str, Storage],
    allotment: Allotment,
    losses: Mapping[str, Tensor],
    mlps: Mapping[str, NeuronGroup],
    *,
    tokens: Mapping[str, int] | None = None,
    calibration_tokens: int = 0,
    gradient_tokens: int = 0,
    seed: int = 0,
    unreached: Sequence[str] = (),
) -> Plan:
    """The plan of these ranks.

    Args:
        config: with its choices resolved.
        keep: the size that was asked for.
        storages: what each target's product takes.
        allotment: ranks of the targets, and the MLPs that lose neurons.
        losses: what each direction of each target costs, nats per token; empty where that is not known.
        mlps: the MLPs, by consumer.
        tokens: rows of the input of each target that calibration saw; None where that is not known.
        calibration_tokens, gradient_tokens, seed: of the statistics.
        unreached: names of modules that were left out.
    """
    if config.method is None or config.allocation is None or config.form is None:
        raise ValueError("`config` must have its `method`, `allocation` and `form` resolved.")

    narrowed: dict[str, tuple[Storage, Tensor]] = {}
    for option in allotment.neurons.values():
        narrowed |= {name: (option.storages[name], option.losses[name]) for name in option.storages}

    def modules() -> Iterable[ModulePlan]:
        for name, rank in allotment.ranks.items():
            storage, spectrum = narrowed.get(name, (storages[name], losses.get(name)))
            lost = None
            if spectrum is not None:
                lost = 0.0 if rank is None else float(spectrum[rank:].sum())
            values = () if spectrum is None else tuple(spectrum.tolist())
            seen = None if tokens is None else tokens.get(name)
            yield ModulePlan(name, storage.whole_shape, rank, storage.stored(rank), lost, values, storage.size, seen)

    return Plan(
        modules=tuple(modules()),
        keep=keep,
        method=config.method,
        allocation=config.allocation,
        form=config.form,
        moved_bias=config.moved_bias,
        calibration_tokens=calibration_tokens,
        gradient_tokens=gradient_tokens,
        seed=seed,
        ceiling=config.ceiling,
        neurons=tuple(NeuronPlan(mlps[name], option.neurons, option.loss) for name, option in allotment.neurons.items()),
        unreached=tuple(unreached),
    )


def plot_plan(plan: Plan, axes: Any = None) -> Any:
    """What is kept of each target: a heat map of module kinds over depth, with marks for dense ones and for lost neurons.

    Args:
        plan: to show.
        axes: matplotlib's, to draw on; None: new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    kept = {module.name: module.stored_parameters / module.dense_parameters for module in plan.modules}
    axes = heat_map(kept, "stored / dense", 1.0, axes)
    places, kinds, depths = grid_of(kept)
    for module in plan.modules:
        if module.rank is None or module.size is not None:
            kind, depth = places[module.name]
            mark = "×" if module.rank is None else "|"
            axes.text(depths.index(depth), kinds.index(kind), mark, ha="center", va="center", color="black")
    axes.set_title(f"keep = {plan.keep:g}; × stays dense" + ("; | loses neurons" if plan.neurons else ""))
    return axes
