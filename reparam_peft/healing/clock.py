"""A training by the clock: it ends in time, and its learning rate, logs and checkpoints follow the time that has passed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..runtime.processes import first_of

TICKS = 10_000  # the steps of the schedule, of which the time that has passed says which one it is
ENDLESS = 10**9  # steps that no training takes


class Clock(TrainerCallback, ExportableState):
    """Ends a training after so many minutes; the time before a checkpoint counts where the training goes on from it.

    Intervals of logs, evaluations and checkpoints that are fractions are fractions of that time. In a distributed run all
    processes go by the clock of the first one.

    Args:
        minutes: of the whole training, > 0.

    Attributes:
        elapsed: seconds that have passed, as of the last optimizer step.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.elapsed = 0.0
        self.started = self.at_last_step = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"minutes": self.minutes}, "attributes": {"elapsed": self.elapsed}}

    @property
    def fraction(self) -> float:
        """Which part of the time has passed, in [0, 1]."""
        return min(1.0, self.elapsed / (60 * self.minutes))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin with the time that the checkpoint has noted, where there is one."""
        states: Any = state.stateful_callbacks  # by the name of their class, whatever transformers' annotation says
        noted = states.get(type(self).__name__) if state.global_step else None
        self.elapsed = noted["attributes"]["elapsed"] if isinstance(noted, dict) else 0.0
        self.at_last_step = self.elapsed
        self.started = time.monotonic() - self.elapsed

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the clock, before the learning rate of the next step is set."""
        self.elapsed = first_of(time.monotonic() - self.started)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log, evaluate and save where it is time; end where another step of the same length would be too late."""
        before, now, whole = self.at_last_step, self.elapsed, 60 * self.minutes
        self.at_last_step = now
        ends = now + (now - before) > whole
        if args.logging_strategy == IntervalStrategy.STEPS and (ends or _passed(args.logging_steps, before, now, whole)):
            control.should_log = True
        if args.eval_strategy == IntervalStrategy.STEPS and (ends or _passed(args.eval_steps, before, now, whole)):
            control.should_evaluate = True
        if args.save_strategy == SaveStrategy.STEPS and (ends or _passed(args.save_steps, before, now, whole)):
            control.should_save = True
        if ends:
            control.should_training_stop = True

    def scheduled(self, scheduler: LRScheduler) -> LRScheduler:
        """A schedule of `TICKS` steps, changed in place to take the time that has passed for the number of steps."""
        if not isinstance(scheduler, LambdaLR):
            raise TypeError(f"the schedule must be a LambdaLR, got a {type(scheduler).__name__}.")
        scheduler.lr_lambdas = [partial(self._by_time, factor) for factor in scheduler.lr_lambdas]
        return scheduler

    def _by_time(self, factor: Callable[[int], float], _: int) -> float:
        """The factor of the learning rate, which is that of a step, by the time that has passed."""
        return factor(round(TICKS * self.fraction))


def _passed(interval: float | None, before: float, now: float, whole: float) -> bool:
    """Whether a multiple of an interval that is a fraction of the whole lies between two times."""
    if interval is None or interval >= 1:
        return False
    return int(now / (interval * whole)) > int(before / (interval * whole))


class ClockProgress(ProgressCallback):
    """A progress bar in seconds.

    Args:
        clock: of the training.
    """

    training_bar: Any

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=round(60 * self.clock.minutes), unit="s", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar.n = min(round(self.clock.elapsed), self.training_bar.total)
            self.training_bar.refresh()
