"""`ReparamConfig`: what to factorise, to which size, and how."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType

from ..numerics.storage import FORMS
from .checks import check_regex, check_weights
from .fields import ALLOCATIONS, INPUT_METRICS, METHODS, OUTPUT_METRICS
from .model_card import update_model_card


@dataclass
class ReparamConfig(PeftConfig):
    """Replace each target weight W (out, in) by a product A B of low rank, and drop W.

    `model.peft_config[adapter_name]` is a copy of the config that was passed, in which what was resolved is filled in:
    `method`, `allocation`, `form`, one rank per module in `rank_pattern`, `dense_modules`, and the sizes. The copy is what
    `save_pretrained` writes, so that loading computes nothing.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of its range, two fields exclude each other, or a value needs what this version lacks.

    >>> ReparamConfig(target_modules=["query", "key", "value"], r=64).r
    64
    """

    quant_method: ClassVar[str] = "reparam_on_load"  # by which transformers finds what compresses while loading

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to factorise: a list of name endings, a regular expression, or 'all-linear'. None: the attention "
            "and MLP projections of the known architectures."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: a list of name endings or a regular expression."}
    )
    r: int | str | None = field(
        default=None,
        metadata={
            "help": "One rank for all targets; 'full': every matrix at rank min(out, in), exactly the original function; "
            "None: `keep` decides. A matrix that rank `r` would not make smaller stays dense."
        },
    )
    keep: float = field(
        default=0.8,
        metadata={"help": "Fraction of the targeted parameters that is stored, 0 < keep <= 1. Used where `r` is None."},
    )
    method: str | None = field(
        default=None,
        metadata={
            "help": "How to factorise: 'svd', or with calibration data 'whitened' or 'autoencoder'. None: 'svd' "
            "in `get_peft_model`, 'whitened' in `compress`."
        },
    )
    allocation: str | None = field(
        default=None,
        metadata={
            "help": "How to choose ranks: 'uniform', or with calibration data 'loss', by the predicted loss. None: "
            "'uniform' in `get_peft_model` and where `r` is given, 'loss' in `compress`."
        },
    )
    form: str | None = field(
        default=None,
        metadata={
            "help": "How the product is stored: 'factors' (A, B), or 'pivot': r of its rows and the coefficients of the "
            "others, which takes fewer numbers. None: 'factors' in `get_peft_model`, 'pivot' in `compress`."
        },
    )
    input_metric: str | None = field(
        default=None,
        metadata={
            "help": "How a calibrated method weighs errors over the inputs: by their 'gram' matrix, with the 'fisher' output "
            "metric one tenth weighed by the gradients there; 'diagonal', by the root of its diagonal (ASVD); or 'none'. "
            "None: 'gram'."
        },
    )
    output_metric: str | None = field(
        default=None,
        metadata={
            "help": "How a calibrated method weighs errors over the outputs: by the 'fisher' matrix of the gradients there; "
            "'diagonal', by its diagonal (FWSVD); or 'none' (SVD-LLM). None: 'fisher'."
        },
    )
    shrinkage: float | None = field(
        default=None,
        metadata={"help": "Part of the input metric, in [0, 1], replaced by the identity. None: by the number of tokens."},
    )
    output_shrinkage: float | None = field(
        default=None,
        metadata={"help": "Likewise for the output metric. None: by the number of tokens."},
    )
    rank_multiple: int | None = field(
        default=None,
        metadata={
            "help": "What ranks are a multiple of with `allocation='loss'`. None: 8, and 1 for matrices with a side below 64."
        },
    )
    floor: float | None = field(
        default=None,
        metadata={"help": "The least fraction of a matrix that `allocation='loss'` stores, 0 <= floor < 1. None: 0."},
    )
    ceiling: float | None = field(
        default=None,
        metadata={
            "help": "The most that it stores of a matrix, floor <= ceiling <= 1; below 1 only matrices too small for any "
            "product stay dense. None: 1."
        },
    )
    keep_base: bool = field(
        default=False,
        metadata={
            "help": "Keep W beside the factors, so that `disable_adapter()` and `unload()` work. This saves no memory; it "
            "gives a teacher."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Rank per module: exact names, or regular expressions that match the end of a name. Comes before `r` and "
            "`keep`, and is obeyed even where the factors are larger than the matrix."
        },
    )
    dense_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Exact names of targets that keep their dense weight; they count toward `keep` in full."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to factorise; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the module list that `layers_to_transform` counts in, e.g. 'layers' or 'h'."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved whole beside the factors, e.g. a new classifier."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "False: random factors of the weight's norm instead of its decomposition, for tests and baselines."},
    )
    dense_parameters: int | None = field(
        default=None, metadata={"help": "Filled in: parameters of the targeted matrices before."}
    )
    stored_parameters: int | None = field(
        default=None, metadata={"help": "Filled in: parameters stored for them, dense ones included."}
    )
    dense_bytes: int | None = field(default=None, metadata={"help": "Filled in: bytes of the targeted matrices before."})
    stored_bytes: int | None = field(
        default=None, metadata={"help": "Filled in: bytes stored for them in the base model's dtype, dense ones included."}
    )
    moved_bias: bool = field(
        default=False,
        metadata={"help": "Filled in: whether factorised modules with a bias hold one of their own, moved by E[(W - AB) x]."},
    )
    calibration_tokens: int | None = field(
        default=None, metadata={"help": "Filled in: input rows that the statistics were taken of."}
    )
    gradient_tokens: int | None = field(
        default=None, metadata={"help": "Filled in: labels sampled for the gradients that the statistics were taken of."}
    )
    seed: int | None = field(default=None, metadata={"help": "Filled in: the seed of the sampled labels."})
    predicted_loss: float | None = field(
        default=None, metadata={"help": "Filled in: predicted increase of the loss, nats per token."}
    )
    smaller_keeps: list[float] | None = field(
        default=None,
        metadata={
            "help": "Filled in: smaller sizes at which `from_pretrained(..., keep=...)` loads the adapter, from large to small."
        },
    )
    smaller_ranks: dict[str, list[int | None]] | None = field(
        default=None, metadata={"help": "Filled in: rank per module at each of these sizes; None: dense."}
    )
    evaluation: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Figures for the model card, e.g. {'dense perplexity': 19.4, 'perplexity': 25.4}; set by you."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.REPARAM
        # `from_pretrained` makes the config out of a file, where PEFT always writes inference_mode=True.
        self._made_for_inference = self.inference_mode
        self._from_file = self.stored_parameters is not None
        self.ranks_in_file: dict[str, int] = {}  # where the file is loaded at a smaller size
        self._check_size()
        self._check_choices()
        self._check_calibration()
        self._check_modules()
        self._check_filled_in()

    @property
    def loading(self) -> bool:
        """Whether weights from a checkpoint are about to follow, so that nothing needs to be decomposed.

        True for a config out of a checkpoint, and for one that `PeftModel.from_pretrained(config=...)` switched to inference
        after it was made.
        """
        return (self._from_file and self._made_for_inference) or (self.inference_mode and not self._made_for_inference)

    def module_rank(self, name: str) -> int | None:
        """The entry of `rank_pattern` for a module: its exact name before any pattern, as PEFT matches patterns."""
        if name in self.rank_pattern:
            return self.rank_pattern[name]
        return next((rank for key, rank in self.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, *, keep: float | None = None, **kwargs: Any
    ) -> ReparamConfig:
        """PEFT's loading of `adapter_config.json`, plus a look at the weights beside it, before any model is touched.

        Args:
            pretrained_model_name_or_path, subfolder, kwargs: as for PEFT.
            keep: load the adapter at the largest of `smaller_keeps` that is no larger, without data: of each product the first
                columns of A and rows of B, or the base model's matrix. `PeftModel.from_pretrained(base, folder, keep=0.7)`
                does so.

        Raises:
            ValueError: there is no config; a field is wrong; the weights, in a local folder, are truncated, damaged or of
                other ranks than the config; or the adapter cannot be loaded at this size.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if isinstance(config, ReparamConfig) and weights.is_file():
            check_weights(weights, config.rank_pattern, config.form)
        if keep is not None:
            config._make_smaller(keep)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that JSON can hold; sets as sorted lists, so that equal configs make equal files."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; when a model is being saved, also its sizes and how to load it into the model card."""
        saving_model = "auto_mapping_dict" in kwargs  # PEFT passes it from `PeftModel.save_pretrained` only
        super().save_pretrained(save_directory, **kwargs)
        if saving_model:
            update_model_card(save_directory, self)

    def _make_smaller(self, keep: float) -> None:
        """The ranks of a smaller size in place of those in the file."""
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= self.keep:
            raise ValueError(f"`keep` must be a number in (0, {self.keep:g}], what the adapter was made with, got {keep!r}.")
        if keep == self.keep:
            return
        if self.smaller_keeps is None or self.smaller_ranks is None:
            raise ValueError(
                f"`keep={keep}`: the adapter does not know its ranks at smaller sizes. Those made by `compress` with "
                "`form='factors'`, a `ceiling` below 1 and not by an autoencoder do; load others whole, and call "
                "`retruncate(model, keep, batches)`."
            )
        index = next((i for i, size in enumerate(self.smaller_keeps) if size <= keep * (1 + 1e-12)), None)
        if index is None:
            least = [self.keep, *self.smaller_keeps][-1]
            raise ValueError(f"`keep` must be at least {least:g}, the adapter's smallest size, got {keep!r}.")
        self.ranks_in_file = self.rank_pattern
        ranks = {name: own[index] for name, own in self.smaller_ranks.items()}
        self.rank_pattern = {name: rank for name, rank in ranks.items() if rank is not None}
        self.dense_modules = sorted({*(self.dense_modules or []), *(ranks.keys() - self.rank_pattern.keys())})
        self.keep, self.smaller_keeps, self.smaller_ranks = self.smaller_keeps[index], None, None
        self.evaluation = self.predicted_loss = None  # of the larger size

    def _check_size(self) -> None:
        if not (self.r is None or self.r == "full"):
            if isinstance(self.r, bool) or not isinstance(self.r, int):
                raise TypeError(f"`r` must be a positive int, 'full' or None, got {self.r!r}.")
            if self.r < 1:
                raise ValueError(f"`r` must be a positive int, 'full' or None, got {self.r!r}.")
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)):
            raise TypeError(f"`keep` must be a number in (0, 1], got {self.keep!r}.")
        if not 0 < self.keep <= 1:
            raise ValueError(f"`keep` must be in (0, 1], the fraction of the parameters that is stored; got {self.keep!r}.")
        if not isinstance(self.rank_pattern, dict):
            raise TypeError(f"`rank_pattern` must be a dict of module name to rank, got {self.rank_pattern!r}.")
        for name, rank in self.rank_pattern.items():
            if not isinstance(name, str) or isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"`rank_pattern` must map module names to ints, got {name!r}: {rank!r}.")
            if rank < 1:
                raise ValueError(f"`rank_pattern` must hold ranks of at least 1, got {name!r}: {rank}.")
            check_regex("rank_pattern", name)

    def _check_choices(self) -> None:
        for name, value, allowed in (
            ("method", self.method, METHODS),
            ("allocation", self.allocation, ALLOCATIONS),
            ("form", self.form, FORMS),
            ("input_metric", self.input_metric, INPUT_METRICS),
            ("output_metric", self.output_metric, OUTPUT_METRICS),
        ):
            if value is not None and value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))} or None, got {value!r}.")
        for name in ("keep_base", "init_weights", "inference_mode", "moved_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")

    def _check_calibration(self) -> None:
        for name in ("shrinkage", "output_shrinkage", "floor", "ceiling"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"`{name}` must be a number in [0, 1] or None, got {value!r}.")
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {value!r}.")
        if self.rank_multiple is not None and (isinstance(self.rank_multiple, bool) or not isinstance(self.rank_multiple, int)):
            raise TypeError(f"`rank_multiple` must be a positive int or None, got {self.rank_multiple!r}.")
        if self.rank_multiple is not None and self.rank_multiple < 1:
            raise ValueError(f"`rank_multiple` must be a positive int or None, got {self.rank_multiple!r}.")
        floor, ceiling = self.floor or 0.0, 1.0 if self.ceiling is None else self.ceiling
        if floor >= 1 or floor > ceiling:
            raise ValueError(f"`floor` must be below 1 and at most `ceiling`, got {floor!r} and {ceiling!r}.")
        exempt = self.rank_pattern or self.dense_modules
        if self.allocation != "uniform" and self.r is None and not (self._from_file or exempt) and floor > self.keep:
            raise ValueError(f"`floor` must be at most `keep`, got {floor!r} and {self.keep!r}.")
        if self.r is not None and self.allocation == "loss":
            raise ValueError(f"`r={self.r!r}` fixes the ranks, and `allocation='loss'` chooses them under `keep`; give one.")
        # What would have no effect is refused.
        without_loss = self.allocation == "uniform" or self.r is not None
        for name in ("rank_multiple", "floor", "ceiling"):
            if without_loss and getattr(self, name) is not None:
                raise ValueError(f"`{name}` has an effect with `allocation='loss'` only; leave it out.")
        for name in ("input_metric", "output_metric", "shrinkage", "output_shrinkage"):
            if self.method == "svd" and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` has an effect with a calibrated method only, not with `method='svd'`; leave it out."
                )
        if without_loss and self.output_metric == "none" and not self._from_file:  # gradients are of no use
            if self.output_shrinkage is not None:
                raise ValueError(
                    "`output_shrinkage` has no effect with uniform ranks and `output_metric='none'`; leave it out."
                )
            if self.input_metric == "none" and self.shrinkage is not None:
                raise ValueError("`shrinkage` has no effect with uniform ranks and without metrics; leave it out.")

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "dense_modules"):
            value = getattr(self, name)
            allows_str = name not in ("modules_to_save", "dense_modules")
            if value is None or (allows_str and isinstance(value, str)):
                continue
            if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) and item for item in value):
                raise TypeError(f"`{name}` must be a {'str or ' * allows_str}list of module names, got {value!r}.")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a str, got {self.target_modules!r}; write the "
                        "layers into the expression, or list the module names."
                    )
            check_regex("target_modules", self.target_modules)
        if isinstance(self.exclude_modules, str):
            check_regex("exclude_modules", self.exclude_modules)
        indices = self.layers_to_transform
        for index in indices if isinstance(indices, (list, tuple)) else [indices]:
            if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
                raise TypeError(f"`layers_to_transform` must be an int or a list of ints, got {indices!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` has no effect without `layers_to_transform`; set both or neither.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))

    def _check_filled_in(self) -> None:
        counts = (
            "dense_parameters",
            "stored_parameters",
            "dense_bytes",
            "stored_bytes",
            "calibration_tokens",
            "gradient_tokens",
        )
        for name in (*counts, "seed"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise TypeError(f"`{name}` is filled in by the model and must be a count or None, got {value!r}.")
        loss = self.predicted_loss
        if loss is not None and (isinstance(loss, bool) or not isinstance(loss, (int, float)) or not math.isfinite(loss)):
            raise TypeError(f"`predicted_loss` is filled in by `compress` and must be a finite number or None, got {loss!r}.")
        self._check_smaller()
        figures = self.evaluation
        if figures is not None and not (
            isinstance(figures, dict)
            and all(isinstance(k, str) and isinstance(v, (int, float)) and math.isfinite(v) for k, v in figures.items())
        ):
            raise TypeError(f"`evaluation` must be a dict of names to finite numbers, got {figures!r}.")

    def _check_smaller(self) -> None:
        keeps, ranks = self.smaller_keeps, self.smaller_ranks
        if keeps is None and ranks is None:
            return
        if not (isinstance(keeps, list) and all(isinstance(k, float) and 0 < k < self.keep for k in keeps)):
            raise TypeError(f"`smaller_keeps` is filled in by `compress` and must hold fractions below `keep`, got {keeps!r}.")
        if keeps != sorted(set(keeps), reverse=True):
            raise ValueError(f"`smaller_keeps` must be from large to small, got {keeps!r}.")
        if not isinstance(ranks, dict) or set(ranks) != set(self.rank_pattern):
            raise ValueError("`smaller_ranks` must be a dict of the modules in `rank_pattern`.")
        for name, own in ranks.items():
            if not isinstance(own, list) or len(own) != len(keeps) or not all(type(rank) in (int, type(None)) for rank in own):
                raise TypeError(f"`smaller_ranks` must hold {len(keeps)} ints or None for {name!r}, got {own!r}.")
            if not all(rank is None or 1 <= rank <= self.rank_pattern[name] for rank in own):
                raise ValueError(f"`smaller_ranks` must be in [1, {self.rank_pattern[name]}] for {name!r}, got {own!r}.")
