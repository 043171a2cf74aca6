"""How far a student is from its teacher: in what it predicts, and in the outputs of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 2**18}  # logits that are looked at at a time: 1 MiB in float32, which stays in a CPU's cache
OTHER_CHUNK = 2**24


@dataclass(frozen=True)
class Sparse:
    """The k likeliest classes of each position, for logits of shape (…, classes).

    Attributes:
        indices: of the classes, shape (…, k), integer.
        log_probabilities: of these classes, shape (…, k).
    """

    indices: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class Taught:
    """What a teacher says of a batch.

    Attributes:
        logits: whole, or the likeliest only; None: its outputs have none.
        hidden_states: outputs of its layers by name, where they were asked for.
    """

    logits: Tensor | Sparse | None = None
    hidden_states: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


class _Divergence(torch.autograd.Function):
    """Σ over rows of KL(teacher ‖ student), a few rows at a time: next to the logits only their gradient takes memory."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor | Sparse, rows: Tensor, temperature: float) -> Tensor:
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32, device=student.device)
        for chunk in rows.split(max(1, CHUNK.get(student.device.type, OTHER_CHUNK) // student.shape[-1])):
            log_q = (student[chunk].to(total.dtype) / temperature).log_softmax(-1)
            log_p = _teacher(teacher, chunk, log_q, temperature)
            p = log_p.exp()
            total += (log_p - log_q).mul_(p).masked_fill_(p == 0, 0.0).sum()  # 0 · log 0 = 0; NaN stays NaN
            if gradient is not None:
                gradient[chunk] = log_q.exp_().sub_(p).div_(temperature).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None


def _teacher(teacher: Tensor | Sparse, rows: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the teacher; of the likeliest classes only, with the rest shared out as the student does.

    Then KL over all classes is KL over the k and the rest together: what is not known of the teacher pulls nowhere.
    """
    if isinstance(teacher, Tensor):
        return (teacher[rows].to(log_q) / temperature).log_softmax(-1)
    indices, log_p = teacher.indices[rows].long(), teacher.log_probabilities[rows].to(log_q)
    rest_p = (1 - log_p.exp().sum(-1)).clamp(min=1e-9).log()
    rest_q = (1 - log_q.gather(-1, indices).exp().sum(-1)).clamp(min=1e-9).log()
    return (log_q + (rest_p - rest_q)[:, None]).scatter(-1, indices, log_p)


def divergence(student: Tensor, teacher: Tensor | Sparse, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """T² Σ KL(softmax(teacher / T) ‖ softmax(student / T)) over positions (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        student: logits, shape (…, classes); computed in float32 or wider, whatever their dtype.
        teacher: logits of the same shape, or their `Sparse` likeliest.
        mask: which positions count, bool, shape (…); None: all.
        temperature: T > 0; 1 with a sparse teacher.

    Returns:
        A scalar, in nats.

    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> float(divergence(logits, logits))
    0.0
    """
    classes = student.shape[-1]
    rows = torch.arange(student[..., 0].numel(), device=student.device)
    if mask is not None:
        rows = rows[mask.flatten().to(rows.device)]
    if isinstance(teacher, Sparse):
        indices, log_probabilities = (
            part.flatten(0, -2).to(student.device) for part in (teacher.indices, teacher.log_probabilities)
        )
        teacher = Sparse(indices, log_probabilities)
    else:
        teacher = teacher.detach().reshape(-1, classes)
    return temperature**2 * _Divergence.apply(student.reshape(-1, classes), teacher, rows, temperature)


def hidden_states_of(outputs: Any) -> dict[str, Sequence[Tensor]]:
    """The outputs of all layers, where they were asked for."""
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    return {name: getattr(outputs, name)[1:] for name in names if getattr(outputs, name, None)}


def hidden_error(
    student_states: Mapping[str, Sequence[Tensor]],
    teacher_states: Mapping[str, Sequence[Tensor]],
    mask: Tensor,
    attention: Tensor | None,
) -> Tensor:
    """Mean over layers of |error|² / |teacher's|²: of the positions that count; or of rows, over what is no padding in each."""
    errors = []
    for name, states in student_states.items():
        for student, teacher in zip(states, teacher_states[name], strict=True):
            wide = teacher.float()
            relative = (student.float() - wide).square().sum(-1) / wide.square().sum(-1).clamp(min=1e-12)
            if mask.shape == relative.shape and not name.startswith("encoder"):
                errors.append((relative * mask).sum() / mask.sum().clamp(min=1))
                continue
            real = attention if attention is not None and attention.shape == relative.shape else torch.ones_like(relative)
            errors.append(((relative * real).flatten(1).sum(1) / real.flatten(1).sum(1).clamp(min=1)).mean())
    return torch.stack(errors).mean()


def mixed(
    outputs: Any,
    taught: Taught,
    mask: Tensor,
    count: Tensor,
    *,
    distillation: float,
    temperature: float,
    hidden: float,
    attention: Tensor | None,
) -> Tensor:
    """α T² KL(teacher ‖ student) + λ Σ hidden-state errors, as the part of a batch in the mean over all batches of a step.

    Args:
        outputs: the student's.
        taught: what the teacher says.
        mask: what counts of the student's logits, or of its last layer.
        count: how much counts in all batches of the step.
        distillation, temperature, hidden: α, T and λ.
        attention: what is no padding in the batch's inputs; None: all.

    Returns:
        A scalar; 0 where nothing is to be learnt of the teacher.

    Raises:
        ValueError: the student has logits, and the teacher has none.
    """
    loss = torch.zeros((), device=mask.device)
    logits = getattr(outputs, "logits", None)
    if distillation and logits is not None:
        if taught.logits is None:
            raise ValueError("the outputs of the teacher have no `logits` to distil; give another one, or `distillation=0`.")
        loss = loss + distillation * divergence(logits, taught.logits, mask, temperature) / count
    if hidden:
        error = hidden_error(hidden_states_of(outputs), taught.hidden_states, mask, attention)
        # A mean over this batch, which weighs as much in the step as counts in it.
        loss = loss + hidden * error * mask.sum() / count
    return loss
