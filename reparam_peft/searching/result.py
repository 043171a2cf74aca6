"""What a search has found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..arguments import check_bool, check_count, check_text, is_finite
from ..display.axes import new_axes
from ..display.tables import html_table
from ..planning.plan import Plan
from ..tuner.compressed_model import CompressedModel


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
    model: CompressedModel | None = field(default=None, repr=False)

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
        return {
            "trials": [asdict(trial) | ({} if math.isfinite(trial.metric) else {"metric": None}) for trial in self.trials],
            "chosen": None if self.chosen is None else asdict(self.chosen),
            "metric": self.metric,
            "dense_metric": self.dense_metric,
            "dense_parameters": self.dense_parameters,
            "limit": self.limit,
            "higher_is_better": self.higher_is_better,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SearchResult:
        """The result that `to_dict` gave, without plan and model.

        Raises:
            ValueError: a field is missing, unknown or wrong.
        """
        worst = -math.inf if isinstance(fields, Mapping) and fields.get("higher_is_better") else math.inf

        def trial(entry: Mapping[str, Any]) -> Trial:
            made = Trial(**{**entry, "metric": worst if entry["metric"] is None else entry["metric"]})
            numbers = [made.keep, made.seconds, *([] if made.predicted_loss is None else [made.predicted_loss])]
            numbers += [] if entry["metric"] is None else [made.metric]
            check_text("method", made.method)
            check_count("stored_parameters", made.stored_parameters)
            check_bool("within", made.within)
            if not all(map(is_finite, numbers)):
                raise ValueError(f"the numbers of a trial must be finite, got {numbers}")
            return made

        try:
            chosen = None if fields["chosen"] is None else trial(fields["chosen"])
            result = cls(**{**fields, "trials": tuple(map(trial, fields["trials"])), "chosen": chosen})
            check_text("metric", result.metric)
            check_count("dense_parameters", result.dense_parameters)
            check_bool("higher_is_better", result.higher_is_better)
            if not (is_finite(result.dense_metric) and is_finite(result.limit)) or {result.plan, result.model} != {None}:
                raise ValueError("`dense_metric` and `limit` must be finite numbers, and it has neither plan nor model")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"a field of the search is missing, unknown or wrong: {error}") from error
        return result

    def rows(self) -> list[tuple[str, ...]]:
        """The head of the table, and its rows: the dense model, then the trials from large to small."""
        head = ("", "method", "keep", "stored", "kept", self.metric, "predicted loss", "seconds")
        dense = ("dense", "", "", f"{self.dense_parameters:,}", "100.0%", f"{self.dense_metric:.5g}", "", "")
        rows: list[tuple[str, ...]] = [head, dense]
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
        """Size against metric: all trials, the Pareto front, the dense model, the limit, and the chosen one.

        Args:
            axes: matplotlib's, to draw on; None: new ones.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes = new_axes() if axes is None else axes
        for method in dict.fromkeys(trial.method for trial in self.trials):
            self._draw(axes, [trial for trial in self.trials if trial.method == method], "o", label=method)
        self._draw(axes, self.front, "-", color="gray", label="front")
        axes.plot([1.0], [self.dense_metric], "k*", label="dense")
        axes.axhline(self.limit, color="gray", linestyle=":", label="limit")
        if self.chosen is not None:
            self._draw(axes, [self.chosen], "o", ms=14, mfc="none", color="black", label="chosen")
        axes.set(xlabel="stored / dense parameters of the targets", ylabel=self.metric)
        if not self.higher_is_better and min([self.dense_metric, *(trial.metric for trial in self.trials)]) > 0:
            axes.set_yscale("log")
            for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                set_formatter("{x:g}")
        axes.legend()
        return axes

    def _repr_html_(self) -> str:
        return html_table(self.rows(), self.request)

    def _draw(self, axes: Any, trials: Sequence[Trial], marker: str, **style: Any) -> None:
        """Size against metric of those trials whose metric is finite."""
        finite = [trial for trial in trials if math.isfinite(trial.metric)]
        sizes = [trial.stored_parameters / self.dense_parameters for trial in finite]
        axes.plot(sizes, [trial.metric for trial in finite], marker, **style)

    def _goodness(self, trial: Trial) -> float:
        return trial.metric if self.higher_is_better else -trial.metric
