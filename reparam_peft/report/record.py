"""What is known of a run, as one JSON file: what was asked for, what came of it, and what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..config.reparam_config import ReparamConfig
from ..planning.plan import ModulePlan, Plan
from ..runtime.files import write_whole
from ..runtime.run_folder import LOG, PLAN, SETTINGS
from ..searching.result import SearchResult
from ..tuner.model import ReparamModel
from .angles import mean_input_angles

FORMAT = "reparam_peft record 1"
RECORD = "reparam_run.json"
SAMPLE_KEYS = {"prompt", "dense", "compressed"}
NONE = type(None)
KINDS = {
    **{"plan": dict, "model": str, "settings": dict, "sizes": (dict, NONE), "evaluation": dict, "search": (dict, NONE)},
    **{"blocks": list, "losses": list, "samples": list, "speed": (dict, NONE), "angles": dict},
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
        config, sizes = model.peft_config[adapter], model.size_report(adapter)
        if plan is not None and (plan.ranks != config.rank_pattern or sorted(plan.dense_modules) != config.dense_modules):
            raise ValueError("`plan` has other ranks than the model; give the one that it was made by, or none.")
        for sample in samples:
            if set(sample) != SAMPLE_KEYS:
                raise ValueError(f"a sample has the keys {sorted(SAMPLE_KEYS)}, got {sorted(sample)}.")
        modules = [ModulePlan(m.name, m.shape, m.rank, m.stored_parameters) for m in sizes.matrices]
        provenance = {name: getattr(config, name) or 0 for name in ("calibration_tokens", "gradient_tokens", "seed")}
        bare = Plan(tuple(modules), sizes.keep, config.method, config.allocation, config.form, config.moved_bias, **provenance)
        return cls(
            plan=plan or bare,
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
        pair = [self.evaluation.get(name) for name in ("perplexity", "dense perplexity")]
        return math.log(pair[0] / pair[1]) if all(value and 0 < value < math.inf for value in pair) else None

    @property
    def predictions(self) -> list[tuple[str, float, float]]:
        """(label, predicted, measured) increase of the loss wherever both are known."""
        found = []
        if self.search is not None and self.search.metric == "perplexity":
            for trial in self.search.trials:
                if trial.predicted_loss is not None and math.isfinite(trial.metric):
                    label = f"trials, {trial.method}"
                    found.append((label, trial.predicted_loss, math.log(trial.metric / self.search.dense_metric)))
        trained = bool(self.losses) or any(block.get("after") is not None for block in self.blocks)  # which nothing predicts
        if self.plan.predicted_loss is not None and self.excess_loss is not None and not trained:
            found.append(("this model", self.plan.predicted_loss, self.excess_loss))
        return found

    def with_(self, **parts: Any) -> Record:
        """A copy with other parts."""
        return replace(self, **parts)

    def save(self, path: str | Path) -> None:
        """Write it as JSON: costs of directions with four digits, numbers that are not finite as null."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        kept["search"] = None if self.search is None else self.search.to_dict()
        plan = self.plan.to_dict()
        for module in plan["modules"]:
            module["spectrum"] = [float(f"{value:.4g}") for value in module["spectrum"]]
        kept["plan"] = plan
        write_whole(Path(path), json.dumps(_finite({"format": FORMAT, **kept}), allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no record, or a field of it is wrong.
        """
        try:
            return cls._from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} does not hold the record of a run: {error}") from error

    @classmethod
    def _from_dict(cls, found: dict[str, Any]) -> Record:
        if found.pop("format", None) != FORMAT:
            raise ValueError(f"`format` must be {FORMAT!r}.")
        for key, kind in KINDS.items():
            if not isinstance(found[key], kind):
                raise ValueError(f"`{key}` has the wrong type, {type(found[key]).__name__}.")
        for sample in found["samples"]:
            if set(sample) != SAMPLE_KEYS or not all(isinstance(words, str) for words in sample.values()):
                raise ValueError(f"samples must have texts as {sorted(SAMPLE_KEYS)}.")
        if found["sizes"] is not None and not all(isinstance(sizes["stored_bytes"], int) for sizes in found["sizes"].values()):
            raise ValueError("`sizes` must hold numbers.")
        if not all(isinstance(block, dict) for block in found["blocks"]):
            raise ValueError("`blocks` must hold lines of a log.")
        found["losses"] = [math.nan if loss is None else float(loss) for loss in found["losses"]]
        found["plan"] = Plan.from_dict(found["plan"])
        found["search"] = found["search"] and SearchResult.from_dict(found["search"])
        found["evaluation"] = {k: math.nan if v is None else float(v) for k, v in found["evaluation"].items()}
        found["angles"] = {
            kind: {int(depth): math.nan if angle is None else float(angle) for depth, angle in by_depth.items()}
            for kind, by_depth in found["angles"].items()
        }
        return cls(**found)


def record_of_adapter(folder: str | Path, model: PeftModel) -> Record:
    """The record in the folder that an adapter was loaded from, or a new one where there is none of an adapter with its ranks.

    Raises:
        ValueError: there is one, and it is damaged.
    """
    found, own = read_record(folder), Record.of(model, angles=False)
    return found if found is not None and found.plan.ranks == own.plan.ranks else own


def read_record(folder: str | Path) -> Record | None:
    """The record in a folder that a command or `compress(…, run_folder=…)` wrote; None where there is none.

    Raises:
        ValueError: there is one, and it is damaged.
    """
    folder = Path(folder)
    if (folder / RECORD).exists():
        return Record.load(folder / RECORD)
    if (folder / SETTINGS).exists() and (folder / PLAN).exists():
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            config = ReparamConfig(**{key: value for key, value in settings["config"].items() if key in _own_fields()})
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


def _own_fields() -> set[str]:
    return {f.name for f in fields(ReparamConfig) if f.init and not f.metadata.get("help", "").startswith("Filled in")} - {
        "peft_type",
        "peft_version",
    }


def _settings(config: ReparamConfig) -> dict[str, Any]:
    """Fields that were set, and what they are now; without what the plan shows, and what names the model."""
    plain = ReparamConfig().to_dict()
    shown = {"rank_pattern", "dense_modules", "base_model_name_or_path", "evaluation", "inference_mode", "auto_mapping"}
    own = {key: value for key, value in config.to_dict().items() if key in _own_fields() - shown}
    return {key: value for key, value in own.items() if value != plain.get(key) or key in ("keep", "method")}


def _blocks(folder: Path) -> list[dict[str, Any]]:
    path = folder / LOG
    if not path.exists():
        raise ValueError(f"{folder} holds no {LOG}, and so no run block by block.")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "block" in line]
