"""`ReparamConfig`: what to factorise, to which size, and how."""

from __future__ import annotations

import copy
import re
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType

from ..arguments import is_number
from .checks import check_fields, check_plain, check_weights
from .fields import Fields
from .model_card import update_model_card


@dataclass
class ReparamConfig(Fields):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        # A file has it as text, and nobody else gives it, but for copies of configs, which have the enum's member.
        read_from_file = type(self.peft_type) is str
        self.peft_type = PeftType["REPARAM"]
        # `from_pretrained` makes the config out of a file, where PEFT always writes inference_mode=True.
        self._made_for_inference = self.inference_mode
        self._from_file = self.stored_parameters is not None
        # Names of the modules that were chosen for a model; None: those that `target_modules` matches.
        self._among: frozenset[str] | None = getattr(self, "_among", None)
        self._alone: bool | None = getattr(self, "_alone", None)
        self.ranks_in_file: dict[str, int] = {}  # where the file is loaded at a smaller size
        check_fields(self, from_file=self._from_file)
        if read_from_file and not self._from_file:
            check_plain(self)
        for name in ("target_modules", "exclude_modules"):  # as PEFT keeps them, so that equal configs are equal
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if self.bits is not None:
            self.bits = tuple(sorted(self.bits, reverse=True))  # of a file, which has a list, too
        # The modules of an adapter out of a checkpoint.
        self._in_file = {*self.rank_pattern, *(self.dense_modules or ())} if self._from_file else None
        if self._from_file:
            self._name_targets()

    @property
    def loading(self) -> bool:
        """Whether weights from a checkpoint are about to follow, so that nothing needs to be decomposed.

        True for a config out of a checkpoint, and for one that `PeftModel.from_pretrained(config=...)` switched to inference
        after it was made.
        """
        return (self._from_file and self._made_for_inference) or (self.inference_mode and not self._made_for_inference)

    @property
    def is_resolved(self) -> bool:
        """Whether a model has filled in what each of its modules gets, so that `rank_pattern` holds exact names only."""
        return self.stored_parameters is not None

    def is_of_adapter(self, name: str) -> bool:
        """Whether a module is one that a config out of a checkpoint has a product for or leaves dense; else True."""
        return self._in_file is None or name in self._in_file

    def is_of_parameters(self, name: str) -> bool:
        """Whether a module is of `target_parameters`, resolved: a layer of an opened parameter, or one whose weight it is."""
        parameters = self.target_parameters
        if not parameters or isinstance(parameters, str):
            return False
        weight = f"{name}.weight"  # of a layer, or one that was opened, and has a pattern
        is_layer = parameters.get(weight) == "" if isinstance(parameters, dict) else weight in parameters
        return is_layer or name.rpartition(".")[0] in parameters

    def takes_parameters_alone(self) -> bool:
        """Whether `target_parameters` were given and `target_modules` were not: as it was when this was asked first.

        Later parts of modules that are taken may have been written into `target_parameters`.
        """
        if self._alone is None:
            self._alone = self.target_modules is None and bool(self.target_parameters)
        return self._alone

    def is_among(self, name: str) -> bool:
        """Whether a module that `target_modules` matches is one of those that were chosen; else True."""
        return self._among is None or name in self._among

    def choose(self, names: Iterable[str], target_modules: Iterable[str] | None = None) -> None:
        """Take no other modules than these, of those that `target_modules` matches, which it may do by endings of names.

        Args:
            names: of the modules.
            target_modules: what takes the place of `target_modules`; None: it stays.
        """
        self._among = frozenset(names)
        if target_modules is not None:
            endings: Any = {*target_modules}  # PEFT makes sets of lists, too
            self.target_modules = endings

    def module_rank(self, name: str) -> int | None:
        """The entry of `rank_pattern` for a module: its exact name before any pattern, as PEFT matches patterns."""
        if name in self.rank_pattern or self.is_resolved:
            return self.rank_pattern.get(name)
        return next((rank for key, rank in self.rank_pattern.items() if self._is_key_of(key, name)), None)

    def _is_key_of(self, key: str, name: str) -> bool:
        """Whether a key of `rank_pattern` matches a module, or the parameter that it is a layer of."""
        parameter = name.rpartition(".")[0]
        return _matches(key, name) or (self.is_of_parameters(name) and bool(parameter) and _matches(key, parameter))

    def check_ranks_used(self, targets: Collection[str]) -> None:
        """Raise `ValueError` where a key of `rank_pattern` is none of the targets and matches none."""
        where = "" if self._in_file is None else f" of {CONFIG_NAME}"
        for key in sorted(self.rank_pattern.keys() - set(targets)):
            if self.is_resolved or not any(self._is_key_of(key, name) for name in targets):
                raise ValueError(
                    f"`rank_pattern`{where} holds {key!r}, which none of the {len(targets)} targeted modules is called or "
                    "matches; correct it or leave it out."
                )

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
            if not config.is_resolved:
                raise ValueError(
                    f"{weights.with_name(CONFIG_NAME)} has no `stored_parameters`, and so is not of the adapter beside it; "
                    "copy or download both again."
                )
            check_weights(weights, config)
        if keep is not None:
            config._make_smaller(keep)
        return config

    def check_saved(self) -> None:
        """Raise `TypeError` or `ValueError` where a field that was set since would make a file that cannot be loaded."""
        check_fields(self, from_file=self.is_resolved)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that JSON can hold; sets as sorted lists, so that equal configs make equal files."""
        fields = {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
        if fields["modules_to_save"]:  # PEFT adds the heads of some tasks each time that an adapter is made
            fields["modules_to_save"] = list(dict.fromkeys(fields["modules_to_save"]))
        return fields

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; when a model is being saved, also its sizes and how to load it into the model card."""
        self.check_saved()
        saving_model = "auto_mapping_dict" in kwargs  # PEFT passes it from `PeftModel.save_pretrained` only
        written = copy.copy(self)
        if self.is_resolved:
            written._name_targets()
        super(ReparamConfig, written).save_pretrained(save_directory, **kwargs)
        if saving_model:
            weights, written_beside = (Path(save_directory, name) for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME))
            if weights.is_file():  # safetensors lets nobody else read it, whatever the umask
                weights.chmod(stat.S_IMODE(written_beside.stat().st_mode))
            update_model_card(save_directory, self)

    def _name_targets(self) -> None:
        """Names of the targets in place of patterns, which whoever loads the adapter would try on names of modules."""
        if isinstance(self.target_modules, str) or isinstance(self.exclude_modules, str) or self.layers_pattern is not None:
            names = {*self.rank_pattern, *(self.dense_modules or ())}  # PEFT makes sets of lists, too
            named: Any = {name for name in names if not self.is_of_parameters(name)}
            self.target_modules = named
            self.exclude_modules = self.layers_to_transform = self.layers_pattern = None

    def _make_smaller(self, keep: float) -> None:
        """The ranks of a smaller size in place of those in the file."""
        if not is_number(keep) or not 0 < keep <= self.keep:
            raise ValueError(f"`keep` must be a number in (0, {self.keep:g}], what the adapter was made with, got {keep!r}.")
        if keep == self.keep:
            return
        if self.smaller_keeps is None or self.smaller_ranks is None:
            raise ValueError(
                f"`keep={keep}`: the adapter does not know its ranks at smaller sizes. Those made by `compress` with "
                "`form='factors'`, a `ceiling` below 1 and a method whose ranks are nested do; load others whole, and call "
                "`retruncate(model, keep, batches)`."
            )
        index = next((i for i, size in enumerate(self.smaller_keeps) if size <= keep * (1 + 1e-12)), None)
        if index is None:
            least = [self.keep, *self.smaller_keeps][-1]
            raise ValueError(f"`keep` must be at least {least:g}, the adapter's smallest size, got {keep!r}.")
        self.ranks_in_file = self.rank_pattern
        ranks = {name: by_size[index] for name, by_size in self.smaller_ranks.items()}
        self.rank_pattern = {name: rank for name, rank in ranks.items() if rank is not None}
        self.dense_modules = sorted({*(self.dense_modules or []), *(ranks.keys() - self.rank_pattern.keys())})
        self.keep, self.smaller_keeps, self.smaller_ranks = self.smaller_keeps[index], None, None
        self.evaluation = self.predicted_loss = None  # of the larger size


def _matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches the end of a module's name; what is none is an exact name."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except (re.error, RecursionError, OverflowError):
        return False
