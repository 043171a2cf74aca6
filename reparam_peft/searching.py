"""Search for the smallest model that is good enough: the size and the method, by trials that only truncate and evaluate."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from .compression import calibrate, compress
from .config import CALIBRATED_METHODS, METHODS, ReparamConfig
from .decompositions import Factors, factorize
from .distributed import check_whole
from .factorized import is_quantized, layer_kind
from .measures import Measure, Tolerance, measure_named
from .metrics import exact
from .pipeline import Batches, Run, mean_output, with_defaults
from .planning import Plan
from .plotting import plot_search, table_html
from .run_folder import RunFolder, fingerprint_of_batches, fingerprint_of_model, fingerprint_of_tensors
from .sequential import json_able
from .statistics import Statistics
from .targets import base_dtype, naming, source_matrix

STATISTICS = "statistics.safetensors"
Metric: TypeAlias = str | Callable[[nn.Module], float]


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        method: how its matrices are factorised.
        keep: the fraction of the targeted parameters that was asked for.
        stored_parameters: of the targets.
        metric: what was measured.
        within: whether that is within the tolerance.
        predicted_loss: predicted increase of the loss, nats per token; None where nothing was predicted.
        seconds: that the trial took.
    """

    method: str
    keep: float
    stored_parameters: int
    metric: float
    within: bool
    predicted_loss: float | None
    seconds: float


@dataclass(frozen=True)
class SearchResult:
    """What a search has found. `print(result)` shows it as a table.

    Attributes:
        trials: in the order in which they were made.
        chosen: the smallest one within the tolerance; None: there is none.
        metric: name of the metric.
        dense_metric: of the dense model.
        dense_parameters: of the targets.
        limit: the worst value that is within the tolerance.
        higher_is_better: whether higher values of the metric are better.
        plan: the ranks of the chosen one.
        model: compressed as the chosen one; None where there is none, or none was asked for.
    """

    trials: tuple[Trial, ...]
    chosen: Trial | None
    metric: str
    dense_metric: float
    dense_parameters: int
    limit: float
    higher_is_better: bool
    plan: Plan | None = None
    model: PeftModel | None = field(default=None, repr=False)

    @property
    def front(self) -> list[Trial]:
        """The Pareto front: trials that no other one beats in both size and metric, from small to large."""
        front: list[Trial] = []
        for trial in sorted(self.trials, key=lambda trial: (trial.stored_parameters, -self._goodness(trial))):
            if not front or self._goodness(trial) > self._goodness(front[-1]):
                front.append(trial)
        return front

    @property
    def request(self) -> str:
        """What was asked for, in words."""
        return f"{self.metric} {'at least' if self.higher_is_better else 'at most'} {self.limit:.5g} was asked for"

    def to_dict(self) -> dict[str, Any]:
        """Everything but plan and model, for JSON: a metric that is not finite is None."""
        own = ("metric", "dense_metric", "dense_parameters", "limit", "higher_is_better")
        trials = [asdict(trial) | ({} if math.isfinite(trial.metric) else {"metric": None}) for trial in self.trials]
        chosen = None if self.chosen is None else asdict(self.chosen)
        return {"trials": trials, "chosen": chosen, **{name: getattr(self, name) for name in own}}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SearchResult:
        """The result that `to_dict` gave, without plan and model.

        Raises:
            ValueError: a field is missing, unknown or wrong.
        """
        worst = -math.inf if fields.get("higher_is_better") else math.inf

        def trial(entry: Mapping[str, Any]) -> Trial:
            return Trial(**{**entry, "metric": worst if entry["metric"] is None else entry["metric"]})

        try:
            chosen = fields["chosen"] and trial(fields["chosen"])
            result = cls(**{**fields, "trials": tuple(map(trial, fields["trials"])), "chosen": chosen})
        except (TypeError, KeyError) as error:
            raise ValueError(f"a field of the search is missing, unknown or wrong: {error}") from error
        return result

    def rows(self) -> list[tuple[str, ...]]:
        """The head of the table, and its rows: the dense model, then the trials from large to small."""
        head = ("", "method", "keep", "stored", "kept", self.metric, "predicted loss", "seconds")
        rows = [head, ("dense", "", "", f"{self.dense_parameters:,}", "100.0%", f"{self.dense_metric:.5g}", "", "")]
        for trial in sorted(self.trials, key=lambda trial: -trial.stored_parameters):
            mark = "chosen" if trial == self.chosen else "within" if trial.within else ""
            kept = f"{trial.stored_parameters / self.dense_parameters:.1%}"
            lost = "" if trial.predicted_loss is None else f"{trial.predicted_loss:+.4f}"
            sizes = (f"{trial.keep:g}", f"{trial.stored_parameters:,}", kept)
            rows.append((mark, trial.method, *sizes, f"{trial.metric:.5g}", lost, f"{trial.seconds:.1f}"))
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, self.request])

    def plot(self, axes: Any = None) -> Any:
        """Size against metric of all trials; on matplotlib's axes, or new ones, which are returned."""
        return plot_search(self, axes)

    def _repr_html_(self) -> str:
        return table_html(self.rows(), self.request)

    def _goodness(self, trial: Trial) -> float:
        return trial.metric if self.higher_is_better else -trial.metric


def search(
    model: nn.Module,
    config: ReparamConfig,
    batches: Batches,
    *,
    metric: Metric = "perplexity",
    tolerance: float | str = "5%",
    evaluation: Sequence[Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    documents: int | None = None,
    higher_is_better: bool | None = None,
    keeps: Sequence[float] | None = None,
    methods: Sequence[str] | None = None,
    max_trials: int = 10,
    build: bool = True,
    run_folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Find the smallest model whose metric stays within a tolerance of the dense one's, and compress to it.

    The data are read once, and each matrix is decomposed once for each method. A trial puts truncated products in place of the
    weights, evaluates, and puts the weights back. Sizes are tried by bisection, which takes the metric to get better with size.

    Args:
        model: as for `compress`; it is changed only at the end, and only with `build`.
        config: as for `compress`; `keep` and `r` are what is searched for, and must be left out.
        batches: for calibration, or the `Statistics` of an earlier run.
        metric: "perplexity" or "accuracy" on `evaluation`; a task of lm-evaluation-harness, as "hellaswag", or
            the YAML file of one, whose first metric counts, or another with "hellaswag:acc_norm"; or any function of a model.
        tolerance: how much worse the metric may get: "5%" of the dense model's, or a number in the metric's own unit.
        evaluation: batches for "perplexity" and "accuracy", which calibration should not have seen.
        tokenizer: for a task of lm-evaluation-harness.
        documents: the most documents of such a task, or of each task of a group; None: all.
        higher_is_better: of the metric; None: as the name has it, False for a function.
        keeps: the sizes to choose from; None: 0.05 to 0.99 in steps of 0.01.
        methods: of factorisation, each of which is tried; None: the config's. Not "autoencoder", whose ranks are not nested.
        max_trials: the most trials of each method.
        build: whether to compress the model to the chosen size.
        run_folder: folder for the statistics and for `log.jsonl` with each trial. A search that was killed goes on after its
            last trial when it is called again with the same arguments; a `metric` that is a function should be the same one.
        seed, progress: as for `compress`.

    Returns:
        All trials, the chosen one, and the compressed model.

    Raises:
        TypeError, ValueError: an argument is wrong, or as for `compress`.
        ImportError: lm-evaluation-harness is not installed.
    """
    asked = {"metric": metric, "tolerance": tolerance, "evaluation": evaluation, "tokenizer": tokenizer, "documents": documents}
    asked |= {"higher_is_better": higher_is_better, "keeps": keeps, "methods": methods, "max_trials": max_trials}
    measure, allowed, candidates, methods = check_search(config, **asked)
    settings: dict[str, Any] = {}
    if run_folder is not None:
        if not isinstance(batches, Statistics):
            check_whole(batches)
            batches = list(batches)
        settings = {
            "config": json_able(config.to_dict()),
            "model": fingerprint_of_model(model),
            "metric": [measure.name, measure.higher_is_better, str(tolerance), measure.details],
            "evaluation": fingerprint_of_batches(evaluation or []),
            "calibration": _fingerprint(batches),
            "candidates": [candidates, methods, max_trials],
            "seed": seed,
        }
    folder = RunFolder(run_folder, settings)
    statistics = _statistics(model, config, batches, folder, seed, progress)
    if not folder.finished:
        folder.finish({"dense": measure.of(model)}, {})
    dense = folder.finished[0]["dense"]
    limit = measure.limit(dense, allowed)
    trials: list[Trial] = []
    plans: dict[Trial, Plan] = {}
    total = 0
    with tqdm(total=max_trials * len(methods), desc="Searching", unit="trial", disable=None if progress else True) as bar:
        for method in methods:
            family = Family(model, _with(config, method=method), statistics, seed)
            total = family.dense_parameters
            for trial in _bisection(family, candidates, measure, limit, max_trials, folder):
                trials.append(trial)
                if trial.within:
                    plans[trial] = family.plan(trial.keep)
                bar.set_postfix({"keep": trial.keep, measure.name: f"{trial.metric:.4g}"})
                bar.update()
            del family
    good = [trial for trial in trials if trial.within]
    chosen = min(good, key=lambda trial: trial.stored_parameters, default=None)
    small = None
    if chosen is None:
        best = measure.best([trial.metric for trial in trials])
        warnings.warn(
            f"No trial is within the tolerance: {measure.name} {limit:.5g} was asked for, and the best is {best:.5g}. Allow "
            "more, or larger sizes in `keeps`.",
            stacklevel=2,
        )
    elif build:
        own = _with(config, method=chosen.method, keep=chosen.keep)
        small = compress(model, own, statistics, plan=plans[chosen], seed=seed, progress=progress)
    found = (tuple(trials), chosen, measure.name, dense, total, limit, measure.higher_is_better)
    return SearchResult(*found, plan=None if chosen is None else plans[chosen], model=small)


def _bisection(
    family: Family, keeps: Sequence[float], measure: Measure, limit: float, max_trials: int, folder: RunFolder
) -> Iterator[Trial]:
    """Trials that close in on the smallest size within the limit; those that a folder knows are not made again."""
    method = family.run.config.method
    known = {entry["keep"]: Trial(**entry) for entry in folder.finished[1:] if entry["method"] == method}
    left, right = 0, len(keeps)  # every size below `left` is too small; from `right` on, they will do
    made = 0
    while left < right and made < max_trials:
        middle = (left + right) // 2
        trial = known.get(keeps[middle]) or family.trial(keeps[middle], measure, limit)
        if trial is None:  # so small a model does not exist
            left = middle + 1
            continue
        if trial.keep not in known:
            folder.finish(asdict(trial), {})
        made += 1
        yield trial
        left, right = (left, middle) if trial.within else (middle + 1, right)


class Family:
    """All sizes of one model by one method: each matrix decomposed once, at full rank."""

    def __init__(self, model: nn.Module, config: ReparamConfig, statistics: Statistics, seed: int) -> None:
        self.model = model
        self.run = Run(model, config, statistics, seed, False, None, "default")
        for name, module in self.run.modules.items():
            if is_quantized(module):
                raise ValueError(
                    f"{name}: a search changes weights for each trial, and this one is quantised; load it in full."
                )
        self.losses = self.run.losses()
        self.dense_parameters = sum(storage.dense for storage in self.run.storages.values())
        self._factors: dict[str, tuple[Factors, Tensor | None]] = {}

    def plan(self, keep: float) -> Plan:
        """The ranks for a size.

        Raises:
            ValueError: the budget cannot be met.
        """
        return self.run.plan_for(keep, self.losses)

    def trial(self, keep: float, measure: Measure, limit: float) -> Trial | None:
        """Measure one size; None where the budget cannot be met."""
        start = time.perf_counter()
        try:
            plan = self.plan(keep)
        except ValueError:
            return None
        with self.truncated(plan):
            value = measure.of(self.model)
        within = measure.within(value, limit)
        seconds = round(time.perf_counter() - start, 2)
        return Trial(self.run.config.method, keep, plan.stored_parameters, value, within, plan.predicted_loss, seconds)

    @contextmanager
    def truncated(self, plan: Plan) -> Iterator[None]:
        """Products in place of the weights; the very same weights again afterwards."""
        before: list[tuple[Tensor, Tensor]] = []
        try:
            for name, rank in plan.ranks.items():
                module = self.run.modules[name]
                if rank == min(self.run.storages[name].out_features, self.run.storages[name].in_features):
                    continue  # the product is W
                with naming(name):
                    factors, mean = self._decomposed(name)
                A, B = factors.A[:, :rank], factors.B[:rank]
                matrix = (A.float() @ B.float()).to(module.weight.device, module.weight.dtype)
                before.append((module.weight, module.weight.data))
                if mean is not None:
                    W = source_matrix(module)
                    lost = mean_output(W, module.bias, mean) - exact(A) @ (exact(B) @ mean.to(B.device))
                    before.append((module.bias, module.bias.data))
                    module.bias.data = lost.to(module.bias.device, module.bias.dtype)
                module.weight.data = layer_kind(module).weight(matrix, module.weight.shape)
            yield
        finally:
            for parameter, value in before:
                parameter.data = value

    def _decomposed(self, name: str) -> tuple[Factors, Tensor | None]:
        """Factors of which the first r columns and rows are those of rank r, and the mean input where a bias is moved."""
        if name not in self._factors:
            target, metrics = self.run.targets[name], self.run.metrics(name, self.run.statistics_with(name))
            W = source_matrix(target.module)
            wide = W.to(torch.promote_types(W.dtype, torch.float32))
            # At full rank `factorize` puts them in no order.
            found = factorize(wide, max(1, min(W.shape) - 1), metrics.input, metrics.output)
            dtype = base_dtype(target.module)
            self._factors[name] = Factors(found.A.to(dtype), found.B.to(dtype)), metrics.mean if target.storage.bias else None
        return self._factors[name]


def _with(config: ReparamConfig, **fields: Any) -> ReparamConfig:
    """A copy of a config with other fields."""
    copied = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(copied, name, value)
    return copied


def check_search(
    config: ReparamConfig,
    *,
    metric: Metric,
    tolerance: float | str,
    evaluation: Sequence[Mapping[str, Any]] | None,
    tokenizer: Any,
    documents: int | None,
    methods: Sequence[str] | None,
    max_trials: int,
    higher_is_better: bool | None = None,
    keeps: Sequence[float] | None = None,
) -> tuple[Measure, Tolerance, list[float], list[str]]:
    """What is measured, how much worse it may get, sizes and methods, for arguments of `search`, which are checked.

    Raises:
        TypeError, ValueError, ImportError: as `search`.
    """
    keeps = sorted({float(keep) for keep in (keeps if keeps is not None else [i / 100 for i in range(5, 100)])})
    methods = list(methods or [config.method or CALIBRATED_METHODS[0]])
    if config.r is not None:
        raise ValueError(f"`r={config.r!r}` fixes the size, which is what a search finds; leave it out of the config.")
    if not config.init_weights:
        raise ValueError("`init_weights=False` gives random factors, of which there is no best size; leave it out.")
    if not keeps or not 0 < keeps[0] <= keeps[-1] <= 1:
        raise ValueError(f"`keeps` must be fractions in (0, 1], got {keeps}.")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"`methods` must hold some of {', '.join(map(repr, METHODS))}, got {method!r}.")
    if "autoencoder" in methods:
        raise ValueError("`methods` cannot hold 'autoencoder': its factors of one rank are no part of those of another.")
    for method in methods:
        with_defaults(_with(config, method=method), None, False)  # raises where a field has no effect with it
    if isinstance(max_trials, bool) or not isinstance(max_trials, int) or max_trials < 1:
        raise ValueError(f"`max_trials` must be a whole number of at least 1, got {max_trials!r}.")
    allowed = Tolerance.of(tolerance)
    return measure_named(metric, evaluation, tokenizer, higher_is_better, documents), allowed, keeps, methods


def _fingerprint(batches: Batches) -> str:
    """Of what a search is calibrated on."""
    if not isinstance(batches, Statistics):
        return fingerprint_of_batches(batches)
    sums = {f"energies of {name}": value for name, value in batches.energies.items()}
    return fingerprint_of_tensors({**sums, **batches.sums})


def _statistics(
    model: nn.Module, config: ReparamConfig, batches: Batches, folder: RunFolder, seed: int, progress: bool
) -> Statistics:
    """Those given, those of a search that was killed, or those of the batches."""
    if isinstance(batches, Statistics):
        return batches
    path = None if folder.folder is None else folder.folder / STATISTICS
    if path is not None and path.exists():
        return Statistics.load(path)
    statistics = calibrate(model, config, batches, seed=seed, progress=progress)
    if path is not None and folder.writes:
        aside = path.with_suffix(".tmp")
        statistics.save(aside)
        aside.replace(path)
    return statistics
