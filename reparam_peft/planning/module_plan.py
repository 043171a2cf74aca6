"""What a plan says of one target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..arguments import check_text, is_finite, is_int
from ..numerics.storage import ALL_FORMS, AS_THE_MODEL, WIDTHS


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one target.

    Attributes:
        name: of the module.
        shape: (out, in) of its matrix.
        rank: of its product; None: it stays dense. Full rank where it is stored as it is, but in few bits, or where neurons are
            left out.
        stored_parameters: numbers in a checkpoint, or out · in for a dense one.
        predicted_loss: predicted increase of the loss, nats per token; None without statistics.
        spectrum: what each direction of the factorisation is predicted to cost, nats per token, as `direction_losses` gives
            it: rank r loses the sum of all but the first r. Empty without statistics.
        size: (out, in) of what is left of the matrix where neurons are left out; None: all of it.
        tokens: rows of its input that calibration saw, of an expert those that it was given; None: not known.
        form: how its product is stored; "dense" for the matrix as it is, in few bits. None: as the plan says.
        bits: of its numbers, of a corrected matrix those of the matrix: 8 or 4; 16: the dtype of the model.
        stored_bytes: in a checkpoint, with scales, masks and bias; of a dense matrix that arrived in few bits, of its codes in
            the base model; None: not known.
        dense_bytes: of the whole matrix in the dtype of the model; None: not known.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    stored_parameters: int
    predicted_loss: float | None = None
    spectrum: tuple[float, ...] = field(default=(), repr=False)
    size: tuple[int, int] | None = None
    tokens: int | None = None
    form: str | None = None
    bits: int = AS_THE_MODEL
    stored_bytes: int | None = None
    dense_bytes: int | None = None

    @property
    def dense_parameters(self) -> int:
        """out · in."""
        return self.shape[0] * self.shape[1]

    @property
    def kept(self) -> float:
        """The fraction that is stored: of its bytes where its numbers are in few bits, else of its parameters."""
        if self.in_few_bits and self.stored_bytes and self.dense_bytes:
            return self.stored_bytes / self.dense_bytes
        return self.stored_parameters / self.dense_parameters

    @property
    def in_few_bits(self) -> bool:
        """Whether how many numbers it has does not say what it takes."""
        return self.bits != AS_THE_MODEL

    @property
    def effective_rank(self) -> float:
        """How many directions count: exp of the entropy of the spectrum (Roy & Vetterli 2007); 0 without one."""
        total = sum(self.spectrum)
        parts = [value / total for value in self.spectrum] if total else []
        return math.exp(-sum(part * math.log(part) for part in parts if part > 0)) if parts else 0.0

    def energy(self, rank: int) -> float:
        """The fraction of the spectrum that the first `rank` directions hold, in [0, 1]; 1 where there is nothing to lose."""
        total = sum(self.spectrum)
        return sum(self.spectrum[:rank]) / total if total else 1.0


def columns(in_bytes: bool, routed: bool) -> list[tuple[str, int]]:
    """Titles and least widths of the columns of a table of targets, after their names.

    Args:
        in_bytes: whether forms and bits are shown, and bytes in place of parameters.
        routed: whether the tokens that each has seen are shown.
    """
    shown = [("shape", 19), *([("form", 9), ("bits", 4)] if in_bytes else []), ("rank", 5)]
    shown += [("bytes" if in_bytes else "stored", 12), ("kept", 6), ("loss", 9)]
    return [*shown, ("tokens", 9)] if routed else shown


def cells(module: ModulePlan, in_bytes: bool, routed: bool) -> list[str]:
    """What tables say of a target, in these columns."""
    shape = " x ".join(map(str, module.shape)) if module.size is None else _left(module.shape, module.size)
    stored = module.stored_bytes if in_bytes else module.stored_parameters
    kept = module.stored_parameters / module.dense_parameters
    if in_bytes and module.stored_bytes and module.dense_bytes:
        kept = module.stored_bytes / module.dense_bytes
    return [
        shape,
        *(["" if module.rank is None else module.form or "", _bits(module)] if in_bytes else []),
        _rank(module),
        "" if stored is None else f"{stored:,}",
        f"{kept:.1%}",
        "" if module.predicted_loss is None else f"{module.predicted_loss:.2e}",
        *([("" if module.tokens is None else f"{module.tokens:,}")] if routed else []),
    ]


def _bits(module: ModulePlan) -> str:
    """Of its numbers; "own" where it keeps the codes in which it arrived."""
    keeps_codes = module.rank is None and module.stored_bytes != module.dense_bytes
    return "own" if keeps_codes else str(module.bits)


def _rank(module: ModulePlan) -> str:
    """The rank, or "dense" where there is no product: of the whole matrix, or of what is left of it."""
    is_left = module.size is not None and module.rank == min(module.size)
    is_whole = module.rank is None or is_left or module.form == "dense"
    return "dense" if is_whole else str(module.rank)


def _left(shape: tuple[int, int], size: tuple[int, int]) -> str:
    """What is left of a shape, "of" what there was.

    >>> _left((160, 64), (96, 64))
    '96 of 160 x 64'
    """
    return " x ".join(f"{left}" if left == whole else f"{left} of {whole}" for left, whole in zip(size, shape, strict=True))


def read_module_plan(entry: Mapping[str, Any]) -> ModulePlan:
    """A target out of the fields that a file holds of it.

    Raises:
        ValueError, TypeError, KeyError: a field is missing, unknown or wrong.
    """
    shape, rank, spectrum = tuple(entry["shape"]), entry["rank"], tuple(entry["spectrum"])
    check_text("name", entry["name"])
    if len(shape) != 2 or not all(is_int(size) and size > 0 for size in shape):
        raise ValueError(f"{entry['name']}: `shape` must be two positive ints, got {shape!r}.")
    if rank is not None and not (is_int(rank) and 1 <= rank <= min(shape)):
        raise ValueError(f"{entry['name']}: `rank` must be None or in [1, {min(shape)}], got {rank!r}.")
    stored, lost = entry["stored_parameters"], entry["predicted_loss"]
    if not is_int(stored) or stored < 1:
        raise ValueError(f"{entry['name']}: `stored_parameters` must be a positive int, got {stored!r}.")
    tokens = entry.get("tokens")
    if tokens is not None and not (is_int(tokens) and tokens >= 0):
        raise ValueError(f"{entry['name']}: `tokens` must be a count or None, got {tokens!r}.")
    losses = [*spectrum, *([] if lost is None else [lost])]
    if not (all(map(is_finite, losses)) and math.isfinite(sum(map(abs, losses))) and len(spectrum) <= min(shape)):
        raise ValueError(
            f"{entry['name']}: `predicted_loss` and `spectrum` must be finite numbers, at most {min(shape)} of them."
        )
    form, bits = entry.get("form"), entry.get("bits", AS_THE_MODEL)
    if form not in (None, *ALL_FORMS) or bits not in WIDTHS or isinstance(bits, bool):
        raise ValueError(
            f"{entry['name']}: `form` must be one of {ALL_FORMS} or None, and `bits` one of {WIDTHS}, got {form!r}, {bits!r}."
        )
    if form is None and bits != AS_THE_MODEL:
        raise ValueError(f"{entry['name']}: `bits` {bits} need a `form`.")
    whole, few = form == "dense" and rank is not None and entry.get("size") is None, bits != AS_THE_MODEL
    if (few and rank is None) or (whole and rank != min(shape)) or ((whole or form == "corrected") and not few):
        raise ValueError(f"{entry['name']}: `rank` {rank!r} and `bits` {bits} do not go with the `form` {form!r}.")
    for name in ("stored_bytes", "dense_bytes"):
        if entry.get(name) is not None and not (is_int(entry[name]) and entry[name] > 0):
            raise ValueError(f"{entry['name']}: `{name}` must be a positive int or None, got {entry[name]!r}.")
    size = entry.get("size")
    return ModulePlan(**{**entry, "shape": shape, "spectrum": spectrum, "size": None if size is None else tuple(size)})
