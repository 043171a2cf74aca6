"""Search for the smallest model that is good enough: the size and the method, by trials that only truncate and evaluate."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from tqdm.auto import tqdm

from ..calibration.statistics import Batches, Statistics
from ..compression.compress import calibrate, compress
from ..compression.job import with_defaults
from ..config.fields import CALIBRATED
from ..config.reparam_config import ReparamConfig
from ..evaluation.measures import Measure, Tolerance, measure_named
from ..numerics.methods import METHODS
from ..planning.plan import Plan
from ..runtime.fingerprints import fingerprint_of_batches, fingerprint_of_model, fingerprint_of_tensors
from ..runtime.processes import check_whole
from ..runtime.run_folder import RunFolder, json_able
from .family import Family
from .result import SearchResult, Trial

STATISTICS = "statistics.safetensors"
Metric: TypeAlias = str | Callable[[nn.Module], float]


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
    method = family.job.config.method
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
    methods = list(methods or [config.method or CALIBRATED["method"]])
    if config.r is not None:
        raise ValueError(f"`r={config.r!r}` fixes the size, which is what a search finds; leave it out of the config.")
    if not config.init_weights:
        raise ValueError("`init_weights=False` gives random factors, of which there is no best size; leave it out.")
    if not keeps or not 0 < keeps[0] <= keeps[-1] <= 1:
        raise ValueError(f"`keeps` must be fractions in (0, 1], got {keeps}.")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"`methods` must hold some of {', '.join(map(repr, METHODS))}, got {method!r}.")
        if not METHODS[method].nested:
            raise ValueError(f"`methods` cannot hold {method!r}: its factors of one rank are no part of those of another.")
    for method in methods:
        with_defaults(_with(config, method=method))  # raises where a field has no effect with it
    if isinstance(max_trials, bool) or not isinstance(max_trials, int) or max_trials < 1:
        raise ValueError(f"`max_trials` must be a whole number of at least 1, got {max_trials!r}.")
    allowed = Tolerance.of(tolerance)
    return measure_named(metric, evaluation, tokenizer, higher_is_better, documents), allowed, keeps, methods


def _fingerprint(batches: Batches) -> str:
    """Of what a search is calibrated on."""
    if not isinstance(batches, Statistics):
        return fingerprint_of_batches(batches)
    energies = {f"energies of {name}": record.energies for name, record in batches.outputs.items()}
    return fingerprint_of_tensors({**energies, **{name: record.sum for name, record in batches.inputs.items()}})


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
