"""Checkpoints: a training goes on from whole ones of its own only."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.healing import ROWS, small, trainer
from support.models import llama
from transformers import Trainer

from reparam_peft.healing import trainer as training_module
from reparam_peft.healing.checkpoints import MANIFEST, last_whole, note_whole, this_or_last_whole, warn_of_length
from reparam_peft.healing.trainer import TRAINED
from reparam_peft.runtime.files import LOCK, lock_folder

TRAINING = {"adapter": "abc", "learning_rate": 0.1}


class Killed(BaseException):
    """What no code but a test expects."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (9, 10, 11):
        path = tmp_path / f"checkpoint-{step}"
        (path / "adapter").mkdir(parents=True)
        for name in ("optimizer.pt", "adapter/config.json"):
            (path / name).write_text(f"{name} of step {step}")
        note_whole(path, TRAINING)
    (tmp_path / "checkpoint-12").write_text("no folder")
    (tmp_path / "checkpoint-best").mkdir()
    return tmp_path


def test_the_last_one_is_taken(folder: Path) -> None:
    assert last_whole(folder, TRAINING) == folder / "checkpoint-11"
    assert this_or_last_whole(folder / "checkpoint-9", TRAINING) == folder / "checkpoint-9"
    assert last_whole(folder / "none", TRAINING) is None


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter/config.json", MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "changed"])
def test_one_that_is_not_whole_is_passed_over(name: str, damage: str, folder: Path) -> None:
    path = folder / "checkpoint-11" / name
    content = path.read_bytes()
    changed = bytes([content[0] ^ 1]) + content[1:]
    path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "changed": changed}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    for take in (lambda: last_whole(folder, TRAINING), lambda: this_or_last_whole(folder / "checkpoint-11", TRAINING)):
        with pytest.warns(UserWarning, match=rf"checkpoint-11 is passed over, since it is not whole: .*{Path(name).name}"):
            assert take() == folder / "checkpoint-10"


@pytest.mark.parametrize(
    "content", ["[]", "7", '{"format": "another", "files": {}, "training": {}}', '{"files": 1}', "[" * 100_000]
)
def test_a_note_that_is_none_counts_as_damage(content: str, folder: Path) -> None:
    (folder / "checkpoint-11" / MANIFEST).write_text(content)
    with pytest.warns(UserWarning, match="checkpoint-11 is passed over"):
        assert last_whole(folder, TRAINING) == folder / "checkpoint-10"


@pytest.mark.parametrize("name", ["/dev/zero", "../checkpoint-10/optimizer.pt", "adapter", "a\x00b"])
def test_a_note_leads_to_no_other_files(name: str, folder: Path) -> None:
    path = folder / "checkpoint-11" / MANIFEST
    noted = json.loads(path.read_text())
    path.write_text(json.dumps({**noted, "files": {name: "0"}}))
    with pytest.warns(UserWarning, match=f"checkpoint-11 is passed over, .*: {name} (is no file of|leads out of) it"):
        assert last_whole(folder, TRAINING) == folder / "checkpoint-10"


def test_one_of_another_training_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint-11 is of a training with another `learning_rate`: 0\.1, and"):
        last_whole(folder, {**TRAINING, "learning_rate": 0.2})
    with pytest.raises(ValueError, match="another `of_later`: none, in another version of this package, and this one has True"):
        last_whole(folder, {**TRAINING, "of_later": True})
    with pytest.raises(ValueError, match=r"another `learning_rate`: 0\.1, and this one has none, in another version"):
        last_whole(folder, {key: value for key, value in TRAINING.items() if key != "learning_rate"})


@pytest.mark.parametrize(
    ("noted", "wanted", "taken"),
    [
        ({"max_steps": 200}, {"max_steps": 400}, True),
        ({"max_steps": 200}, {"max_steps": 100}, False),
        ({"max_steps": -1}, {"max_steps": 400}, False),
        ({"num_train_epochs": 1.0}, {"num_train_epochs": 3}, True),
        ({"num_train_epochs": 1.0}, {"num_train_epochs": None}, False),
    ],
)
def test_a_longer_training_goes_on_from_a_shorter_one(noted: Any, wanted: Any, taken: bool, folder: Path) -> None:
    note_whole(folder / "checkpoint-11", {**TRAINING, **noted})
    if taken:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert last_whole(folder, {**TRAINING, **wanted}) == folder / "checkpoint-11"
        with pytest.warns(UserWarning, match="checkpoint-11 is of a shorter training .*learning rate followed another"):
            warn_of_length(folder / "checkpoint-11", {**TRAINING, **wanted})
    else:
        with pytest.raises(
            ValueError, match="Only `max_steps`, `num_train_epochs` and `minutes` may be changed, to more than they were"
        ):
            last_whole(folder, {**TRAINING, **wanted})


@pytest.mark.parametrize(
    "name", ["../checkpoint-9/optimizer.pt", "/etc/hostname", "link/optimizer.pt", "fifo", "adapter", "a\0b"]
)
def test_only_files_within_are_read(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = folder / "checkpoint-11"
    (checkpoint / "link").symlink_to(folder / "checkpoint-9")
    os.mkfifo(checkpoint / "fifo")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    content = Path(checkpoint, name).read_bytes() if Path(checkpoint, name).is_file() else b""
    manifest["files"] = {name: hashlib.sha256(content).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"checkpoint-11 is passed over.* (leads out|is no file) of it"):
        assert last_whole(folder, TRAINING) == folder / "checkpoint-10"


def test_a_note_that_is_no_file_is_not_waited_for(folder: Path) -> None:
    (folder / "checkpoint-11" / MANIFEST).unlink()
    os.mkfifo(folder / "checkpoint-11" / MANIFEST)
    with pytest.warns(UserWarning, match="checkpoint-11 is passed over"):
        assert last_whole(folder, TRAINING) == folder / "checkpoint-10"


def test_all_that_changes_the_result_tells_trainings_apart(tmp_path: Path) -> None:
    def training(**options: Any) -> str:
        return json.dumps(trainer(tmp_path, **options).identity)

    teacher = llama()
    teacher.lm_head.weight.data.mul_(2)
    base = small()
    base.get_base_model().model.norm.weight.data.mul_(2)
    other_rows = [*ROWS[:-1], {**ROWS[-1], "input_ids": ROWS[-1]["input_ids"].flip(0)}]
    changes: list[dict[str, Any]] = [
        *({}, {"model": small(keep=0.3)}, {"model": base}, {"teacher": teacher}, {"rows": ROWS[:-1]}, {"rows": other_rows}),
        *({"distillation": 0.5}, {"temperature": 2.0}, {"hidden": 1.0}, {"trains": ["factors"]}, {"lora": LoraConfig(r=4)}),
        *(
            {"teacher_cache": tmp_path / "a"},
            {"teacher_cache": tmp_path / "a", "top_k": 20},
            {"distillation": 0.5, "compute_loss_func": llama},
        ),
        *({"data_collator": small}, {"optimizers": (torch.optim.SGD([torch.ones(1)]), None)}),
        *({"learning_rate": 1e-4}, {"max_steps": 9}, {"seed": 1}, {"per_device_train_batch_size": 2}, {"weight_decay": 0.1}),
    ]
    assert len({training(**change) for change in changes}) == len(changes)
    same = {"logging_steps": 3, "save_strategy": "steps", "save_total_limit": 1, "top_k": 20, "num_train_epochs": 9}
    assert training() == training(**same), "which change nothing"


def run(folder: Path, **resume: Any) -> dict[str, torch.Tensor]:
    model = small()
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 1, "seed": 3}
    trainer(folder, model, per_device_train_batch_size=2, **options).train(**resume)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("where", ["_save_optimizer_and_scheduler", "note_whole"])
def test_a_training_that_is_killed_while_it_saves_goes_on(
    where: str, undisturbed: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = training_module if where == "note_whole" else training_module.HealingTrainer
    real = getattr(owner, where)

    def killed(*args: Any) -> None:
        if any("checkpoint-2" in str(arg) for arg in args):
            raise Killed
        real(*args)

    with monkeypatch.context() as patches:
        patches.setattr(owner, where, killed)
        with pytest.raises(Killed):
            run(tmp_path)
    with pytest.warns(UserWarning, match="checkpoint-2 is passed over, since it is not whole: it has no healing"):
        resumed = run(tmp_path, resume_from_checkpoint=True)
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("[enforce fail at inline_container.cc:603]")])
def test_a_full_disk_names_the_checkpoint_and_gets_its_space_back(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise error

    made = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="checkpoint-1 cannot be written"):
        made.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(ValueError, match=f"there is no whole checkpoint at {tmp_path}; leave out"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_what_fails_after_a_checkpoint_is_whole_leaves_it_and_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=1)
    made.args.push_to_hub = True
    found: list[list[str]] = []

    def push(self: Trainer, checkpoint: str) -> None:
        found.append(sorted(path.name for path in tmp_path.glob(f"checkpoint-*/{MANIFEST}")))
        assert (Path(checkpoint) / MANIFEST).exists()
        if self.state.global_step == 2:
            raise OSError("the Hub is away")

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    with pytest.raises(OSError, match=r"^the Hub is away$"):
        made.train()
    assert [len(manifests) for manifests in found] == [1, 2], "older ones are deleted last"
    assert last_whole(tmp_path, made.identity) == tmp_path / "checkpoint-2"
    kept = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert kept.save_total_limit == made.args.save_total_limit == 1
    assert "save_to_json" not in vars(made.state)
    assert not (tmp_path / LOCK).exists(), "which a push would upload"


@pytest.mark.parametrize("gathers", [False, True])
def test_no_process_waits_for_another_within_a_part_that_fails_together(
    gathers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, inside = 0, set()

    @contextmanager
    def together() -> Iterator[None]:
        nonlocal depth
        depth += 1
        try:
            yield
        finally:
            depth -= 1

    made = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    made.is_distributed_loading_by_transformers = gathers
    for name in ("save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"):

        def save(*args: Any, name: str, real: Any, **kwargs: Any) -> None:
            inside.add((name, depth))
            real(*args, **kwargs)

        monkeypatch.setattr(Trainer, name, partialmethod(save, name=name, real=getattr(Trainer, name)))
    monkeypatch.setattr(training_module, "fails_together", together)
    made.train()
    alone = {("_save_rng_state", 1), *((name, 0) for name in ("save_model", "_save_optimizer_and_scheduler", "_save_scaler"))}
    assert inside == (alone if gathers else {(name, 2) for name, _ in alone})


def test_a_training_of_more_steps_goes_on(tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, max_steps=2, **steps).train()
    longer = trainer(tmp_path, max_steps=4, **steps)
    with pytest.warns(UserWarning, match="`max_steps` was 2 and is 4") as caught:
        longer.train(resume_from_checkpoint=last_whole(tmp_path, longer.identity))
    assert len([warning for warning in caught if "shorter training" in str(warning.message)]) == 1
    assert [entry["step"] for entry in longer.state.log_history if "loss" in entry] == [1, 2, 3, 4]


def test_one_training_saves_to_a_folder_at_a_time(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    with pytest.raises(ValueError, match="another run is under way in"):
        trainer(tmp_path, save_strategy="steps").train()
    lock.release()


@pytest.mark.parametrize("damage", ["no tensors", "NaN", "half", "another name"])
def test_what_was_trained_is_read_whole_or_refused_by_name(damage: str, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    path = tmp_path / "checkpoint-1" / TRAINED
    tensors = load_file(path)
    name, tensor = next(iter(tensors.items()))
    if damage == "half":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        changed = {
            "no tensors": {},
            "NaN": {**tensors, name: tensor * torch.nan},
            "another name": {**tensors, "x": tensor.clone()},
        }
        save_file(changed[damage], path)
    before = {key: value.clone() for key, value in made.student.state_dict().items()}
    made.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=TRAINED):
        made._load_best_model()
    assert all(torch.equal(value, before[key]) for key, value in made.student.state_dict().items())
