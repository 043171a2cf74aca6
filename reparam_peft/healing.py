"""Healing: training a compressed model to predict what the dense one predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import _set_trainable
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from .distillation import TeacherCache, divergence
from .evaluation import evaluating, labels_of, predicts_next_token
from .layer import ReparamLayer
from .model import ReparamModel
from .run_folder import fingerprint_of_model
from .targets import reparam_layers

TRAINS = ("factors", "norms", "biases")
IGNORED = -100
LORA = "healing"  # name of the adapter within the factors
TRAINED = "healing.safetensors"


class HealingTrainer(Trainer):
    """transformers' `Trainer` whose loss is distillation from the dense model, mixed with the task's own.

    loss = α T² KL(teacher ‖ student) + (1 − α) task + λ Σ hidden-state errors, per position that counts: where the batch has
    labels, those that are not −100; else those that are no padding. Accumulated batches are weighed by their positions, as
    `Trainer` weighs tokens. Without labels a model that predicts its own input is trained on any text.

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
        ValueError: an argument is out of range, there is no teacher, or its classes are not those of the model.

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
        _check_model(model)
        _check_teacher(model, teacher)
        _check_loss(distillation, temperature, hidden, teacher_cache, top_k)
        _check_trained(trains, lora)
        if lora is not None and getattr(args, "fsdp", None):
            raise ValueError("`lora` cannot be merged into sharded factors; train the factors themselves, or leave out `fsdp`.")
        self.distillation, self.temperature, self.hidden, self.lora = distillation, temperature, hidden, lora
        self.teacher = teacher
        self.shifts = predicts_next_token(model)
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        set_trained(model, [kind for kind in trains if lora is None or kind == "norms"])
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        if distillation == 1 and (self.compute_loss_func is not None or self.label_smoother is not None):
            raise ValueError(
                "`compute_loss_func` and `label_smoothing_factor` are of the task's own loss, which has no part in "
                "`distillation=1`; lower it, or leave them out."
            )
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.cache = None
        if teacher_cache is not None:
            self.cache = TeacherCache(teacher_cache, top_k, fingerprint_of_model(model if teacher is None else teacher))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mixed loss."""
        plain = {key: value for key, value in inputs.items() if key != "labels" or self.encoder_decoder}
        target = self._ask(model, plain)
        options = {"output_hidden_states": True} if self.hidden else {}
        loss: Any = 0.0
        if self.distillation < 1:
            labelled = {**self._with_labels(inputs), **options}
            task, outputs = super().compute_loss(model, labelled, True, num_items_in_batch)
            loss = (1 - self.distillation) * task
        else:
            outputs = model(**plain, **options)
        mask = self._counted(inputs, outputs.logits)
        own = mask.sum()
        count = own.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:  # as in `Trainer.compute_loss`
            count = count / (self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu)
        if self.distillation:
            loss = loss + self.distillation * divergence(outputs.logits, target["logits"], mask, self.temperature) / count
        if self.hidden:
            error = _hidden_error(_hidden_states(outputs), target["hidden_states"], mask)
            loss = loss + self.hidden * own / count * error
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As `Trainer`'s; the loss is the mixed one, without labels too."""
        ignored = list(ignore_keys or getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"]))
        ignored += ["hidden_states", "encoder_hidden_states", "decoder_hidden_states"]
        return super().prediction_step(model, self._with_labels(inputs), prediction_loss_only, ignored)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; a LoRA on the factors is merged into them at the end."""
        if self.lora is None:
            return super().train(*args, **kwargs)
        with adapted(self.model, self.lora):
            return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s; checkpoints to resume from also hold what is trained, to the bit."""
        with merged(self.model):
            super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save and not self.is_fsdp_enabled:
            trained = {name: p.detach().cpu().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, Path(output_dir) / TRAINED)

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

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        return super()._get_num_items_in_batch([self._with_labels(batch) for batch in batch_samples], device)

    def _with_labels(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with the tokens to predict, where the model predicts its own input and is given no labels."""
        inputs = dict(inputs)
        if "labels" not in inputs and self.shifts and "input_ids" in inputs:
            inputs["labels"] = labels_of(inputs, True, 0)
        return inputs

    def _counted(self, inputs: Mapping[str, Any], logits: Tensor) -> Tensor:
        """Which positions count, bool, of the shape of logits without their classes."""
        inputs = self._with_labels(inputs)
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        if labels is not None:
            if self.shifts:  # a position predicts the token after it, and the last one nothing
                labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            if labels.shape == logits.shape[:-1]:
                return labels != IGNORED
        if mask is not None and mask.shape == logits.shape[:-1]:
            return mask.bool()
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)

    @torch.no_grad()
    def _ask(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the teacher says of a batch."""
        if self.cache is not None and (known := self.cache.read(inputs)) is not None:
            return {"logits": known}
        if self.teacher is None:
            with _as_dense(self.accelerator.unwrap_model(model, keep_torch_compile=False)):
                outputs = model(**inputs, output_hidden_states=bool(self.hidden))
        else:
            outputs = self.teacher(**inputs, output_hidden_states=bool(self.hidden))
        if self.cache is not None:
            self.cache.write(inputs, outputs.logits)
            return {"logits": self.cache.read(inputs)}
        return {"logits": outputs.logits, "hidden_states": _hidden_states(outputs)}


def set_trained(model: PeftModel, kinds: Sequence[str]) -> None:
    """Let gradients flow to these kinds of parameters of the active adapter, and to what it saves whole; to no others.

    Norms outside of the adapter become part of it, through `modules_to_save`.
    """
    adapter = model.active_adapter
    model.requires_grad_(False)
    if "norms" in kinds:
        names = _norms(model)
        if names:
            _set_trainable(model, adapter, names, inference_mode=False)
            config = model.peft_config[adapter]
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *names})
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            module.modules_to_save[adapter].requires_grad_(True)
    for _, layer in reparam_layers(model):
        for name, parameter in layer.reparam_factors[adapter].named_parameters():
            parameter.requires_grad_(("biases" if name == "bias" else "factors") in kinds)


def _norms(model: PeftModel) -> list[str]:
    """Modules of the base model, outside of adapters, that have vectors only."""
    base = model.get_base_model()
    inside = tuple(f"{n}." for n, m in base.named_modules() if isinstance(m, (ReparamLayer, ModulesToSaveWrapper)))
    return [
        name
        for name, module in base.named_modules()
        if name
        and not name.startswith(inside)
        and not isinstance(module, (ReparamLayer, ModulesToSaveWrapper))
        and not any(True for _ in module.children())
        and (own := list(module.parameters()))
        and all(parameter.ndim <= 1 for parameter in own)
    ]


@contextmanager
def adapted(model: PeftModel, config: LoraConfig) -> Iterator[None]:
    """Within this block a LoRA on the linear layers of the factors is trained; afterwards it is merged into them."""
    for parent, child, linear in _inner(model, nn.Linear):
        layer = LoraLinear(linear.requires_grad_(False), LORA, config, r=config.r, lora_alpha=config.lora_alpha)
        setattr(parent, child, layer.train(linear.training))
    try:
        yield
    finally:
        for parent, child, layer in _inner(model, LoraLinear):
            base = layer.get_base_layer()
            base.weight.data = base.weight.data + layer.get_delta_weight(LORA).to(base.weight.dtype)
            setattr(parent, child, base)


@contextmanager
def merged(model: PeftModel) -> Iterator[None]:
    """Within this block the factors are as they would be with the LoRA merged; afterwards they are as they were, to the bit."""
    inner = list(_inner(model, LoraLinear))
    before = [layer.get_base_layer().weight.data for _, _, layer in inner]
    try:
        for parent, child, layer in inner:
            base = layer.get_base_layer()
            base.weight.data = base.weight.data + layer.get_delta_weight(LORA).to(base.weight.dtype)
            setattr(parent, child, base)
        yield
    finally:
        for (parent, child, layer), weight in zip(inner, before, strict=True):
            layer.get_base_layer().weight.data = weight
            setattr(parent, child, layer)


def _inner(model: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Modules of a kind within the factors of the active adapter, with parent and name."""
    return [
        (parent, name, child)
        for _, layer in reparam_layers(model)
        for adapter in layer.active_adapters
        for parent in layer.reparam_factors[adapter].modules()
        for name, child in parent.named_children()
        if isinstance(child, kind) and not isinstance(parent, LoraLinear)
    ]


@contextmanager
def _as_dense(model: PeftModel) -> Iterator[None]:
    """Within this block a model computes without its adapter, in eval mode; it trains the same parameters afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with evaluating(model), model.disable_adapter():
            yield
    finally:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _hidden_states(outputs: Any) -> list[Tensor]:
    """The outputs of all layers, where they were asked for."""
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    return [state for name in names for state in (getattr(outputs, name, None) or ())[1:]]


def _hidden_error(ours: Sequence[Tensor], theirs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean over layers and positions of |error|² / |teacher's|²; over the positions that count, where logits have any."""
    errors = []
    for student, teacher in zip(ours, theirs, strict=True):
        wide = teacher.float()
        relative = (student.float() - wide).square().sum(-1) / wide.square().sum(-1).clamp(min=1e-12)
        if mask.shape == relative.shape:
            relative = relative[mask]
        errors.append(relative.mean())
    return torch.stack(errors).mean()


def _check_model(model: Any) -> None:
    adapter = model.active_adapter if isinstance(model, PeftModel) else None
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ReparamModel) or not isinstance(adapter, str):
        raise TypeError(
            f"`model` must be a PeftModel with an active reparam adapter, got a {type(model).__name__}; make one with "
            "`reparam_peft.compress` or `get_peft_model`."
        )


def _check_teacher(model: PeftModel, teacher: Any) -> None:
    if teacher is None:
        if any(layer.base_weight_dropped for _, layer in reparam_layers(model)):
            raise ValueError(
                "there is no teacher: the original weights were dropped. Give the dense model as `teacher`, or compress with "
                "`keep_base=True`."
            )
        return
    if not isinstance(teacher, nn.Module) or teacher is model:
        raise TypeError(f"`teacher` must be another model, got a {type(teacher).__name__}.")
    ours, theirs = (getattr(m.get_output_embeddings(), "out_features", None) if hasattr(m, "get_output_embeddings") else None
                    for m in (model.get_base_model(), teacher))  # fmt: skip
    labels = [getattr(getattr(m, "config", None), "num_labels", None) for m in (model.get_base_model(), teacher)]
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(f"`teacher` must have the vocabulary of the model, of {ours}, and has one of {theirs}.")
    if (ours, theirs) == (None, None) and None not in labels and labels[0] != labels[1]:
        raise ValueError(f"`teacher` must have the {labels[0]} labels of the model, and has {labels[1]}.")


def _check_loss(distillation: float, temperature: float, hidden: float, cache: Any, top_k: int) -> None:
    if not 0 <= distillation <= 1:
        raise ValueError(f"`distillation` must be in [0, 1], got {distillation!r}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}.")
    if not 0 <= hidden < float("inf"):
        raise ValueError(f"`hidden` must be finite and not negative, got {hidden!r}.")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"`top_k` must be a positive whole number, got {top_k!r}.")
    if cache is not None and (hidden or temperature != 1):
        raise ValueError("`teacher_cache` keeps probabilities at temperature 1 only; leave out `hidden` and `temperature`.")


def _check_trained(trains: Sequence[str], lora: Any) -> None:
    unknown = [kind for kind in trains if kind not in TRAINS] if not isinstance(trains, str) else [trains]
    if unknown:
        raise ValueError(f"`trains` must be a list of {', '.join(TRAINS)}, got {unknown[0]!r}.")
    if lora is None:
        return
    if not isinstance(lora, LoraConfig):
        raise TypeError(f"`lora` must be a LoraConfig, got a {type(lora).__name__}.")
    if lora.target_modules or lora.modules_to_save:
        raise ValueError("`lora` must name no modules: its targets are the factors.")
    if lora.use_dora or lora.bias != "none":
        raise ValueError("`lora` must be a plain LoRA, without `use_dora` and with `bias='none'`.")
