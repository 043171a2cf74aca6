"""Which parameters of a compressed model are trained, and how it computes as the dense one meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from ..layers.experts import is_experts
from ..runtime.hosts import set_trainable
from ..runtime.modules import evaluating
from ..tuner.layer import ReparamLayer, reparam_layers
from ..tuner.model import config_of


def set_trained(model: PeftModel, kinds: Sequence[str]) -> None:
    """Let gradients flow to these kinds of parameters of the active adapter, and to what it saves whole; to no others.

    Norms and routers outside of the adapter become part of it, through `modules_to_save`.
    """
    adapter = model.active_adapter
    model.requires_grad_(False)
    names = [*(norms_of(model) if "norms" in kinds else ()), *(routers_of(model) if "routers" in kinds else ())]
    if names:
        set_trainable(model, adapter, names, inference_mode=False)
        config = config_of(model, adapter)
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *names})
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            module.modules_to_save[adapter].requires_grad_(True)
    for _, layer in reparam_layers(model):
        for name, parameter in layer.reparam_factors[adapter].named_parameters():
            parameter.requires_grad_(("biases" if name == "bias" else "factors") in kinds)


def norms_of(model: PeftModel) -> list[str]:
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
        and (parameters := list(module.parameters()))
        and all(parameter.ndim <= 1 for parameter in parameters)
    ]


def routers_of(model: PeftModel) -> list[str]:
    """Modules of the base model, outside of adapters, that have a row for each expert of the mixture that they stand in."""
    base = model.get_base_model()
    routers: list[str] = []
    for name, experts in base.named_modules():
        if not is_experts(experts):
            continue
        prefix = name.rpartition(".")[0]
        for router, module in base.get_submodule(prefix).named_modules(prefix=prefix):
            has_rows = any(p.ndim == 2 and len(p) == experts.num_experts for p in module.parameters(recurse=False))
            is_beside = router != prefix and not f"{router}.".startswith(f"{name}.")
            if has_rows and is_beside and not isinstance(module, (ReparamLayer, ModulesToSaveWrapper)):
                routers.append(router)
    inside_layers = tuple(f"{n}." for n, m in base.named_modules() if isinstance(m, (ReparamLayer, ModulesToSaveWrapper)))
    return [router for router in routers if not router.startswith(inside_layers)]


@contextmanager
def as_dense(model: PeftModel) -> Iterator[None]:
    """Within this block a model computes as the dense one that it was made of: without its adapter, in eval mode.

    PEFT changes which parameters get gradients when it disables an adapter; afterwards they are the same as before.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with evaluating(model), model.disable_adapter():
            yield
    finally:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
