"""How a job runs, whatever it computes."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import check_seed
from ..calibration.given import Objective
from .passes import MaxMemory


@dataclass(frozen=True)
class Options:
    """How a job runs, whatever it computes.

    Attributes:
        seed: of the labels sampled for gradients.
        progress: whether to show progress bars.
        max_memory: how much statistics may take at a time; None: all of them are gathered in one pass.
        objective: whose gradients weigh errors of outputs, as for `gather_statistics`; None: by what the model returns.
    """

    seed: int = 0
    progress: bool = True
    max_memory: MaxMemory | None = None
    objective: Objective | None = None

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if self.objective is not None and not callable(self.objective):
            raise TypeError(f"`objective` must be callable as objective(model, batch), got {self.objective!r}.")
