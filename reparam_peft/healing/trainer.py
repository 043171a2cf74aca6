"""Healing: training a compressed model to predict what the dense one predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import nested_detach

from ..runtime.batches import IGNORED, labels_of
from ..runtime.fingerprints import fingerprint_of_model
from ..runtime.modules import predicts_next_token
from .checks import TRAINS, check_arguments, check_classes, check_loss, check_model, check_teacher, check_trained
from .inner_lora import adapted, check_lora, merged
from .losses import divergence, hidden_error, hidden_states_of
from .teacher_cache import TeacherCache
from .trained import dense_parameters_as_trained, set_trained

TRAINED = "healing.safetensors"


class Counts(NamedTuple):
    """How much counts in all batches of a step; of which kind logits are, the logits tell."""

    positions: Tensor
    rows: Tensor


class HealingTrainer(Trainer):
    """transformers' `Trainer` whose loss is distillation from the dense model, mixed with the task's own.

    loss = α T² KL(teacher ‖ student) + (1 − α) task + λ Σ hidden-state errors, per position that counts: where the batch has
    labels, those that are not −100; else those that are no padding. Accumulated batches are weighed by their positions, as
    `Trainer` weighs tokens. Without labels a model that predicts its own input is trained on any text. A model without
    `logits`, of embeddings say, learns from `hidden` alone.

    What is trained is saved with the adapter: norms through PEFT's `modules_to_save`, as what `compress` refined already is.

    Args:
        model: a `PeftModel` that `compress` or `get_peft_model` made.
        args, *trainer_args, **trainer_kwargs: as for `Trainer`.
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

    Raises:
        TypeError: `model` has no active reparam adapter.
        ValueError: an argument is out of range or has no effect, there is no teacher, or its classes are not those of the
            model.

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
        **trainer_kwargs: Any,
    ) -> None:
        check_model(model)
        check_teacher(model, teacher)
        check_loss(distillation, temperature, hidden, teacher_cache, top_k)
        check_classes(model, distillation)
        check_trained(model, trains)
        check_lora(model, lora)
        check_arguments(args, trainer_args, trainer_kwargs, distillation, lora)
        self.distillation, self.temperature, self.hidden, self.lora = distillation, temperature, hidden, lora
        self.teacher = teacher
        self.shifts = predicts_next_token(model)
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        self.loss_is_scaled_for_ga = True  # by `Counts`
        set_trained(model, [kind for kind in trains if lora is None or kind != "factors"])
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.cache = None
        if teacher_cache is not None:
            self.cache = TeacherCache(teacher_cache, top_k, fingerprint_of_model(model if teacher is None else teacher))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mixed loss."""
        inputs = self._with_labels(inputs)
        own = self.distillation < 1 and self.compute_loss_func is None and self.label_smoother is None  # loss of the model
        needed = own or self.encoder_decoder  # which makes its decoder's inputs of the labels
        known = {key: value for key, value in inputs.items() if key != "labels" or needed}
        plain = {key: value for key, value in known.items() if key != "labels" or self.encoder_decoder}
        target = self._ask(model, plain) if self.distillation or self.hidden else {}
        outputs = model(**known, **({"output_hidden_states": True} if self.hidden else {}))
        logits = getattr(outputs, "logits", None)
        if logits is None and self.distillation and not self.hidden:
            raise ValueError(f"the outputs of a {type(outputs).__name__} have no `logits` to distil; give `hidden` > 0.")
        mask, count = self._counted(inputs, outputs, num_items_in_batch)
        loss = torch.zeros((), device=mask.device)
        if self.distillation and logits is not None:
            loss = loss + self.distillation * divergence(logits, target["logits"], mask, self.temperature) / count
        if self.hidden:
            error = hidden_error(hidden_states_of(outputs), target["hidden_states"], mask, inputs.get("attention_mask"))
            loss = loss + self.hidden * error * mask.sum() / count
        if self.distillation < 1:
            loss = loss + (1 - self.distillation) * self._task(outputs, inputs.get("labels"), mask, count)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:  # the mean over processes is taken later
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As `Trainer`'s; the loss is the mixed one, without labels too."""
        ignored = list(ignore_keys or getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"]))
        ignored += ["hidden_states", "encoder_hidden_states", "decoder_hidden_states"]
        inputs = self._with_labels(inputs)
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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; a LoRA on the factors is merged into them at the end."""
        if self.lora is None:
            return super().train(*args, **kwargs)
        # Each run trains a LoRA of its own: an optimizer and a wrapper of an earlier run would hold one that is gone.
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        with adapted(self.model, self.lora):
            return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s; checkpoints to resume from also hold what is trained and the factors, without a LoRA, to the bit."""
        with merged(self.model):
            super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save and not self.is_fsdp_enabled:
            parts = {n: p for n, p in self.model.named_parameters() if p.requires_grad or ".reparam_factors." in n}
            save_file({n: p.detach().cpu().contiguous() for n, p in parts.items()}, Path(output_dir) / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED
        if not path.exists():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        own, found = dict((model or self.model).named_parameters()), load_file(path)
        wrong = [name for name in found if name not in own or own[name].shape != found[name].shape]
        if wrong:
            raise ValueError(
                f"{path} does not belong to this model and these arguments: {wrong[0]} is not trained, or has another shape."
            )
        for name, value in found.items():
            own[name].data.copy_(value)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Counts | None:
        if not batch_samples:
            return None
        found = [self._masks(batch) for batch in batch_samples]
        sums = torch.stack([sum(masks[dimensions].sum() for masks in found) for dimensions in (2, 1)]).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            sums = self.accelerator.gather(sums[None]).sum(0) / self.get_tp_size()
        return Counts(*sums)

    def _with_labels(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with the tokens to predict, where the model predicts its own input and is given no labels."""
        inputs = dict(inputs)
        if "labels" not in inputs and self.shifts and "input_ids" in inputs:
            inputs["labels"] = labels_of(inputs, True, 0)
        return inputs

    def _masks(self, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
        """What counts, bool, by number of dimensions: positions, shape (rows, length), and rows."""
        inputs = self._with_labels(inputs)
        first = next(value for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
        rows = torch.ones(len(first), dtype=torch.bool, device=first.device)
        masks = {1: rows, 2: rows[:, None]}
        if "input_ids" in inputs and not self.encoder_decoder:
            masks[2] = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        attention = inputs.get("decoder_attention_mask" if self.encoder_decoder else "attention_mask")
        if attention is not None and attention.ndim == 2:
            masks[2] = attention.bool()
        labels = inputs.get("labels")
        if labels is not None and not labels.is_floating_point():
            counts = labels != IGNORED
            if self.shifts:  # a position predicts the token after it, and the last one nothing
                counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1)
            masks[counts.ndim] = counts
        return masks

    def _counted(self, inputs: Mapping[str, Any], outputs: Any, counts: Counts | None) -> tuple[Tensor, Tensor]:
        """What of a batch's logits (or of its last layer) counts, bool, and how much counts in all batches of the step."""
        logits = getattr(outputs, "logits", None)
        shape = (outputs[0] if logits is None else logits).shape[:-1]
        mask = self._masks(inputs).get(len(shape))
        if mask is not None and mask.shape == shape:
            total = None if counts is None else counts.positions if mask.ndim == 2 else counts.rows
        else:
            mask = torch.ones(shape, dtype=torch.bool, device=self.args.device)
            total = None if counts is None else counts.rows * (mask.numel() // len(mask))
        return mask, (mask.sum() if total is None else total).clamp(min=1)

    def _task(self, outputs: Any, labels: Tensor | None, mask: Tensor, count: Tensor) -> Tensor:
        """The task's own loss, as in `Trainer.compute_loss`, as its part of the mean over all batches of the step."""
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, labels, num_items_in_batch=count)
        if self.label_smoother is not None and labels is not None:
            return self.label_smoother(outputs, labels, shift_labels=self.shifts, num_items_in_batch=count)
        if getattr(outputs, "loss", None) is None:
            raise ValueError("`distillation` below 1 needs the labels of the task in each batch, got none; use 1 without them.")
        # The model's mean: many models take no `num_items_in_batch`. Of nothing it would be NaN.
        return outputs.loss.mean() * mask.sum() / count if mask.any() else outputs.logits.sum() * 0

    @torch.no_grad()
    def _ask(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the teacher says of a batch."""
        if self.cache is not None and (known := self.cache.read(inputs)) is not None:
            return {"logits": known}
        if self.teacher is None:
            with dense_parameters_as_trained(self.accelerator.unwrap_model(model, keep_torch_compile=False)):
                outputs = model(**inputs, output_hidden_states=bool(self.hidden))
        else:
            outputs = self.teacher(**inputs, output_hidden_states=bool(self.hidden))
        if self.cache is not None:
            self.cache.write(inputs, outputs.logits)
            return {"logits": self.cache.read(inputs)}
        return {"logits": getattr(outputs, "logits", None), "hidden_states": hidden_states_of(outputs)}
