"""Calls of small modules, of which a model makes hundreds in each pass."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_pytorch

EACH_HOOK = ("_global_backward_hooks", "_global_backward_pre_hooks", "_global_forward_hooks", "_global_forward_pre_hooks")
# Hooks on all modules, empty where there are none: PyTorch's own question after them is younger than 2.7. Where one has gone,
# every call is as if there were some.
HOOKS_ON_ALL = [getattr(modules_of_pytorch, name, (True,)) for name in EACH_HOOK]


def call(module: nn.Module, *inputs: Tensor | None) -> Tensor:
    """`module(*inputs)`, by its `forward` alone where nobody else is to see the call.

    `nn.Module.__call__` takes a third of the time of a small product. It is left out where there are no hooks, on the module or
    on all modules, and nothing is compiled, be it this module or what is around it.
    """
    if torch.compiler.is_compiling():
        return cast(Tensor, module(*inputs))
    return cast(Tensor, module(*inputs) if is_seen(module) else module.forward(*inputs))


def is_seen(module: nn.Module) -> bool:
    """Whether somebody is to see calls of a module: by hooks, on the module or on all modules, or by compiling it."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or own.get("_compiled_call_impl")
        or any(HOOKS_ON_ALL)
    )
