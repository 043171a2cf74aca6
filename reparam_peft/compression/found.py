"""What planning finds out about matrices, kept until they are factorised."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics.decompositions import Directions
from .factorizing import Factorizer
from .weighing import Weighing


class Found:
    """The directions of matrices, which tell what ranks cost and spare their factorisation most of its work.

    A process keeps those that it has found itself; of another one's, and of those without room, it finds them again, with the
    same bits.

    Args:
        factorizer: of the job.

    Attributes:
        room: bytes that may yet be kept; 0 where nothing is to be factorised.
    """

    def __init__(self, factorizer: Factorizer) -> None:
        self.factorizer, self.room = factorizer, 0
        self._directions: dict[str, Directions] = {}

    def losses(self, name: str, W: Tensor, weighing: Weighing) -> Tensor:
        """What each direction of a matrix is predicted to cost; as `Factorizer.losses`."""
        has_room = min(W.shape) ** 2 * torch.promote_types(W.dtype, torch.float32).itemsize <= self.room
        return self.factorizer.losses(W, weighing, self.directions(name, W, weighing) if has_room else None)

    def directions(self, name: str, W: Tensor, weighing: Weighing) -> Directions | None:
        """The directions of a matrix, kept where there is room; as `Factorizer.directions`."""
        directions = self.factorizer.directions(W, weighing)
        if directions is not None and directions.vectors.nbytes <= self.room:
            self.room -= directions.vectors.nbytes
            self._directions[name] = directions
        return directions

    def take(self, name: str) -> Directions | None:
        """What was kept of a matrix, for the last time."""
        directions = self._directions.pop(name, None)
        self.room += 0 if directions is None else directions.vectors.nbytes
        return directions
