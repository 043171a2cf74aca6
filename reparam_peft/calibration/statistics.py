"""What calibration knows of a model: sums over the rows that its modules saw. Added up, saved, loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..arguments import check_seed, check_text, is_finite
from ..layers.kinds import is_quantized, layer_kind, stored_weight
from ..layers.wrapper import Wrapper, features
from ..numerics.grams import pack, unpack
from ..runtime.files import save_tensors
from ..runtime.fingerprints import fingerprint_of_tensors, fingerprint_of_values
from ..runtime.json_files import parse_json
from ..runtime.modules import abridged, naming
from .sums import InputSums, OutputSums, Sums, WeightedSums

FORMAT = "reparam_peft statistics 2"
WITH_WHOLE_MATRICES = "reparam_peft statistics 1"  # an earlier format, whose Gram matrices are whole
LEAST_VARIANCE = 1e-12  # of the mean square; numbers of float32 that should be the same differ by up to 1e-14 of it
ROUNDING = 2**-8  # of a number to bfloat16, relative, at most

# Parts of the file, each of which holds one field of every record under the record's name.
_INPUT_PARTS = {"rows": "rows", "grams": "gram", "sums": "sum"}
_WEIGHTED_PARTS = {"weights": "weight", "weighted_grams": "gram", "weighted_sums": "sum"}
_OUTPUT_PARTS = {"gradient_rows": "rows", "output_grams": "gram", "energies": "energies", "predictions": "gradient_tokens"}
_PACKED = ("grams", "weighted_grams", "output_grams")
_TENSORS = ("grams", "sums", "weighted_grams", "weighted_sums", "output_grams", "energies")

Record = TypeVar("Record", bound=Sums)


@dataclass(frozen=True)
class Moments:
    """Moments of the rows x (in,) that a module sees.

    Attributes:
        gram: E[x xᵀ], shape (in, in), or the covariance where a bias is moved; float64; for embeddings its diagonal (in,).
        mean: E[x], shape (in,), float64.
        rows: how many they are of.
    """

    gram: Tensor
    mean: Tensor
    rows: int


@dataclass
class Statistics:
    """What calibration knows of a model's modules: sums, not means, so that statistics of several runs add up.

    Attributes:
        reads: module → the first module that reads the same input, by whose name the input goes.
        inputs: input → `InputSums`: rows, Σ x xᵀ and Σ x of the inputs x, and both weighed by the gradients there.
        outputs: module → `OutputSums`: rows and Σ g gᵀ of the gradients g at the module's output, and the labels sampled.
        weight_norms: module → ‖W‖_F, by which statistics of another model are told.
        seed: of the sampled labels.
    """

    reads: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, InputSums] = field(default_factory=dict)
    outputs: dict[str, OutputSums] = field(default_factory=dict)
    weight_norms: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def nbytes(self) -> int:
        """Memory that the tensors take."""
        records: tuple[Sums, ...] = (*self.inputs.values(), *self.outputs.values())
        return sum(tensor.numel() * tensor.element_size() for record in records for _, tensor in record.tensors())

    @property
    def tokens(self) -> int:
        """Rows of the input that had most of them."""
        return max((record.rows for record in self.inputs.values()), default=0)

    @property
    def gradient_tokens(self) -> int:
        """Labels sampled from the model, in the passes for the module that had most of them."""
        return max((record.gradient_tokens for record in self.outputs.values()), default=0)

    def input_rows(self, module: str) -> int:
        """Number of rows of a module's input."""
        return self.inputs[self.reads[module]].rows

    def output_rows(self, module: str) -> int:
        """Number of gradients at a module's output."""
        return self.outputs[module].rows

    def gram(self, module: str) -> Tensor:
        """G = E[x xᵀ] of a module's input, shape (in, in), or its diagonal (in,) for embeddings."""
        record = self.inputs[self.reads[module]]
        return record.matrix().div_(record.rows)

    def mean(self, module: str) -> Tensor:
        """E[x] of a module's input, shape (in,)."""
        record = self.inputs[self.reads[module]]
        return record.sum / record.rows

    def covariance(self, module: str) -> Tensor:
        """E[(x − E[x]) (x − E[x])ᵀ] of a module's input, shape (in, in)."""
        return centre_in_place(self.gram(module), self.mean(module))

    def moments(self, module: str, centred: bool) -> Moments:
        """Moments of a module's input, with its covariance if `centred`, else with E[x xᵀ]."""
        gram = self.covariance(module) if centred else self.gram(module)
        return Moments(gram, self.mean(module), self.input_rows(module))

    def weighted_gram(self, module: str, centre: Tensor | None = None) -> Tensor | None:
        """E[|h|² (x − c) (x − c)ᵀ] / E[|h|²], shape (in, in), with the gradients h at the input; None where there are none.

        Args:
            module: name of the module.
            centre: c, shape (in,), float64; None: zero.
        """
        weighted = self.inputs[self.reads[module]].weighted
        if weighted is None or not weighted.weight > 0:
            return None
        gram = unpack(weighted.gram).div_(weighted.weight)
        if centre is None:
            return gram
        squares = gram.diagonal().clone()
        lower = weighted.sum / weighted.weight - centre / 2
        gram.addr_(lower, centre, alpha=-1).addr_(centre, lower, alpha=-1)
        return _above_rounding(gram, squares)

    def fisher(self, module: str) -> Tensor:
        """F = E[g gᵀ] at a module's output, shape (out, out), or its diagonal (out,) where that is kept alone."""
        record = self.outputs[module]
        return record.matrix().div_(max(record.rows, 1))

    def loss_scale(self, module: str) -> float:
        """What ½ tr(F Δ G Δᵀ) is multiplied by to become the predicted increase of the loss, in nats per gradient token.

        Two corrections: rows per gradient token; and E[|x|² |g|²] / (E[|x|²] E[|g|²]), because the product of F and G takes
        large inputs and large gradients for independent, and the largest inputs of transformers have the smallest gradients.
        """
        record = self.outputs[module]
        joint, squares = (float(value) for value in record.energies)
        gradients = float(record.diagonal().sum())
        if not (record.rows and squares > 0 and gradients > 0):
            return 0.0
        return joint / (squares * gradients / record.rows) * record.rows / max(record.gradient_tokens, 1)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both runs together, with the seed of this one; neither is changed.

        Raises:
            ValueError: they are of different models, or of modules that share their inputs differently.
        """
        for module in self.weight_norms.keys() & other.weight_norms.keys():
            _check_norm(module, self.weight_norms[module], other.weight_norms[module])
        for module in self.reads.keys() & other.reads.keys():
            if self.reads[module] != other.reads[module]:
                raise ValueError(
                    f"{module}: it shares the input of {self.reads[module]} in one of the statistics and of "
                    f"{other.reads[module]} in the other; calibrate both with the same `target_modules`."
                )
        return Statistics(
            reads={**self.reads, **other.reads},
            inputs=_united(self.inputs, other.inputs),
            outputs=_united(self.outputs, other.outputs),
            weight_norms={**self.weight_norms, **other.weight_norms},
            seed=self.seed,
        )

    def forget(self, module: str) -> None:
        """Drop, in place, what no module but this one needs."""
        self.outputs.pop(module, None)
        leader = self.reads.pop(module, None)
        if leader is not None and leader not in self.reads.values():
            del self.inputs[leader]

    def check(self, modules: Mapping[str, nn.Module], gradients: bool = False) -> None:
        """Raise `ValueError` unless the statistics are of these modules, with these weights, and have gradients if needed."""
        for name, module in modules.items():
            if name not in self.weight_norms:
                raise ValueError(
                    f"{name}: the statistics do not hold this module; they are of another model or of other targets."
                )
            out_features, in_features = features(module)
            of_input, of_output = self.inputs.get(self.reads.get(name, "")), self.outputs.get(name)
            for record, size in ((of_input, in_features), (of_output, out_features)):
                if record is not None and record.size != size:
                    raise ValueError(
                        f"{name}: the statistics are of {record.size} features, and the weight is ({out_features}, "
                        f"{in_features}); they are of another model."
                    )
            # Rounding to bfloat16 changes the norm by less than 1e-5, and of small matrices by more; bitsandbytes' reordering
            # of 4 bits on a CPU by 1e-4.
            tolerance = (1e-3 if is_quantized(module) else 1e-4) + ROUNDING / math.sqrt(out_features * in_features)
            _check_norm(name, self.weight_norms[name], weight_norm(module), tolerance)
            if gradients and of_output is None and of_input is not None:
                raise ValueError(
                    f"{name}: the statistics hold no gradients, which `allocation='loss'` and `output_metric` need; gather "
                    "them anew."
                )
        unreached = self.unreached(modules)
        if unreached:
            raise ValueError(
                f"{unreached[0]}: no batch reached this module. Give batches that use it, or leave it out with "
                "`exclude_modules`."
                if len(unreached) == 1
                else f"no batch reached these {len(unreached)} of {len(modules)} targets: {', '.join(abridged(unreached))}. "
                "Give batches that use them, leave them out with `exclude_modules`, or set `unreached='dense'`, by which "
                "they stay as they are."
            )

    def unreached(self, names: Iterable[str]) -> list[str]:
        """Those of some modules that the statistics are of, and that no batch has reached."""
        return [name for name in names if name in self.weight_norms and not self.is_reached(name)]

    def is_reached(self, module: str) -> bool:
        """Whether the statistics hold rows of a module's input."""
        record = self.inputs.get(self.reads.get(module, ""))
        return record is not None and record.rows > 0

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; the same statistics give the same bytes.

        Raises:
            OSError: writing failed. An earlier file is as it was.
        """
        tensors, plain = self._content()
        save_tensors(path, tensors, {"format": FORMAT, "statistics": json.dumps(plain)})

    def fingerprint(self) -> str:
        """SHA-256 of everything that `save` writes."""
        tensors, plain = self._content()
        return fingerprint_of_values([plain, fingerprint_of_tensors(tensors)])

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the file holds: tensors by part and name, and the rest for JSON."""
        weighted = {name: record.weighted for name, record in self.inputs.items() if record.weighted is not None}
        parts = {
            **_parts(self.inputs, _INPUT_PARTS),
            **_parts(weighted, _WEIGHTED_PARTS),
            **_parts(self.outputs, _OUTPUT_PARTS),
        }
        tensors = {f"{part}/{name}": tensor for part in _TENSORS for name, tensor in parts[part].items()}
        numbers = {part: values for part, values in parts.items() if part not in _TENSORS}
        return tensors, {"inputs": self.reads, **numbers, "weight_norms": self.weight_norms, "seed": self.seed}

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else, or is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                kept_as = metadata.get("format")
                if kept_as not in (FORMAT, WITH_WHOLE_MATRICES):
                    raise ValueError(f"{path} does not hold statistics ({FORMAT!r}), but {kept_as!r}.")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again, or gather the statistics anew.") from error
        try:
            plain = parse_json(metadata["statistics"], "the header")
            reads, weight_norms, seed = (plain.pop(name) for name in ("inputs", "weight_norms", "seed"))
            parts: dict[str, dict[str, Any]] = {**plain, **{part: {} for part in _TENSORS}}
            for key, tensor in tensors.items():
                part, _, name = key.partition("/")
                if part not in _TENSORS:
                    raise ValueError(f"{key!r} is no part of statistics")
                parts[part][name] = _packed(key, tensor) if part in _PACKED and kept_as == WITH_WHOLE_MATRICES else tensor
            inputs = _records(InputSums, _INPUT_PARTS, parts)
            for name, weighted in _records(WeightedSums, _WEIGHTED_PARTS, parts).items():
                inputs[name].weighted = weighted
            statistics = cls(reads, inputs, _records(OutputSums, _OUTPUT_PARTS, parts), weight_norms, seed)
            if parts:
                raise ValueError(f"{', '.join(parts)} are no part of statistics")
            statistics._check_whole()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} does not hold statistics that are whole: {error}; gather them anew.") from error
        return statistics

    def _check_whole(self) -> None:
        """Raise `ValueError` unless all records are whole, and modules have the inputs that they read and norms."""
        check_seed("seed", self.seed)
        for name in self.weight_norms:
            check_text("name of a module", name)
        if not all(is_finite(norm) and norm >= 0 for norm in self.weight_norms.values()):
            raise ValueError("a norm of a weight is no finite number")
        have_norms = self.weight_norms.keys() >= self.reads.keys() | self.outputs.keys()
        if not have_norms or set(self.reads.values()) != self.inputs.keys():
            raise ValueError("modules and their inputs do not fit each other")
        records: tuple[tuple[str, Sums], ...] = (*self.inputs.items(), *self.outputs.items())
        for name, record in records:
            with naming(name):
                record.check()


def centre_in_place(gram: Tensor, mean: Tensor) -> Tensor:
    """E[(x − m) (x − m)ᵀ], positive definite, of E[x xᵀ] (in, in) and the mean m = E[x] (in,), in the memory of the former."""
    squares = gram.diagonal().clone()
    return _above_rounding(gram.addr_(mean, mean, alpha=-1), squares)


def _above_rounding(centred: Tensor, squares: Tensor) -> Tensor:
    """A difference from a Gram matrix, in place; where nothing but rounding is left of it, nearly a multiple of the identity.

    Of an input that never varies the inverse of rounding would make products of arbitrary size.

    Args:
        centred: the difference, shape (in, in).
        squares: the diagonal of the Gram matrix, shape (in,).
    """
    centred.diagonal().clamp_(min=1e-14 * squares)  # constant channels, whose variance may be negative
    least = LEAST_VARIANCE * squares.mean()
    if centred.diagonal().mean() < least:
        centred.diagonal().add_(least)
    return centred


def _packed(key: str, tensor: Tensor) -> Tensor:
    """A Gram matrix, or the diagonal of one, of a file in which they are whole, as it is kept now."""
    if tensor.ndim != 2:
        return tensor
    if tensor.shape[0] != tensor.shape[1]:
        raise ValueError(f"{key} is no square matrix")
    return pack(tensor)


def _united(one: Mapping[str, Record], two: Mapping[str, Record]) -> dict[str, Record]:
    """The records of both, added up where both have one."""
    return {**one, **two, **{name: one[name] + two[name] for name in one.keys() & two.keys()}}


def _parts(records: Mapping[str, Sums], fields: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Records as parts of the file: part → name of a record → its field."""
    return {part: {name: getattr(record, field) for name, record in records.items()} for part, field in fields.items()}


def _records(make: type[Record], fields: Mapping[str, str], parts: dict[str, dict[str, Any]]) -> dict[str, Record]:
    """The records that some parts of the file hold, which are taken out of `parts`."""
    columns = {field: parts.pop(part) for part, field in fields.items()}
    first, *others = (column.keys() for column in columns.values())
    if any(other != first for other in others):
        raise ValueError(f"{', '.join(fields)} are not of the same modules")
    return {name: make(**{field: column[name] for field, column in columns.items()}) for name in first}


def weight_norm(module: nn.Module) -> float:
    """‖W‖_F of a layer, or of the product in its place."""
    if isinstance(module, Wrapper):
        weight = module.computed_matrix()
    else:
        weight = layer_kind(module).own_matrix(module) if is_quantized(module) else stored_weight(module).detach()
    return float(torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))


def _check_norm(name: str, expected: float, got: float, tolerance: float = 1e-4) -> None:
    if abs(got - expected) > tolerance * max(got, expected):
        raise ValueError(
            f"{name}: the statistics are of a weight of norm {expected:.6g}, and this one has {got:.6g}; they are of another "
            "model."
        )


Batches: TypeAlias = Iterable[Mapping[str, Any]] | Statistics
