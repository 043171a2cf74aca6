"""Batches of texts, pairs of texts and images, with padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding(lengths: list[int], length: int, side: str = "right") -> Tensor:
    """An attention mask."""
    kept = torch.arange(length) < torch.tensor(lengths)[:, None]
    return (kept if side == "right" else kept.flip(1)).long()


def text(lengths: list[int], length: int, side: str = "right", seed: int = 0) -> Batch:
    return {"input_ids": tokens(len(lengths), length, seed), "attention_mask": padding(lengths, length, side)}


def pairs(source: list[int], target: list[int], lengths: tuple[int, int], seed: int = 0) -> Batch:
    decoder = text(target, lengths[1], seed=seed + 1)
    return {**text(source, lengths[0], seed=seed), **{f"decoder_{name}": value for name, value in decoder.items()}}


def images(rows: int, shape: tuple[int, ...], name: str, seed: int = 0) -> Batch:
    return {name: torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))}


def read(batches: list[Batch]) -> Iterator[Batch]:
    """A generator that is exhausted."""
    generator = iter(batches)
    list(generator)
    return generator
