"""A training by the clock: when it ends, what its learning rate is, and how it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.healing import ROWS, Time, arguments, small, trainer
from support.models import llama
from support.versions import is_unable
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reparam_peft import HealingTrainer
from reparam_peft.healing import clock as clock_module
from reparam_peft.healing.clock import Clock, ClockProgress

TIMED = {
    "minutes": 10 / 60,
    "max_steps": -1,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.2,
}


@pytest.fixture(autouse=True)
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A step takes two seconds."""
    monkeypatch.setattr(clock_module, "time", Time(2.0))
    return


def rates(made: HealingTrainer) -> list[float]:
    return [entry["learning_rate"] / made.args.learning_rate for entry in made.state.log_history if "learning_rate" in entry]


def test_it_ends_in_time_and_the_learning_rate_follows(tmp_path: Path) -> None:
    made = trainer(tmp_path, **TIMED, logging_steps=1)
    result = made.train()
    assert result.global_step == 5  # a sixth would be late
    assert rates(made) == pytest.approx([0.0, 1.0, 0.75, 0.5, 0.25])
    # Up to some version `Trainer` counts the steps that were to be taken, and not those that were.
    assert is_unable("transformers", "5.19") or result.metrics["train_steps_per_second"] < 1e6
    again = made.train()  # from the beginning of the time
    assert again.global_step == 5


def test_logs_and_checkpoints_are_fractions_of_the_time_and_a_run_goes_on(tmp_path: Path) -> None:
    saving = {**TIMED, "save_strategy": "steps", "save_steps": 0.4, "logging_steps": 0.4}
    made = trainer(tmp_path, **saving)
    made.train()
    assert [entry["step"] for entry in made.state.log_history if "loss" in entry] == [2, 4, 5]
    folders = {int(path.name.split("-")[1]) for path in tmp_path.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    assert folders == {2, 4, 5}
    resumed = trainer(tmp_path, small(), **saving)
    resumed.train(resume_from_checkpoint=tmp_path / f"{PREFIX_CHECKPOINT_DIR}-2")
    assert resumed.state.global_step == 5
    for (name, one), (_, two) in zip(made.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    ended = trainer(tmp_path, small(), **saving)
    ended.train(resume_from_checkpoint=True)  # at its end nothing changes any more
    assert all(torch.equal(one, two) for one, two in zip(made.model.parameters(), ended.model.parameters(), strict=True))
    longer = trainer(tmp_path, small(), **{**saving, "minutes": 14 / 60})
    with pytest.warns(UserWarning, match="is of a shorter training .*`minutes` was"):
        longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 7
    with pytest.raises(ValueError, match="another `minutes`"):
        trainer(tmp_path, small(), **{**saving, "minutes": 5 / 60}).train(resume_from_checkpoint=True)


def test_a_bar_shows_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path, **TIMED, disable_tqdm=False)
    assert any(isinstance(callback, ClockProgress) for callback in made.callback_handler.callbacks)
    made.train()
    assert "10/10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "`minutes` must be a positive number or None, got 0"),
        ({"minutes": float("inf")}, "`minutes` must be a positive number"),
        ({"minutes": True}, "`minutes` must be a positive number"),
        ({"max_steps": 5}, "leave out `max_steps` and `num_train_epochs`, or `minutes`"),
        ({"num_train_epochs": 1}, "leave out `max_steps` and `num_train_epochs`, or `minutes`"),
        ({"warmup_steps": 10}, "`warmup_steps` must be a fraction of the time, below 1"),
        ({"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "`lr_scheduler_type` 'greedy' follows the loss"),
    ],
)
def test_what_says_otherwise_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    model = small()
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model, **{**TIMED, **options})
    assert [p.requires_grad for p in model.parameters()] == trained


def test_a_schedule_of_its_own_is_refused(tmp_path: Path) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="leave the scheduler out of `optimizers`"):
        trainer(tmp_path, model, **TIMED, optimizers=(optimizer, schedule))
    with pytest.raises(TypeError, match="must be a LambdaLR, got a ConstantLR"):
        Clock(1.0).scheduled(schedule)


def test_without_arguments_of_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments(tmp_path, max_steps=-1)
    HealingTrainer(small(), given, train_dataset=ROWS, teacher=llama(), minutes=1)
    assert given.max_steps == -1  # they are the caller's
    assert HealingTrainer(small(), train_dataset=ROWS, teacher=llama(), minutes=1).args.max_steps > 0
