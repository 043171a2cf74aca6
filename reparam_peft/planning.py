"""Plans: which rank each target gets, what that stores, and what it is predicted to cost."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .allocation import RANK_MULTIPLE, Point, Storage, allocate, points
from .config import ReparamConfig
from .plotting import plot_plan, table_html

FORMAT = "reparam_peft plan 1"


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one target.

    Attributes:
        name: of the module.
        shape: (out, in) of its matrix.
        rank: of its product; None: it stays dense.
        stored_parameters: numbers in a checkpoint, or out · in for a dense one.
        predicted_loss: predicted increase of the loss, nats per token; None without statistics.
        spectrum: what each direction of the factorisation is predicted to cost, nats per token, as `direction_losses` gives
            it: rank r loses the sum of all but the first r. Empty without statistics.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    stored_parameters: int
    predicted_loss: float | None = None
    spectrum: tuple[float, ...] = field(default=(), repr=False)

    @property
    def dense_parameters(self) -> int:
        """out · in."""
        return self.shape[0] * self.shape[1]

    @property
    def effective_rank(self) -> float:
        """How many directions count: exp of the entropy of the spectrum (Roy & Vetterli 2007); 0 without one."""
        total = sum(self.spectrum)
        parts = [value / total for value in self.spectrum if value > 0] if total else []
        return math.exp(-sum(part * math.log(part) for part in parts)) if parts else 0.0

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
        """Predicted increase of the loss, nats per token: the sum over the modules."""
        losses = [module.predicted_loss for module in self.modules]
        return None if None in losses else sum(losses)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module, without the dense ones."""
        return {module.name: module.rank for module in self.modules if module.rank is not None}

    @property
    def dense_modules(self) -> list[str]:
        """Names of the targets that stay dense."""
        return [module.name for module in self.modules if module.rank is None]

    def to_dict(self) -> dict[str, object]:
        """Everything, for JSON."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no plan, or a field of it is wrong.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} does not hold a plan: {error}") from error

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Plan:
        """The plan that `to_dict` gave.

        Raises:
            ValueError: another format, or a field is missing, unknown or wrong.
        """
        fields = dict(fields)
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f"`format` must be {FORMAT!r}.")
        try:
            plan = cls(tuple(map(_module_plan, fields.pop("modules"))), **fields)
            choices = {"keep": plan.keep, "method": plan.method, "allocation": plan.allocation, "form": plan.form}
            counts = {name: getattr(plan, name) for name in ("moved_bias", "calibration_tokens", "gradient_tokens", "seed")}
            ReparamConfig(**choices, **counts, ceiling=plan.ceiling)  # checks these
        except (TypeError, KeyError) as error:
            raise ValueError(f"a field is missing, unknown or wrong: {error}") from error
        if None in (*choices.values(), *counts.values()) or len({module.name for module in plan.modules}) < len(plan.modules):
            raise ValueError("a field is missing, or a module is there twice.")
        return plan

    def resistant(self, count: int = 10) -> list[ModulePlan]:
        """The targets that resist compression most: those whose effective rank is the largest part of their full rank."""
        return sorted(self.modules, key=lambda module: -module.effective_rank / min(module.shape))[:count]

    def plot(self, axes: Any = None) -> Any:
        """What is kept of each target, a heat map over depth; on matplotlib's axes, or new ones, which are returned."""
        return plot_plan(self, axes)

    def _repr_html_(self) -> str:
        head = ("module", "shape", "rank", "stored", "kept", "predicted loss", "effective rank")
        rows = [head, *((m.name, *_cells(m)) for m in self.modules)]
        return table_html(rows, str(self).rpartition("\n")[2])

    def __str__(self) -> str:
        width = max([len(module.name) for module in self.modules] + [6])
        lines = [f"{'module':{width}}  {'shape':>13}  {'rank':>5}  {'stored':>12}  {'kept':>6}  {'loss':>9}"]
        for module in self.modules:
            shape, rank, stored, kept, loss, _ = _cells(module)
            lines.append(f"{module.name:{width}}  {shape:>13}  {rank:>5}  {stored:>12}  {kept:>6}  {loss:>9}")
        kept = self.stored_parameters / self.dense_parameters if self.dense_parameters else 1.0
        total = "" if self.predicted_loss is None else f", predicted loss +{self.predicted_loss:.4f} nats per token"
        lines.append(
            f"{self.stored_parameters:,} of {self.dense_parameters:,} parameters stored ({kept:.2%}), "
            f"{len(self.dense_modules)} of {len(self.modules)} matrices dense; {self.method}, {self.allocation}, {self.form}"
            f"{total}"
        )
        return "\n".join(lines)


def _cells(module: ModulePlan) -> tuple[str, ...]:
    """What the tables say of a target."""
    return (
        f"{module.shape[0]} x {module.shape[1]}",
        "dense" if module.rank is None else str(module.rank),
        f"{module.stored_parameters:,}",
        f"{module.stored_parameters / module.dense_parameters:.1%}",
        "" if module.predicted_loss is None else f"{module.predicted_loss:.2e}",
        f"{module.effective_rank:.0f}" if module.spectrum else "",
    )


def _module_plan(entry: Mapping[str, object]) -> ModulePlan:
    shape, rank, spectrum = tuple(entry["shape"]), entry["rank"], tuple(entry["spectrum"])
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"{entry['name']}: `shape` must be two positive ints, got {shape!r}.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(shape)):
        raise ValueError(f"{entry['name']}: `rank` must be None or in [1, {min(shape)}], got {rank!r}.")
    stored, losses = entry["stored_parameters"], [*spectrum, entry["predicted_loss"] or 0.0]
    if isinstance(stored, bool) or not isinstance(stored, int) or stored < 1:
        raise ValueError(f"{entry['name']}: `stored_parameters` must be a positive int, got {stored!r}.")
    if not all(isinstance(loss, (int, float)) and math.isfinite(loss) for loss in losses):
        raise ValueError(f"{entry['name']}: `predicted_loss` and `spectrum` must be finite numbers.")
    return ModulePlan(**{**entry, "shape": shape, "spectrum": spectrum})


def allocate_ranks(
    config: ReparamConfig, storages: Mapping[str, Storage], losses: Mapping[str, Tensor], fixed: Mapping[str, int | None]
) -> dict[str, int | None]:
    """Ranks by predicted loss under the config's budget; None: dense. Uniform ranks are a candidate too.

    Args:
        config: `keep`, `rank_multiple`, `floor` and `ceiling`.
        storages: what each target's product takes.
        losses: what each direction of each target costs.
        fixed: targets whose rank is given.

    Raises:
        ValueError: the budget cannot be met.
    """
    floor, ceiling = config.floor or 0.0, 1.0 if config.ceiling is None else config.ceiling
    budget = parameter_budget(config.keep, storages)
    curves: dict[str, list[Point]] = {}
    for name, storage in storages.items():
        if name in fixed:
            rank = fixed[name]
            curves[name] = [Point(rank, storage.stored(rank), 0.0)]
        else:
            small = min(storage.out_features, storage.in_features) < 8 * RANK_MULTIPLE  # gains nothing by alignment
            multiple = config.rank_multiple or (1 if small else RANK_MULTIPLE)
            curves[name] = points(losses[name], storage, multiple, floor, ceiling)
    least = sum(curve[0].parameters for curve in curves.values())
    if least > budget:
        held = sum(curves[name][0].parameters for name in fixed)
        raise ValueError(
            f"`keep={config.keep}` allows {budget:,} parameters, and the least that can be stored is {least:,}: {held:,} for "
            f"the {len(fixed)} targets that `dense_modules` and `rank_pattern` fix, and the lowest ranks of the others. Raise "
            "`keep`, or lower `floor` or `rank_multiple`."
        )
    chosen = allocate(list(curves.values()), budget)
    ranks = {name: curve[index].rank for (name, curve), index in zip(curves.items(), chosen, strict=True)}
    uniform = {name: _uniform_point(curve, config.keep * storages[name].dense) for name, curve in curves.items()}
    if None in uniform.values() or sum(point.parameters for point in uniform.values()) > budget:
        return ranks
    lost = sum(curve[index].loss for curve, index in zip(curves.values(), chosen, strict=True))
    if sum(point.loss for point in uniform.values()) < lost:
        return {name: point.rank for name, point in uniform.items()}
    return ranks


def is_nested(config: ReparamConfig) -> bool:
    """Whether products of a rank are the first columns of A and rows of B of those of any higher rank, and an adapter says so.

    They are, but for the pivot form and an autoencoder. It says so where a `ceiling` below 1 leaves nothing dense by itself.
    """
    return config.form == "factors" and config.method != "autoencoder" and config.ceiling is not None and config.ceiling < 1


def smaller_ranks(
    config: ReparamConfig, storages: Mapping[str, Storage], plan: Plan, given: Mapping[str, int | None]
) -> dict[float, dict[str, int | None]] | None:
    """Ranks at sizes below that of a plan, in steps of 0.05 down to the least there is: size → module → rank; None: dense.

    No rank rises, so that the products are the first columns of A and rows of B of those of the plan. A matrix may be dense
    where the budget allows it, since a base model has it. None unless the products are nested.

    Args:
        config: that the plan was made with.
        storages: what each target's product takes.
        plan: whose directions are in the order of what they cost.
        given: ranks that the config fixes, which stay.
    """
    factorised = {module.name: module for module in plan.modules if module.rank is not None}
    if not is_nested(config):
        return None
    config = copy.copy(config)
    config.ceiling = None
    fixed = {module.name: module.rank for module in plan.modules if module.rank is None or not any(module.spectrum)} | {**given}
    losses = {module.name: torch.tensor(module.spectrum, dtype=torch.float64) for module in plan.modules}
    found: dict[float, dict[str, int | None]] = {}
    for step in range(math.ceil(plan.keep * 20 - 1e-9) - 1, 0, -1):
        config.keep = step / 20
        try:
            ranks = allocate_ranks(config, storages, losses, fixed)
        except ValueError:  # smaller than the lowest ranks and what is always dense
            break
        found[config.keep] = {name: ranks[name] and min(ranks[name], module.rank) for name, module in factorised.items()}
    return found


def check_budget(keep: float, ranks: Mapping[str, int | None], storages: Mapping[str, Storage]) -> None:
    """Raise `ValueError` where ranks store more than the fraction `keep` of the targeted parameters."""
    stored, budget = _stored(ranks, storages), parameter_budget(keep, storages)
    if stored > budget:
        dense = sum(storages[name].dense for name, rank in ranks.items() if rank is None)
        raise ValueError(
            f"`keep={keep}` allows {budget:,} parameters, and these ranks store {stored:,}, of which {dense:,} are in matrices "
            "that stay dense. Raise `keep`, name fewer `dense_modules`, or use `allocation='loss'`."
        )


def parameter_budget(keep: float, storages: Mapping[str, Storage]) -> int:
    """How many numbers the fraction `keep` of the targeted parameters is."""
    return math.floor(keep * sum(storage.dense for storage in storages.values()) * (1 + 1e-12))


def _uniform_point(curve: list[Point], parameters: float) -> Point | None:
    """The dearest point of a curve that stores at most so many parameters; the only point of a fixed one."""
    within = curve if len(curve) == 1 else [point for point in curve if point.parameters <= parameters]
    return within[-1] if within else None


def _stored(ranks: Mapping[str, int | None], storages: Mapping[str, Storage]) -> int:
    return sum(storages[name].stored(rank) for name, rank in ranks.items())


def make_plan(
    config: ReparamConfig,
    storages: Mapping[str, Storage],
    ranks: Mapping[str, int | None],
    losses: Mapping[str, Tensor],
    **provenance: int,
) -> Plan:
    """The plan of these ranks."""

    def modules() -> Iterable[ModulePlan]:
        for name, rank in ranks.items():
            storage, spectrum = storages[name], losses.get(name)
            lost = None
            if spectrum is not None:
                lost = 0.0 if rank is None else float(spectrum[rank:].sum())
            shape, values = (storage.out_features, storage.in_features), () if spectrum is None else tuple(spectrum.tolist())
            yield ModulePlan(name, shape, rank, storage.stored(rank), lost, values)

    chosen = (config.keep, config.method, config.allocation, config.form, config.moved_bias)
    return Plan(tuple(modules()), *chosen, **provenance, ceiling=config.ceiling)
