"""Search for the smallest model that is good enough: the size and the method, by trials that only truncate and evaluate."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..arguments import ReparamWarning, check_seed
from ..calibration.self_written import SelfWritten, batches_or_self_written
from ..calibration.statistics import Batches, Statistics
from ..compression.compress import calibrate, compress
from ..config.reparam_config import ReparamConfig
from ..evaluation.measures import Measure
from ..planning.plan import Plan
from ..runtime.fingerprints import fingerprint_of_batches, fingerprint_of_config, fingerprint_of_model, fingerprint_of_values
from ..runtime.processes import check_whole, fails_together, tells_of_errors
from ..runtime.restoring import Snapshot
from ..runtime.run_folder import RunFolder, json_able
from .family import Family
from .goal import CheckedGoal, Goal, Metric, check_goal, config_with
from .result import SearchResult, Trial

logger = logging.getLogger(__name__)

STATISTICS = "statistics.safetensors"


@tells_of_errors()
def search(
    model: nn.Module,
    config: ReparamConfig,
    batches: Batches | str,
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

    The data are read once, and each matrix is decomposed once for each method, but for those of MLPs that lose neurons, which
    differ from size to size. A trial puts truncated products in place of the
    weights, evaluates, and puts the weights back. Sizes are tried by bisection, which takes the metric to get better with size.

    Args:
        model: as for `compress`; it is changed only at the end, and only with `build`.
        config: as for `compress`; `keep` and `r` are what is searched for, and must be left out.
        batches: for calibration; the `Statistics` of an earlier run; or "self", for text that the model writes itself, as by
            `self_written`.
        metric: "perplexity" or "accuracy" on `evaluation`; a task of lm-evaluation-harness, as "hellaswag", or
            the YAML file of one, whose first metric counts, or another with "hellaswag:acc_norm"; or any function of a model.
        tolerance: how much worse the metric may get: "5%" of the dense model's, or a number in the metric's own unit.
        evaluation: batches for "perplexity" and "accuracy", which calibration should not have seen.
        tokenizer: of the model, for a task of lm-evaluation-harness and for "self".
        documents: the most documents of such a task, or of each task of a group; None: all.
        higher_is_better: of the metric; None: as the name has it, False for a function.
        keeps: the sizes to choose from; None: 0.05 to 0.99 in steps of 0.01.
        methods: of factorisation, each of which is tried; None: the config's. Only those whose ranks are nested.
        max_trials: the most trials of each method.
        build: whether to compress the model to the chosen size.
        run_folder: folder for the statistics and for `log.jsonl` with each trial. A search that was killed goes on after its
            last trial when it is called again with the same arguments; a `metric` that is a function should be the same one.
        seed: as for `compress`.
        progress: whether to show progress bars.

    Returns:
        All trials, the chosen one, and the compressed model.

    Raises:
        TypeError, ValueError: an argument is wrong, or as for `compress`.
        ImportError: lm-evaluation-harness is not installed.
    """
    goal = Goal(
        metric=metric,
        tolerance=tolerance,
        evaluation=evaluation,
        tokenizer=tokenizer,
        documents=documents,
        higher_is_better=higher_is_better,
        keeps=keeps,
        methods=methods,
        max_trials=max_trials,
    )
    return find_smallest(model, config, batches, goal, build=build, run_folder=run_folder, seed=seed, progress=progress)


def find_smallest(
    model: nn.Module,
    config: ReparamConfig,
    batches: Batches | str,
    goal: Goal,
    *,
    build: bool = True,
    run_folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """What `search` does, for a goal.

    Args, Returns, Raises: as for `search`.
    """
    check_seed("seed", seed)
    checked = check_goal(goal, config)
    tokenizer = goal.tokenizer if isinstance(batches, str) else None
    data: Batches = batches_or_self_written(batches, model, tokenizer, seed=seed, progress=progress, folder=run_folder)
    with ExitStack() as undoing:
        undoing.callback(Snapshot(model).restore)
        result = _found(model, config, data, goal, checked, build=build, run_folder=run_folder, seed=seed, progress=progress)
        if result.model is not None:
            undoing.pop_all()
        return result


def _found(
    model: nn.Module,
    config: ReparamConfig,
    batches: Batches,
    goal: Goal,
    checked: CheckedGoal,
    *,
    build: bool,
    run_folder: str | Path | None,
    seed: int,
    progress: bool,
) -> SearchResult:
    """What a search for a goal that was checked finds."""
    measure = checked.measure
    settings: dict[str, Any] = {}
    with fails_together():
        if run_folder is not None:
            if not isinstance(batches, (Statistics, SelfWritten)):
                check_whole(batches)
                batches = list(batches)
            settings = _settings(model, config, batches, goal, checked, seed)
    trials: list[Trial] = []
    plans: dict[Trial, Plan] = {}
    dense_parameters = 0
    most = goal.max_trials * len(checked.methods)
    with (
        RunFolder(run_folder, settings) as folder,
        tqdm(total=most, desc="Searching", unit="trial", disable=None if progress else True) as bar,
    ):
        statistics = _statistics(model, config, batches, folder, seed, progress)
        if not folder.finished:
            folder.finish({"dense": measure.of(model)}, {})
        dense = folder.finished[0]["dense"]
        limit = measure.limit(dense, checked.tolerance)
        for method in checked.methods:
            family = Family(model, config_with(config, method=method), statistics, seed)
            dense_parameters = family.dense_parameters
            for trial in _bisection(family, checked.keeps, measure, limit, goal.max_trials, folder):
                trials.append(trial)
                logger.info("keep %g by %s: %s %.4g", trial.keep, trial.method, measure.name, trial.metric)
                if trial.within:
                    plans[trial] = family.plan(trial.keep)
                bar.set_postfix({"keep": trial.keep, measure.name: f"{trial.metric:.4g}"})
                bar.update()
            del family  # the next one decomposes every matrix again
    within = [trial for trial in trials if trial.within]
    chosen = min(within, key=lambda trial: trial.stored_parameters, default=None)
    compressed = None
    if chosen is None:
        best = measure.best([trial.metric for trial in trials])
        warnings.warn(
            f"No trial is within the tolerance: {measure.name} {limit:.5g} was asked for, and the best is {best:.5g}. Allow "
            "more, or larger sizes in `keeps`.",
            ReparamWarning,
            stacklevel=4,  # whoever called `search`
        )
    elif build:
        best_config = config_with(config, method=chosen.method, keep=chosen.keep)
        compressed = compress(model, best_config, statistics, plan=plans[chosen], seed=seed, progress=progress)
    return SearchResult(
        trials=tuple(trials),
        chosen=chosen,
        metric=measure.name,
        dense_metric=dense,
        dense_parameters=dense_parameters,
        limit=limit,
        higher_is_better=measure.higher_is_better,
        plan=None if chosen is None else plans[chosen],
        model=compressed,
    )


def _bisection(
    family: Family, keeps: Sequence[float], measure: Measure, limit: float, max_trials: int, folder: RunFolder
) -> Iterator[Trial]:
    """Trials that close in on the smallest size within the limit; those that a folder knows are not made again."""
    earlier = {entry["keep"]: Trial(**entry) for entry in folder.finished[1:] if entry["method"] == family.method}
    left, right = 0, len(keeps)  # every size below `left` is too small; from `right` on, they will do
    made = 0
    while left < right and made < max_trials:
        middle = (left + right) // 2
        trial = earlier.get(keeps[middle]) or family.trial(keeps[middle], measure, limit)
        if trial is None:  # so small a model does not exist
            left = middle + 1
            continue
        if trial.keep not in earlier:
            folder.finish(asdict(trial), {})
        made += 1
        yield trial
        left, right = (left, middle) if trial.within else (middle + 1, right)


def _settings(
    model: nn.Module,
    config: ReparamConfig,
    batches: Sequence[Mapping[str, Any]] | SelfWritten | Statistics,
    goal: Goal,
    checked: CheckedGoal,
    seed: int,
) -> dict[str, Any]:
    """What the trials depend on, so that a search goes on in its own folder only."""
    measure = checked.measure
    return {
        "config": json_able(config.to_dict()),
        "model": fingerprint_of_model(model),
        "model's config": fingerprint_of_config(model),
        "metric": [measure.name, measure.higher_is_better, str(goal.tolerance), measure.details],
        "evaluation": fingerprint_of_batches(goal.evaluation or []),
        "tokenizer": _fingerprint_of_tokenizer(goal.tokenizer),
        "calibration": _fingerprint_of(batches),
        "candidates": [checked.keeps, checked.methods, goal.max_trials],
        "seed": seed,
    }


def _fingerprint_of(batches: Sequence[Mapping[str, Any]] | SelfWritten | Statistics) -> str:
    return batches.fingerprint() if isinstance(batches, (Statistics, SelfWritten)) else fingerprint_of_batches(batches)


def _fingerprint_of_tokenizer(tokenizer: Any) -> str | None:
    """Of its class and its vocabulary."""
    if tokenizer is None:
        return None
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
    return fingerprint_of_values([type(tokenizer).__name__, vocabulary])


def _statistics(
    model: nn.Module, config: ReparamConfig, batches: Batches, folder: RunFolder, seed: int, progress: bool
) -> Statistics:
    """Statistics that were given, those that a search that was killed has gathered, or those of the batches."""
    if isinstance(batches, Statistics):
        return batches
    path = None if folder.folder is None else folder.folder / STATISTICS
    if path is not None and path.exists():
        try:
            return Statistics.load(path)
        except ValueError as error:
            warnings.warn(f"{error} They are gathered anew.", ReparamWarning, stacklevel=6)  # whoever called `search`
    statistics = calibrate(model, config, batches, seed=seed, progress=progress)
    with fails_together():
        if path is not None and folder.writes:
            statistics.save(path)
    return statistics
