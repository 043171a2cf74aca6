"""Healing: training a compressed model to predict what the dense one predicts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..calibration.statistics import Statistics
from ..runtime.files import clear_litter, lock_folder, remove_whole, save_tensors, writing
from ..runtime.fingerprints import fingerprint_of_base, fingerprint_of_model, fingerprint_of_rows, fingerprint_of_tensors
from ..runtime.modules import predicts_next_token, without_cache
from ..runtime.processes import fails_together
from ..runtime.run_folder import json_able
from .checkpoints import (
    ADAPTER,
    described,
    kept_parameters,
    last_whole,
    note_whole,
    read_trained,
    this_or_last_whole,
    warn_of_length,
    writing_checkpoint,
)
from .checks import (
    TRAINS,
    check_arguments,
    check_classes,
    check_loss,
    check_minutes,
    check_teacher,
    check_trained,
    checked_model,
)
from .clock import ENDLESS, TICKS, Clock, ClockProgress
from .counting import Counts, counted, masks, with_labels
from .dropout import without_dropout
from .fake_quantization import check_quantize, check_whole, computing_in_few_bits, note_quantize, round_factors
from .inner_lora import adapted, check_lora, merged
from .losses import Taught, hidden_states_of, mixed
from .teacher_cache import TeacherCache
from .trained import as_dense, set_trained

TRAINED = "healing.safetensors"
# Arguments of `Trainer` that are code.
PARTS = ("compute_loss_func", "data_collator", "optimizer", "lr_scheduler", "optimizer_cls_and_kwargs")
# Of `TrainingArguments`, what the result depends on.
ARGUMENTS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "optim_args"),
    *("num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last", "train_sampling_strategy"),
    *("seed", "data_seed", "bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
)


def _give_back(lock: FileLock) -> None:
    """Let others save to a folder, in which nothing of the lock stays that a push to the Hub would upload."""
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()


class HealingTrainer(Trainer):
    """transformers' `Trainer` whose loss is distillation from the dense model, mixed with the task's own.

    loss = α T² KL(teacher ‖ student) + (1 − α) task + λ Σ hidden-state errors, per position that counts: where the batch has
    labels, those that are not −100; else those that are no padding. Accumulated batches are weighed by their positions, as
    `Trainer` weighs tokens. Without labels a model that predicts its own input is trained on any text. A model without
    `logits`, of embeddings say, learns from `hidden` alone.

    What is trained is saved with the adapter: norms through PEFT's `modules_to_save`, as what `compress` refined already is.

    Args:
        model: a `PeftModel` that `compress` or `get_peft_model` made.
        args: as for `Trainer`, as are those that are not named here.
        teacher: the dense model; None: the model itself with its adapter disabled, for which it was made with
            `keep_base=True`. In a distributed run each process holds it whole.
        distillation: α in [0, 1].
        temperature: T > 0.
        hidden: λ ≥ 0; mean over layers of |error|² / |teacher's|² of each position's hidden state.
        trains: which of "factors", "norms" and "biases" are trained, beside what is in `modules_to_save` already. Biases are
            those that are stored with the factors.
        lora: a `LoraConfig` without targets: a LoRA on the inner factors is trained in their place, and merged into them.
        teacher_cache: folder in which the teacher's likeliest classes are kept, so that it runs once for each row of data.
        top_k: how many classes are kept for each position.
        disable_dropout: whether the model drops nothing in training, but by a `lora`'s own dropout, as the teacher drops
            nothing; None: where it learns from the teacher, with `distillation` or `hidden` above 0.
        minutes: how long `train` may take, in place of a number of steps or epochs, > 0. The learning rate follows the schedule
            of `args` by the time that has passed, and intervals below 1 are fractions of it; a run that goes on from a
            checkpoint has the time that is left. None: as `args` say.
        quantize: "int8" or "int4": in training and evaluation the factors compute with the numbers that
            `to_standalone(quantize=…)` will store; what is trained and saved stays in full precision. None: with their own.
        statistics: of the model's calibration, with which `quantize` rounds the factors once, before training begins; None:
            training begins with the nearest numbers.

    Raises:
        TypeError: `model` has no active reparam adapter, or `disable_dropout` is neither a bool nor None.
        ValueError: an argument is out of range or has no effect, there is no teacher, or its classes are not those of the
            model.
        ImportError: the library of `quantize` is missing.

    Source: Hinton et al. 2015, arXiv:1503.02531.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *trainer_args: Any,
        teacher: nn.Module | None = None,
        distillation: float = 1.0,
        temperature: float = 1.0,
        hidden: float = 0.0,
        trains: Sequence[str] = TRAINS,
        lora: LoraConfig | None = None,
        teacher_cache: str | Path | None = None,
        top_k: int = 128,
        disable_dropout: bool | None = None,
        minutes: float | None = None,
        quantize: str | None = None,
        statistics: Statistics | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        student = checked_model(model)
        check_teacher(student, teacher)
        check_loss(distillation, temperature, hidden, teacher_cache, top_k, disable_dropout)
        check_classes(student, distillation)
        check_trained(student, trains)
        check_lora(student, lora)
        check_arguments(args, trainer_args, trainer_kwargs, distillation, lora)
        check_minutes(minutes, args, trainer_args, trainer_kwargs)
        check_quantize(student, quantize, statistics, lora)
        self.quantize, self.statistics = quantize, statistics
        self.distillation, self.temperature, self.hidden, self.lora = distillation, temperature, hidden, lora
        self.trains = list(trains)
        self.disable_dropout = distillation > 0 or hidden > 0 if disable_dropout is None else disable_dropout
        self.teacher = teacher
        self.shifts = predicts_next_token(student)
        self.encoder_decoder = bool(getattr(student.config, "is_encoder_decoder", False))
        self.clock = None if minutes is None else Clock(minutes)
        super().__init__(student, args, *trainer_args, **trainer_kwargs)
        check_whole(self, quantize)
        if self.clock is not None:
            self.args = copy.copy(self.args)
            self.args.max_steps = ENDLESS
            self._go_by(self.clock)
        self.loss_is_scaled_for_ga = True  # by `Counts`
        set_trained(student, [part for part in trains if lora is None or part != "factors"])
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        parts = (self.compute_loss_func, self.data_collator, self.optimizer, self.lr_scheduler, self.optimizer_cls_and_kwargs)
        self.parts = dict(zip(PARTS, map(described, parts), strict=True))
        self.cache = None
        if teacher_cache is not None:
            computed_by = fingerprint_of_base(student) if teacher is None else fingerprint_of_model(teacher)
            self.cache = TeacherCache(teacher_cache, top_k, f"{computed_by} {self.args.bf16} {self.args.fp16}")

    def _go_by(self, clock: Clock) -> None:
        """Have a clock end the training, and a progress bar show it."""
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ClockProgress(clock))
        self.callback_handler.callbacks.append(clock)  # after what looks at numbers of steps

    @property
    def student(self) -> PeftModel:
        """The compressed model that is trained."""
        return cast(PeftModel, self.model)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mixed loss."""
        inputs = with_labels(inputs, self.shifts)
        # The model computes the task's loss itself, unless `Trainer` was told to do so; and an encoder-decoder makes its
        # decoder's inputs of the labels.
        needs_labels = self.encoder_decoder or (
            self.distillation < 1 and self.compute_loss_func is None and self.label_smoother is None
        )
        batch = {key: value for key, value in inputs.items() if key != "labels" or needs_labels}
        taught = Taught()
        if self.distillation or self.hidden:
            # The teacher's loss is of no use.
            taught = self._ask(model, {key: value for key, value in batch.items() if key != "labels" or self.encoder_decoder})
        if self.hidden:
            batch["output_hidden_states"] = True
        outputs = model(**without_cache(self.student, batch))
        if getattr(outputs, "logits", None) is None and self.distillation and not self.hidden:
            raise ValueError(f"the outputs of a {type(outputs).__name__} have no `logits` to distil; give `hidden` > 0.")
        mask, count = counted(self._masks(inputs), outputs, num_items_in_batch, self.args.device)
        loss = mixed(
            outputs,
            taught,
            mask,
            count,
            distillation=self.distillation,
            temperature=self.temperature,
            hidden=self.hidden,
            attention=inputs.get("attention_mask"),
        )
        if self.distillation < 1:
            loss = loss + (1 - self.distillation) * self._task(outputs, inputs.get("labels"), mask, count)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:  # the mean over processes is taken later
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of `Trainer`, with the factors as they will be stored, also while checkpointed activations are computed again."""
        with computing_in_few_bits(self.student, self.quantize):
            return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As of `Trainer`, with the factors as they will be stored."""
        with computing_in_few_bits(self.student, self.quantize):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """What `Trainer` does in evaluation; the loss is the mixed one, without labels too."""
        ignored = list(ignore_keys or getattr(self.student.config, "keys_to_ignore_at_inference", ["past_key_values"]))
        ignored += ["hidden_states", "encoder_hidden_states", "decoder_hidden_states"]
        inputs = with_labels(inputs, self.shifts)
        if self.label_names and all(inputs.get(name) is not None for name in self.label_names):
            return super().prediction_step(model, inputs, prediction_loss_only, ignored)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            count = self._get_num_items_in_batch([inputs], self.args.device)
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=count)
        if prediction_loss_only:
            return loss.detach(), None, None
        logits = nested_detach(tuple(value for key, value in outputs.items() if key not in [*ignored, "loss"]))
        return loss.detach(), logits[0] if len(logits) == 1 else logits, None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the result of the first `train` depends on, for JSON, by which a checkpoint knows its training.

        Of code that was given (loss function, collator, optimizer, scheduler) this is the name of its class or function.
        """
        lasts = {name: json_able(getattr(self.args, name, None)) for name in ARGUMENTS}
        if self.args.max_steps > 0:
            lasts["num_train_epochs"] = None  # it has no effect
        if self.clock is not None:
            lasts["max_steps"] = None
        return {
            ADAPTER: fingerprint_of_tensors(get_peft_model_state_dict(self.student, save_embedding_layers=False)),
            "base model": fingerprint_of_base(self.student),
            "teacher": None if self.teacher is None else fingerprint_of_model(self.teacher),
            "data": fingerprint_of_rows(self.train_dataset),
            "distillation": self.distillation,
            "temperature": self.temperature,
            "hidden": self.hidden,
            "trains": self.trains,
            "disable_dropout": self.disable_dropout,
            "lora": None if self.lora is None else json_able(self.lora.to_dict()),
            "top_k": None if self.cache is None else self.cache.top_k,  # all classes, unless there is a `teacher_cache`
            "processes": self.args.world_size,
            "quantize": self.quantize,
            "statistics": None if self.statistics is None else self.statistics.fingerprint(),
            "minutes": None if self.clock is None else self.clock.minutes,
            **self.parts,
            **lasts,
        }

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does; a LoRA on the factors is merged into them at the end.

        Args:
            resume_from_checkpoint: as for `Trainer`. One that is not whole, since a run was killed while it wrote it, is passed
                over with a warning, for the last whole one beside it.
            args: as for `Trainer`.
            kwargs: as for `Trainer`.

        Raises:
            ValueError: the checkpoint is of another training, or none is whole; or another training saves to the same folder.

        Warns:
            UserWarning: the training is longer than that of the checkpoint. A larger `max_steps`, `num_train_epochs` or
                `minutes` is all that may be changed.
        """
        with ExitStack() as stack:
            with fails_together():
                if self.args.save_strategy != SaveStrategy.NO and self.is_world_process_zero():
                    stack.callback(_give_back, self._take_folder())
                if self.args.save_strategy != SaveStrategy.NO or resume_from_checkpoint:
                    self.identity  # noqa: B018  of the factors as they are before training
                checkpoint = self._whole(resume_from_checkpoint)
            if self.quantize is not None and self.statistics is not None and checkpoint is None and not self.state.global_step:
                round_factors(self.student, self.quantize, self.statistics)
            note_quantize(self.student, self.quantize)
            if self.lora is not None:
                # Each run trains a LoRA of its own: an optimizer and a wrapper of an earlier run would hold one that is gone.
                self.optimizer = self.lr_scheduler = None
                self.model_wrapped = self.student
                stack.enter_context(adapted(self.student, self.lora))
            if self.disable_dropout:
                stack.enter_context(without_dropout(self.student))
            return super().train(checkpoint, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As of `Trainer`; with `minutes` it goes by the clock."""
        if self.clock is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        return self.clock.scheduled(super().create_scheduler(TICKS, optimizer))

    def _take_folder(self) -> FileLock:
        folder = Path(str(self.args.output_dir))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        clear_litter(folder, idle=0)
        return lock

    def _whole(self, asked_for: str | Path | bool | None) -> str | None:
        """The checkpoint that is asked for, or the last whole one beside it; None: none is asked for."""
        if not asked_for:
            return None
        if asked_for is True:
            checkpoint = last_whole(str(self.args.output_dir), self.identity)
        else:
            checkpoint = this_or_last_whole(asked_for, self.identity)
        if checkpoint is None:
            where = self.args.output_dir if asked_for is True else asked_for
            raise ValueError(f"there is no whole checkpoint at {where}; leave out `resume_from_checkpoint` to begin anew.")
        warn_of_length(checkpoint, self.identity)
        return str(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as `Trainer` does; before it pushes to the Hub and deletes older checkpoints, note that this one is whole."""
        folder = Path(str(self._get_output_dir(trial=trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with fails_together():
            if self.args.should_save and folder.exists():  # of an earlier run
                remove_whole(folder)
        state = self.state

        def save_last(path: str) -> None:
            type(state).save_to_json(state, path)
            note_whole(folder, self.identity)

        vars(state)["save_to_json"] = save_last  # the last file that `Trainer` writes
        try:
            with self._together(), writing_checkpoint(folder):
                super()._save_checkpoint(model, trial)
        finally:
            del vars(state)["save_to_json"]

    def _together(self) -> AbstractContextManager[None]:
        """`fails_together` where what is saved is written by each process alone.

        Where processes gather shards to save them, an error in one ends that process; the others, which may be waiting for it
        in the library, are ended by the launcher.
        """
        gathers = (
            self.is_fsdp_enabled or self.is_deepspeed_enabled or getattr(self, "is_distributed_loading_by_transformers", False)
        )
        return nullcontext() if gathers else fails_together()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._together():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self._together():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with fails_together():  # the first process notes what is in the checkpoint when all have written to it
            super()._save_rng_state(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer` does, a LoRA merged.

        Checkpoints to resume from also hold what is trained and the factors, without a LoRA, to the bit.
        """
        checkpoint = Path(output_dir) if _internal_call and output_dir is not None else None
        with nullcontext() if checkpoint is None else self._together():
            with merged(self.student):
                super().save_model(output_dir, _internal_call)
            if checkpoint is not None and self.args.should_save and not self.is_fsdp_enabled:
                save_tensors(checkpoint / TRAINED, kept_parameters(self.student))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        parameters = kept_parameters(model or self.student)
        for name, value in read_trained(path, parameters).items():
            parameters[name].data.copy_(value)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """`Counts` in place of the number that `Trainer` would have, which it only hands on to `compute_loss`; or None."""
        if not batch_samples:
            return None
        step = [self._masks(batch) for batch in batch_samples]
        sums = torch.stack([torch.stack([batch[n].sum() for batch in step]).sum() for n in (2, 1)]).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            sums = self.accelerator.gather(sums[None]).sum(0) / self.get_tp_size()
        return Counts(*sums)

    def _masks(self, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
        return masks(with_labels(inputs, self.shifts), self.shifts, self.encoder_decoder)

    def _task(self, outputs: Any, labels: Tensor | None, mask: Tensor, count: Tensor) -> Tensor:
        """The task's own loss, as in `Trainer.compute_loss`, as its part of the mean over all batches of the step."""
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, labels, num_items_in_batch=count)
        if self.label_smoother is not None and labels is not None:
            loss = self.label_smoother(outputs, labels, shift_labels=self.shifts)
        else:
            loss = getattr(outputs, "loss", None)
        if loss is None:
            raise ValueError("`distillation` below 1 needs the labels of the task in each batch, got none; use 1 without them.")
        # The mean: many models, and earlier label smoothers, take no `num_items_in_batch`. Of nothing it would be NaN.
        return loss.mean() * mask.sum() / count if mask.any() else outputs.logits.sum() * 0

    @torch.no_grad()
    def _ask(self, model: nn.Module, batch: dict[str, Any]) -> Taught:
        """What the teacher says of a batch."""
        if self.cache is not None and (likeliest := self.cache.read(batch)) is not None:
            return Taught(likeliest)
        if self.teacher is None:
            with as_dense(self.accelerator.unwrap_model(model, keep_torch_compile=False)):
                outputs = model(**without_cache(self.student, batch), output_hidden_states=bool(self.hidden))
        else:
            outputs = self.teacher(**without_cache(self.teacher, batch), output_hidden_states=bool(self.hidden))
        if self.cache is not None:
            self.cache.write(batch, outputs.logits)
            return Taught(self.cache.read(batch))
        return Taught(getattr(outputs, "logits", None), hidden_states_of(outputs))
