"""One-shot compression in a folder: what was finished before a kill is not computed again, and the result is the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.compressing import TEXT, compressed, config_of
from support.model_state import assert_same_model, state_of
from support.models import gpt2, llama

from reparam_peft import Statistics, calibrate
from reparam_peft.blockwise.gathering import BlockwiseGatherer
from reparam_peft.calibration import recorder
from reparam_peft.compression import job
from reparam_peft.compression.job import Job
from reparam_peft.runtime.files import Scratch
from reparam_peft.runtime.run_folder import RunFolder

ALL = {"target_modules": "all-linear", "keep": 0.4}
PASSES = 400_000  # bytes that hold the statistics of a few targets


class Killed(BaseException):
    """As a kill: nobody catches it."""


def killed_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Have the process die at the end of a call of a function."""
    real, calls = getattr(owner, name), []

    def dies(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dies)


@pytest.mark.parametrize(
    ("build", "arguments"),
    [(llama, {}), (llama, {"max_memory": PASSES}), (gpt2, {"max_memory": PASSES})],
    ids=["at once", "by block", "by block, with biases"],
)
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(Statistics, "save", 1), (RunFolder, "begin", 1), (RunFolder, "finish", 1), (recorder, "padding_masks", 2)],
    ids=["statistics", "plan", "products", "gathering"],
)
def test_a_run_that_was_killed_ends_with_the_same_bits(
    owner: Any, name: str, call: int, arguments: dict[str, Any], build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compressed(build(), TEXT, arguments=arguments, **ALL)
    arguments = {**arguments, "run_folder": tmp_path / "run"}
    model = build()
    before = state_of(model)
    with monkeypatch.context() as patch:
        killed_in(patch, owner, name, call)
        patch.setattr(Scratch, "__exit__", lambda self, *error: self.lock.release())
        with pytest.raises(Killed):
            compressed(model, TEXT, arguments=arguments, **ALL)
    assert state_of(model) == before
    gathered: list[int] = []
    for gatherer, function in ((job, "gather_statistics"), (BlockwiseGatherer, "gather")):
        real = getattr(gatherer, function)
        monkeypatch.setattr(gatherer, function, lambda *a, real=real, **k: (gathered.append(1), real(*a, **k))[1])
    kept = len(list((tmp_path / "run").glob("statistics-*")))
    resumed = compressed(model, iter(TEXT), arguments=arguments, **ALL)
    assert_same_model(resumed, expected)
    assert resumed.peft_config["default"].to_dict() == expected.peft_config["default"].to_dict()
    files = len(list((tmp_path / "run").glob("statistics-*")))
    assert len(gathered) == files - kept, "what is kept is not gathered again"
    assert (files > 1) == ("max_memory" in arguments)
    assert not list((tmp_path / "run").glob(".activations*")), "what a killed run has left is gone"
    gathered.clear()
    monkeypatch.setattr(Job, "losses", None)  # everything is finished
    assert_same_model(compressed(build(), TEXT, arguments=arguments, **ALL), expected)
    assert not gathered


def test_statistics_that_were_damaged_are_gathered_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"run_folder": tmp_path}
    with monkeypatch.context() as patch:
        killed_in(patch, RunFolder, "begin", 1)
        with pytest.raises(Killed):
            compressed(llama(), TEXT, arguments=arguments, **ALL)
    (kept,) = tmp_path.glob("statistics-*")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-100])
    assert_same_model(compressed(llama(), TEXT, arguments=arguments, **ALL), compressed(llama(), TEXT, **ALL))
    assert kept.read_bytes() == whole


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"keep": 0.5}, "another `config`"),
        ({"seed": 1}, "another `seed`"),
        ({"batches": TEXT[:1]}, "another `batches`"),
        ({"arguments": {"sequential": True}}, "another `sequential`"),
    ],
)
def test_a_folder_of_another_run_is_refused(changed: dict[str, Any], match: str, tmp_path: Path) -> None:
    compressed(llama(), TEXT, arguments={"run_folder": tmp_path}, **ALL)
    asked: dict[str, Any] = {"batches": TEXT, **ALL, **changed}
    arguments = {"run_folder": tmp_path, **asked.pop("arguments", {})}
    with pytest.raises(ValueError, match=match):
        compressed(llama(), asked.pop("batches"), arguments=arguments, **asked)


def test_a_folder_serves_statistics_that_are_given(tmp_path: Path) -> None:
    known = calibrate(llama(), config_of(**ALL), TEXT, progress=False)
    expected = compressed(llama(), known, **ALL)
    for _ in range(2):
        assert_same_model(compressed(llama(), known, arguments={"run_folder": tmp_path}, **ALL), expected)
    assert not list(tmp_path.glob("statistics-*"))


def test_files_of_another_run_are_not_taken(tmp_path: Path) -> None:
    for name, seed in (("mine", 0), ("other", 1)):
        compressed(llama(), TEXT, seed=seed, arguments={"run_folder": tmp_path / name}, **ALL)
    expected = compressed(llama(), TEXT, **ALL)
    (tmp_path / "mine" / "block-0000.safetensors").unlink()
    for path in (tmp_path / "mine").glob("statistics-*"):
        path.unlink()
    for path in (tmp_path / "other").glob("*.safetensors"):
        shutil.copy(path, tmp_path / "mine")
    assert_same_model(compressed(llama(), TEXT, arguments={"run_folder": tmp_path / "mine"}, **ALL), expected)
