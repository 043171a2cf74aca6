"""What is known of a run, as one JSON file: what was asked for, what came of it, and what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, cast

from peft import PeftModel

from ..arguments import check_count, check_text, is_number
from ..config.reparam_config import ReparamConfig
from ..numerics.storage import AS_THE_MODEL
from ..planning.module_plan import ModulePlan
from ..planning.plan import Plan
from ..runtime.files import write_whole
from ..runtime.json_files import parse_json, read_json
from ..runtime.run_folder import LOG, PLAN, SETTINGS
from ..searching.result import SearchResult
from ..tuner.model import ReparamModel, config_of
from ..tuner.sizes import SizeReport
from .angles import mean_input_angles

FORMAT = "reparam_peft record 1"
RECORD = "reparam_run.json"
SAMPLE_KEYS = {"prompt", "dense", "compressed"}
# Which JSON type each part of a record has.
KINDS: dict[str, type | tuple[type, ...]] = {
    "plan": dict,
    "model": str,
    "settings": dict,
    "sizes": (dict, NoneType),
    "evaluation": dict,
    "search": (dict, NoneType),
    "blocks": list,
    "losses": list,
    "samples": list,
    "speed": (dict, NoneType),
    "angles": dict,
}


@dataclass(frozen=True)
class Record:
    """What is known of a run; every part but the plan may be missing. `write_report` shows it.

    Attributes:
        plan: shape, rank and size of each target, and where it was calibrated, what each direction is predicted to cost.
        model: name of the dense model.
        settings: fields of the config that differ from their defaults.
        sizes: as `SizeReport.to_dict` gives it.
        evaluation: figures by name, those of the dense model as "dense …".
        search: trials of a search, without its plan and model.
        blocks: lines of the log of a run block by block.
        losses: training losses of tenths of a healing.
        samples: `{"prompt", "dense", "compressed"}`: continuations of the same text.
        speed: as `Benchmark.to_dict` gives it, with the dense model as baseline.
        angles: module kind → depth → mean principal angle to the next layer's kept inputs, in radians.
    """

    plan: Plan
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    search: SearchResult | None = None
    blocks: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    speed: dict[str, Any] | None = None
    angles: dict[str, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: PeftModel,
        *,
        plan: Plan | None = None,
        search: SearchResult | None = None,
        evaluation: Mapping[str, float] | None = None,
        run_folder: str | Path | None = None,
        samples: Sequence[Mapping[str, str]] = (),
        angles: bool = True,
    ) -> Record:
        """The record of a compressed model.

        Args:
            model: with an adapter of this package, of which the active one is meant.
            plan: that it was made by; None: ranks and sizes as they are, without predictions.
            search: that it was found by.
            evaluation: figures by name; None: those in the adapter's config.
            run_folder: of `compress(…, run_folder=…)`, for the errors of the blocks.
            samples: continuations by both models.
            angles: whether to take principal angles, at the cost of a singular value decomposition of each B.

        Raises:
            TypeError: the model is none of this package.
            ValueError: the plan is of other ranks, a sample has other keys, or the run folder holds no log.
        """
        if not isinstance(getattr(model, "base_model", None), ReparamModel):
            raise TypeError(f"`model` must be a PeftModel of a ReparamConfig, got a {type(model).__name__}.")
        adapter = model.active_adapters[0]
        config = config_of(model, adapter)
        sizes: SizeReport = model.size_report(adapter)
        if plan is not None and (plan.ranks != config.rank_pattern or sorted(plan.dense_modules) != config.dense_modules):
            raise ValueError("`plan` has other ranks than the model; give the one that it was made by, or none.")
        for sample in samples:
            if set(sample) != SAMPLE_KEYS:
                raise ValueError(f"a sample has the keys {sorted(SAMPLE_KEYS)}, got {sorted(sample)}.")
        return cls(
            plan=plan or _bare_plan(config, sizes),
            model=config.base_model_name_or_path or type(model.get_base_model()).__name__,
            settings=_settings(config),
            sizes=sizes.to_dict(),
            evaluation=dict(config.evaluation or {} if evaluation is None else evaluation),
            search=None if search is None else SearchResult.from_dict(search.to_dict()),
            blocks=[] if run_folder is None else _blocks(Path(run_folder)),
            samples=[dict(sample) for sample in samples],
            angles=mean_input_angles(model, adapter) if angles else {},
        )

    @property
    def excess_loss(self) -> float | None:
        """Measured increase of the loss, nats per token: ln of perplexity over that of the dense model; None: not measured."""
        after, before = (self.evaluation.get(name, 0.0) for name in ("perplexity", "dense perplexity"))
        return math.log(after / before) if 0 < after < math.inf and 0 < before < math.inf else None

    @property
    def predictions(self) -> list[tuple[str, float, float]]:
        """(label, predicted, measured) increase of the loss wherever both are known."""
        points = []
        if self.search is not None and self.search.metric == "perplexity":
            for trial in self.search.trials:
                if trial.predicted_loss is not None and math.isfinite(trial.metric):
                    measured = math.log(trial.metric / self.search.dense_metric)
                    points.append((f"trials, {trial.method}", trial.predicted_loss, measured))
        trained = bool(self.losses) or any(block.get("after") is not None for block in self.blocks)  # which nothing predicts
        if self.plan.predicted_loss is not None and self.excess_loss is not None and not trained:
            points.append(("this model", self.plan.predicted_loss, self.excess_loss))
        return points

    def with_(self, **parts: Any) -> Record:
        """A copy with other parts."""
        return replace(self, **parts)

    def save(self, path: str | Path) -> None:
        """Write it as JSON: costs of directions with four digits, numbers that are not finite as null."""
        parts: dict[str, Any] = {part.name: getattr(self, part.name) for part in fields(self)}
        parts["search"] = None if self.search is None else self.search.to_dict()
        plan: dict[str, Any] = self.plan.to_dict()
        for module in plan["modules"]:
            module["spectrum"] = [float(f"{value:.4g}") for value in module["spectrum"]]
        parts["plan"] = plan
        write_whole(Path(path), json.dumps(_finite({"format": FORMAT, **parts}), allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no record, or a field of it is wrong.
        """
        parts = read_json(path)
        try:
            return cls._from_dict(parts)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} does not hold the record of a run: {error}") from error

    @classmethod
    def _from_dict(cls, parts: dict[str, Any]) -> Record:
        """The record of what `save` wrote, each part checked; null in place of a number is NaN."""
        if parts.pop("format", None) != FORMAT:
            raise ValueError(f"`format` must be {FORMAT!r}.")
        for name, kind in KINDS.items():
            if not isinstance(parts[name], kind):
                raise ValueError(f"`{name}` has the wrong type, {type(parts[name]).__name__}.")
        for sample in parts["samples"]:
            if set(sample) != SAMPLE_KEYS or not all(isinstance(words, str) for words in sample.values()):
                raise ValueError(f"samples must have texts as {sorted(SAMPLE_KEYS)}.")
        for sizes in (parts["sizes"] or {}).values():
            for name in ("dense_parameters", "stored_parameters", "dense_bytes", "stored_bytes"):
                check_count(name, sizes[name], least=0)
        parts["blocks"] = list(map(_block, parts["blocks"]))
        for speed in (parts["speed"] or {}, (parts["speed"] or {}).get("baseline") or {}):
            for name in ("prefill_ms", "decode_ms", "peak_bytes"):
                _number(speed.get(name))
        parts["losses"] = [_number(loss) for loss in parts["losses"]]
        parts["plan"] = Plan.from_dict(parts["plan"])
        parts["search"] = None if parts["search"] is None else SearchResult.from_dict(parts["search"])
        parts["evaluation"] = {measure: _number(value) for measure, value in parts["evaluation"].items()}
        parts["angles"] = {
            kind: {int(depth): _number(angle) for depth, angle in by_depth.items()}
            for kind, by_depth in parts["angles"].items()
        }
        return cls(**parts)


def record_of_adapter(folder: str | Path, model: PeftModel) -> Record:
    """The record in the folder that an adapter was loaded from, or a new one where there is none of an adapter with its ranks.

    Raises:
        ValueError: there is one, and it is damaged.
    """
    saved, new = read_record(folder), Record.of(model, angles=False)
    return saved if saved is not None and saved.plan.ranks == new.plan.ranks else new


def read_record(folder: str | Path) -> Record | None:
    """The record in a folder that a command or `compress(…, run_folder=…)` wrote; None where there is none.

    Raises:
        ValueError: there is one, and it is damaged.
    """
    folder = Path(folder)
    if (folder / RECORD).exists():
        return Record.load(folder / RECORD)
    if (folder / SETTINGS).exists() and (folder / PLAN).exists():
        settings = read_json(folder / SETTINGS)
        try:
            config = ReparamConfig(**{key: value for key, value in settings["config"].items() if key in _chosen_fields()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder / SETTINGS} does not hold the settings of a run: {error}") from error
        return Record(Plan.load(folder / PLAN), settings=_settings(config), blocks=_blocks(folder))
    return None


def saving_with(record: Record) -> Callable[[Any, Path], None]:
    """How to save a model with its record."""

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        record.save(folder / RECORD)

    return save


def _finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: object) -> float:
    """A number of JSON, in which null stands for what is not finite."""
    if value is not None and not is_number(value):
        raise ValueError(f"there must be a number, got {value!r}.")
    return math.nan if value is None else float(value)


def _block(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of the log of a run block by block, its errors checked."""
    check_text("block", entry["block"])
    for key in ("original", "before", "after"):
        _number(entry.get(key))
    return entry


def _bare_plan(config: ReparamConfig, sizes: SizeReport) -> Plan:
    """Ranks and sizes as they are in a model, without predictions."""
    left = {name: (size[0], size[1]) for name, size in (config.sizes or {}).items()}
    return Plan(
        modules=tuple(
            ModulePlan(
                m.name,
                m.shape,
                m.rank,
                m.stored_parameters,
                size=left.get(m.name),
                form=None if m.rank is None else config.form_pattern.get(m.name, config.form),
                bits=config.bit_pattern.get(m.name, AS_THE_MODEL),
                stored_bytes=m.stored_bytes,
                dense_bytes=m.dense_bytes,
            )
            for m in sizes.matrices
        ),
        keep=config.keep if config.chooses_bits else sizes.keep,
        method=cast(str, config.method),  # an adapter's config has none of the defaults open
        allocation=cast(str, config.allocation),
        form=cast(str, config.form),
        moved_bias=config.moved_bias,
        calibration_tokens=config.calibration_tokens or 0,
        gradient_tokens=config.gradient_tokens or 0,
        seed=config.seed or 0,
        budget=config.budget or "parameters",
        correction_bits=config.correction_bits,
    )


def _chosen_fields() -> set[str]:
    """Fields of a config that a person chooses, not those that compression fills in or PEFT adds."""
    chosen = {f.name for f in fields(ReparamConfig) if f.init and not f.metadata.get("help", "").startswith("Filled in")}
    return chosen - {"peft_type", "peft_version"}


def _settings(config: ReparamConfig) -> dict[str, Any]:
    """Fields that were set, and what they are now; without what the plan shows, and what names the model."""
    defaults = ReparamConfig().to_dict()
    shown = {"rank_pattern", "dense_modules", "base_model_name_or_path", "evaluation", "inference_mode", "auto_mapping"}
    chosen = {name: value for name, value in config.to_dict().items() if name in _chosen_fields() - shown}
    return {name: value for name, value in chosen.items() if value != defaults.get(name) or name in ("keep", "method")}


def _blocks(folder: Path) -> list[dict[str, Any]]:
    path = folder / LOG
    if not path.exists():
        raise ValueError(f"{folder} holds no {LOG}, and so no run block by block.")
    lines = [parse_json(line, path) for line in path.read_bytes().splitlines()]
    try:
        return [_block(line) for line in lines if "block" in line]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold the log of a run: {error}") from error
