"""The folder of a run that may be killed: what was asked for, the plan, and every block that is finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import clear_litter, is_ours, lock_folder, save_tensors, write_whole, writing
from .fingerprints import fingerprint_of_tensors, fingerprint_of_values
from .processes import fails_together, in_every_process, processes

FORMAT = "reparam_peft run 1"
SETTINGS, PLAN, LOG, TEXT = "run.json", "plan.json", "log.jsonl", "self_written.safetensors"
HEALING, HEALING_TEXT = "healing", "healing_text"  # folders in that of a run: of checkpoints, and of text


class RunFolder:
    """Files of one run; without a folder, nothing is kept. Of several processes, the first one writes, and all read.

    The folder is taken for this run until it is released, by `release` or the end of the `with` block or of the process.

    Args:
        folder: made where it does not exist; None: keep nothing.
        settings: what the result depends on, for JSON.
        mapped: whether tensors that are read stay in the files, which must then not change as long as they are used.

    Attributes:
        finished: the log's entries of the finished blocks, in order.

    Raises:
        ValueError: the folder holds a run with other settings, or other files; or another run is under way in it.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any], mapped: bool = False) -> None:
        self.mapped = mapped
        self.folder = None if folder is None else Path(folder)
        self.finished: list[dict[str, Any]] = []
        self._lock: FileLock | None = None
        self._noted: str | None = None  # SHA-256 of the plan that the run made
        if self.folder is None:
            return
        self._wanted = wanted = json.loads(json.dumps({"format": FORMAT, **settings}, sort_keys=True))
        with ExitStack() as stack:
            stack.callback(self.release)
            with fails_together():
                if self.writes:
                    self._open(wanted)
            with fails_together():  # nobody reads before all is there
                kept = self._settings()
                self._noted = kept.pop(PLAN, None)
                self._check_settings(kept, wanted)
                has_plan = self._noted is not None and self._kept.joinpath(PLAN).exists()
                entries: list[dict[str, Any]] = []
                while (entry := self._entry(len(entries))) is not None:
                    entries.append(entry)
            # Of what some processes do not see, in a folder that is not shared, nothing counts.
            if not in_every_process(has_plan):
                self._noted = None
            while in_every_process(len(self.finished) < len(entries)):
                self.finished.append(entries[len(self.finished)])
            with fails_together():
                if self.writes:
                    clear_litter(self._kept, idle=0)
                self._write_log()
            stack.pop_all()  # nothing has failed: the folder stays taken

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let other runs work in the folder."""
        if self._lock is not None:
            self._lock.release()

    @property
    def _kept(self) -> Path:
        """The folder, of a run that has one."""
        if self.folder is None:
            raise RuntimeError("this run has no folder, so that nothing of it was kept.")
        return self.folder

    @property
    def writes(self) -> bool:
        """Whether this process writes to the folder."""
        return self.folder is not None and processes()[1] == 0

    @property
    def plan(self) -> Path | None:
        """The file of the plan that the run made; None: none yet.

        Raises:
            ValueError: the file is not as the run wrote it, so that finished blocks would be of another plan.
        """
        path = None if self.folder is None else self.folder / PLAN
        if path is None or self._noted is None or not path.exists():
            return None
        if hashlib.sha256(path.read_bytes()).hexdigest() != self._noted:
            raise ValueError(f"{path} is not as the run wrote it. Give another folder, or delete it.")
        return path

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Keep the plan, as JSON, and note its SHA-256 with what the run is of."""
        with fails_together():
            if self.writes:
                content = json.dumps(plan).encode()
                write_whole(self._kept / PLAN, content)
                noted = {**self._wanted, PLAN: hashlib.sha256(content).hexdigest()}
                write_whole(self._kept / SETTINGS, json.dumps(noted, indent=1))

    def finish(self, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished block: its line of the log, and its tensors."""
        with fails_together():
            if self.writes:
                separate = {key: tensor.clone() for key, tensor in tensors.items()}  # no two share memory, as safetensors asks
                text = json.dumps(entry)
                metadata = {"format": FORMAT, "entry": text, "sha256": self._digest(text, separate)}
                save_tensors(self._path(len(self.finished)), separate, metadata)
            self.finished.append(entry)
            self._write_log()

    def tensors(self, position: int) -> dict[str, Tensor]:
        """The tensors of a finished block, by its position in `finished`."""
        with safe_open(self._path(position), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors if self.mapped else {key: tensor.clone() for key, tensor in tensors.items()}

    def _entry(self, position: int) -> dict[str, Any] | None:
        """The log's line of a finished block; None where it is not finished, or its file is not as it was written."""
        path = self._path(position)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                text, noted = (file.metadata()[key] for key in ("entry", "sha256"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, KeyError):
            return None
        return json.loads(text) if noted == self._digest(text, tensors) else None

    def path(self, name: str) -> Path:
        """Of a file that the run keeps beside the plan and the blocks."""
        return self._kept / name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the run is of: files of another run are not taken for those of this one."""
        return fingerprint_of_values(self._wanted)

    def _digest(self, entry: str, tensors: Mapping[str, Tensor]) -> str:
        """SHA-256 of a finished block: of which run it is, its line of the log, and its tensors."""
        return fingerprint_of_values([self.fingerprint, entry, fingerprint_of_tensors(tensors)])

    def _path(self, position: int) -> Path:
        return self._kept / f"block-{position:04}.safetensors"

    def _write_log(self) -> None:
        if self.writes:
            write_whole(self._kept / LOG, "".join(json.dumps(entry) + "\n" for entry in self.finished))

    def _open(self, wanted: Mapping[str, Any]) -> None:
        """Take the folder, which is made where it does not exist, and note in it what the run is of."""
        folder, path = self._kept, self._kept / SETTINGS
        make_run_folder(folder)
        self._lock = lock_folder(folder)
        if not path.exists():
            write_whole(path, json.dumps(wanted, indent=1))

    def _settings(self) -> dict[str, Any]:
        """What the folder's run is of."""
        path = self._kept / SETTINGS
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(settings, dict):
                return settings
            reason = f"it holds a {type(settings).__name__}"
        except (ValueError, RecursionError) as error:
            reason = str(error)
        raise ValueError(f"{path} does not say what the run is of ({reason}). Give another folder, or delete it.")

    def _check_settings(self, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for key in sorted({*kept, *wanted}):
            before, now = kept.get(key), wanted.get(key)
            if before != now:
                if isinstance(before, dict) and isinstance(now, dict):
                    before, now = _where_they_differ(before, now)
                raise ValueError(
                    f"`run_folder` {self.folder} holds a run with another `{key}`: {_brief(before)}, and this one has "
                    f"{_brief(now)}. Give another folder, or delete it."
                )


def make_run_folder(folder: Path) -> None:
    """Make the folder of a run where it does not exist; text that the model wrote, and healing, may be there before the run.

    Raises:
        ValueError: it holds other files and no run.
        OSError: it cannot be made.
    """

    beside = (TEXT, HEALING, HEALING_TEXT)

    def is_of_no_run() -> bool:
        return not folder.is_dir() or any(not is_ours(path) and path.name not in beside for path in folder.iterdir())

    if folder.exists() and not (folder / SETTINGS).exists() and is_of_no_run():
        raise ValueError(f"`run_folder` {folder} holds other files and no run; give a new folder, or an empty one.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _where_they_differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of two mappings that are not the same in both.

    >>> _where_they_differ({"keep": 0.5, "r": None}, {"keep": 0.6, "r": None})
    ({'keep': 0.5}, {'keep': 0.6})
    """
    differing = [key for key in sorted({*a, *b}) if key not in a or key not in b or a[key] != b[key]]
    return {key: a[key] for key in differing if key in a}, {key: b[key] for key in differing if key in b}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def json_able(value: Any) -> Any:
    """A config's values with sets as sorted lists and enums as their values."""
    if isinstance(value, dict):
        return {str(key): json_able(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(json_able, value))
    if isinstance(value, (list, tuple)):
        return [json_able(item) for item in value]
    return getattr(value, "value", value)
