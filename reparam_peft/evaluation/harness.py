"""Tasks of lm-evaluation-harness, its own and yours, as metrics of a model."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ..runtime.modules import evaluating, input_device
from ..runtime.processes import processes


@dataclass(frozen=True)
class HarnessTask:
    """A task, or a group of tasks that has metrics of its own, and one of its metrics.

    Attributes:
        task: the harness's object.
        metric: name of the metric.
        higher_is_better: as the task has it; None: it does not say.
        details: fingerprint of what the task's description holds, and of the documents.
        tokenizer: of the models to evaluate.
        documents: the most of each task; None: all.
    """

    task: Any
    metric: str
    higher_is_better: bool | None
    details: str
    tokenizer: Any
    documents: int | None

    @property
    def name(self) -> str:
        """`task:metric`."""
        return f"{_name(self.task)}:{self.metric}"

    @classmethod
    def named(cls, metric: str, tokenizer: Any, documents: int | None) -> HarnessTask:
        """The task of a name or of a YAML file, with its data, and its first metric, or the one after a `:`.

        Args:
            metric: the name, such as `hellaswag` or `hellaswag:acc_norm`, or the path of the file.
            tokenizer: of the models to evaluate.
            documents: the most of each task, at least 1; None: all.

        Raises:
            ValueError: there is no such task or metric, it cannot be loaded, or a causal language model cannot do it.
            ImportError: lm-evaluation-harness is not installed.
        """
        if tokenizer is None:
            raise ValueError(f"`metric={metric!r}` is taken for a task of lm-evaluation-harness, which needs a `tokenizer`.")
        if processes()[0] > 1:
            raise ValueError(f"`metric={metric!r}`: the harness gives its figures to one process only; search in a single one.")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError(
                f"`metric={metric!r}` needs lm-evaluation-harness: pip install 'reparam_peft[harness]'"
            ) from error
        name, _, of_task = (metric, "", "") if Path(metric).is_file() else metric.partition(":")
        in_file = Path(name).is_file()
        manager = TaskManager(include_defaults=not in_file)  # to know the thousands of them takes seconds
        if not in_file and name not in manager.all_tasks:
            raise ValueError(
                f"`metric={metric!r}` is neither 'perplexity', 'accuracy', a task of lm-evaluation-harness, nor a file of one."
            )
        try:
            loaded = manager.load([name])
        except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            rule = " A file must describe one task, and no group." if in_file else ""
            raise ValueError(f"{name} cannot be loaded as a task of lm-evaluation-harness: {error}.{rule}") from error
        tasks, grouped = list(loaded["tasks"].values()), list(loaded["groups"].values())
        if len(tasks) > 1 and not grouped:
            raise ValueError(f"`metric={metric!r}` stands for several tasks; name one: {', '.join(loaded['tasks'])}.")
        for task in tasks:
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise ValueError(f"{task.task_name} runs generated code, or needs more than text; measure it by a function.")
        directions = {key: up for task in tasks for key, up in task.higher_is_better().items()}
        if grouped:
            aggregates = [aggregate.metric for aggregate in grouped[0].aggregate_metric_list or ()]
            directions = {key: directions.get(key) for key in aggregates}
        if not directions:
            raise ValueError(f"{name} has no metrics of its own; name one of its tasks: {', '.join(loaded['tasks'])}.")
        of_task = of_task or next(iter(directions))
        if of_task not in directions:
            raise ValueError(f"{name} has no metric {of_task!r}, only {', '.join(directions)}.")
        described = json.dumps([[task.dump_config(), list(task.eval_docs)] for task in tasks], sort_keys=True, default=str)
        details = hashlib.sha256(f"{re.sub(' at 0x[0-9a-f]+', '', described)} {documents}".encode()).hexdigest()
        return cls((grouped or tasks)[0], of_task, directions[of_task], details, tokenizer, documents)

    def of(self, model: nn.Module) -> float:
        """The metric of a model. Of several filters of the answers, the first that the harness reports counts.

        Raises:
            ValueError: the task reports other metrics than it names.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        device = input_device(model)
        devices = [device] if device.type == "cuda" else []
        with evaluating(model), torch.random.fork_rng(devices):  # which both of these set
            wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(self.tokenizer))  # it adds a token for padding
            results = lm_eval.simple_evaluate(
                wrapped,
                tasks=[self.task],
                task_manager=TaskManager(include_defaults=False),
                limit=self.documents,
                bootstrap_iters=0,
                log_samples=False,
                random_seed=None,
                numpy_random_seed=None,
            )
        figures = results["results"][_name(self.task)]
        values = [value for key, value in figures.items() if key.partition(",")[0] == self.metric]
        if not values:
            reported = ", ".join(key for key in figures if "," in key)
            raise ValueError(f"{self.name}: the task names this metric, and reports only {reported}; measure it by a function.")
        return values[0]


def _name(task: Any) -> str:
    """The name of a task or a group."""
    return getattr(task, "task_name", None) or task.name
