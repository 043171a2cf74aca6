"""Plans: which rank each target gets, what that stores, and what it is predicted to cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..arguments import check_names, is_int
from ..config.reparam_config import ReparamConfig
from ..display.axes import grid_of, heat_map
from ..display.tables import html_table
from ..layers.neuron_groups import NeuronGroup
from ..numerics.storage import AS_THE_MODEL, Storage
from ..runtime.files import write_whole
from ..runtime.json_files import read_json
from .module_plan import ModulePlan, cells, columns, read_module_plan
from .neuron_plan import NeuronPlan, read_neuron_plan
from .neurons import Allotment

FORMAT = "reparam_peft plan 1"
NONE: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Plan:
    """The ranks of all targets under one budget. `print(plan)` shows it as a table.

    Attributes:
        modules: one entry per target.
        keep: the fraction of the targeted parameters, or bytes, that was asked for.
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
        budget: what `keep` is a fraction of: "parameters", "bytes", "flops" or "latency".
        correction_bits: of the factors beside corrected matrices: 8; None: the dtype of the model.
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
    budget: str = "parameters"
    correction_bits: int | None = None

    @property
    def dense_parameters(self) -> int:
        """Parameters of the targeted matrices."""
        return sum(module.dense_parameters for module in self.modules)

    @property
    def stored_parameters(self) -> int:
        """Numbers stored for them, dense ones included."""
        return sum(module.stored_parameters for module in self.modules)

    @property
    def dense_bytes(self) -> int | None:
        """Bytes of the targeted matrices in the dtype of the model; None for a plan of before they were noted."""
        return _sum(module.dense_bytes for module in self.modules)

    @property
    def stored_bytes(self) -> int | None:
        """Bytes stored for them, with scales and masks; None likewise."""
        return _sum(module.stored_bytes for module in self.modules)

    @property
    def forms(self) -> dict[str, str]:
        """Forms by module, of those that have another than the plan."""
        return {m.name: m.form for m in self.modules if m.rank is not None and m.form not in (None, self.form)}

    @property
    def bits(self) -> dict[str, int]:
        """Bits of the numbers by module, of those whose numbers are in few bits."""
        return {module.name: module.bits for module in self.modules if module.bits != AS_THE_MODEL}

    @property
    def correction_rank(self) -> int | None:
        """The rank of all corrections, where it was given; else None."""
        return max([1, *self.ranks.values()]) if self.form == "corrected" and self.budget != "bytes" else None

    def storage_of(self, module: ModulePlan, storage: Storage) -> Storage:
        """What the product of one of its modules takes, of a matrix whose storage this is."""
        if module.form is None:
            return storage
        correction = self.correction_bits or AS_THE_MODEL
        return replace(storage, form=module.form, bits=module.bits, correction_bits=correction)

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
            plan = cls(
                tuple(map(read_module_plan, fields.pop("modules"))), **fields, neurons=neurons, unreached=tuple(unreached)
            )
            _check_sizes(plan)
            words: dict[str, Any] = {"method": plan.method, "allocation": plan.allocation, "form": plan.form}
            words |= {"budget": plan.budget, "correction_bits": plan.correction_bits}
            words["r"] = plan.correction_rank
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
        if (config.budget or "parameters") != self.budget:
            raise ValueError(f"`plan` is for `budget={self.budget!r}`, and the config says {config.budget!r}; leave it out.")
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

    @property
    def in_bytes(self) -> bool:
        """Whether tables show bytes, forms and bits."""
        return self.budget == "bytes" or any(module.in_few_bits for module in self.modules)

    @property
    def stored(self) -> tuple[int, int, str]:
        """What is stored, of how much, and of what: bytes where some numbers are in few bits, else parameters."""
        if self.in_bytes and self.stored_bytes is not None and self.dense_bytes is not None:
            return self.stored_bytes, self.dense_bytes, "bytes"
        return self.stored_parameters, self.dense_parameters, "parameters"

    def _repr_html_(self) -> str:
        titles = [title for title, _ in columns(self.in_bytes, self.is_routed)]
        rows = [("module", *titles, "effective rank")]
        for module in self.modules:
            effective = f"{module.effective_rank:.0f}" if module.spectrum else ""
            rows.append((module.name, *cells(module, self.in_bytes, self.is_routed), effective))
        return html_table(rows, str(self).rpartition("\n")[2])

    def __str__(self) -> str:
        width = max([len(module.name) for module in self.modules] + [6])
        shown = columns(self.in_bytes, self.is_routed)
        lines = ["  ".join([f"{'module':{width}}", *(f"{title:>{least}}" for title, least in shown)])]
        for module in self.modules:
            row = zip(cells(module, self.in_bytes, self.is_routed), shown, strict=True)
            lines.append("  ".join([f"{module.name:{width}}", *(f"{cell:>{least}}" for cell, (_, least) in row)]))
        stored, dense, unit = self.stored
        kept = stored / dense if dense else 1.0
        total = "" if self.predicted_loss is None else f", predicted loss +{self.predicted_loss:.4f} nats per token"
        neurons = f"{self.neurons_left}; " if self.neurons else ""
        lines.append(
            f"{stored:,} of {dense:,} {unit} stored ({kept:.2%}), "
            f"{len(self.dense_modules)} of {len(self.modules)} matrices dense; {neurons}{self.method}, "
            f"{self.allocation}, {self._forms}{total}"
        )
        return "\n".join(lines)

    @property
    def _forms(self) -> str:
        """The form, or how many matrices have which form and bits."""
        if not self.in_bytes:
            return self.form
        counts = Counter(f"{m.form or self.form} {m.bits} bits" for m in self.modules if m.rank is not None)
        return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or self.form

    @property
    def neurons_left(self) -> str:
        """How many neurons stay of the MLPs that lose some, in words; empty where none does."""
        if not self.neurons:
            return ""
        kept, total = sum(p.kept for p in self.neurons), sum(p.group.neurons for p in self.neurons)
        return f"{kept:,} of {total:,} neurons of {len(self.neurons)} MLPs stay"


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
    itemsizes: Mapping[str, int] = NONE,
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
        itemsizes: bytes of a number in the dtype of the model, by module, where that is known.
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
            point, itemsize = allotment.points.get(name), itemsizes.get(name)
            chosen = storage if point is None or point.storage is None else point.storage
            lost = None
            if point is not None:
                lost = None if math.isnan(point.loss) else point.loss
            elif spectrum is not None:
                lost = 0.0 if rank is None else float(spectrum[rank:].sum())
            yield ModulePlan(
                name,
                storage.whole_shape,
                rank,
                chosen.stored(rank),
                lost,
                () if spectrum is None else tuple(spectrum.tolist()),
                storage.size,
                None if tokens is None else tokens.get(name),
                None if point is None or rank is None else chosen.form_at(rank),
                AS_THE_MODEL if point is None or rank is None else chosen.bits,
                None if itemsize is None else chosen.bytes(rank, itemsize),
                None if itemsize is None else chosen.dense * itemsize,
            )

    few = [point.storage for point in allotment.points.values() if point.storage is not None]
    corrections = {storage.correction_bits for storage in few if storage.form == "corrected"} - {AS_THE_MODEL}
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
        budget=config.budget or "parameters",
        correction_bits=min(corrections, default=None),
    )


def _sum(values: Iterable[int | None]) -> int | None:
    """The sum; None where one is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


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
    kept = {module.name: module.kept for module in plan.modules}
    axes = heat_map(kept, "stored / dense", 1.0, axes)
    places, kinds, depths = grid_of(kept)
    for module in plan.modules:
        if module.rank is None or module.size is not None:
            kind, depth = places[module.name]
            mark = "×" if module.rank is None else "|"
            axes.text(depths.index(depth), kinds.index(kind), mark, ha="center", va="center", color="black")
    axes.set_title(f"keep = {plan.keep:g}; × stays dense" + ("; | loses neurons" if plan.neurons else ""))
    return axes
