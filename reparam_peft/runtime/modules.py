"""The modules of a model: found, replaced, named in errors, in eval mode, frozen, uncompiled, without a cache."""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import tree_leaves, tree_map


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within this block some modules of a model are others."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            set_module(model, name, module)
        yield
    finally:
        for name, module in before.items():
            set_module(model, name, module)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in place of the one of this name, in place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients flow through the model, and none is kept for its parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def leaving_no_graph(model: nn.Module) -> Iterator[None]:
    """After this block tensors that modules have kept of their passes, such as recurrent states, are parts of no graph.

    A graph would hold the memory of its pass, and a module that holds one cannot be copied.
    """
    try:
        yield
    finally:
        for module in model.modules():
            for held in (vars(module), module._buffers):
                for name, value in list(held.items()):
                    if isinstance(value, (Tensor, list, tuple)) and any(map(_is_computed, tree_leaves(value))):
                        held[name] = tree_map(lambda leaf: leaf.detach() if _is_computed(leaf) else leaf, value)


def _is_computed(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.grad_fn is not None


def kept_in_lists(model: nn.Module) -> set[int]:
    """The ids of modules that others keep in lists of Python, too, by which they may be called."""
    lists = (value for module in model.modules() for value in vars(module).values() if isinstance(value, (list, tuple)))
    return {id(item) for items in lists for item in items if isinstance(item, nn.Module)}


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that has a decoder behind one; None for all others."""
    host: Any = model  # of transformers, where it has such a config
    return host.get_encoder() if getattr(getattr(host, "config", None), "is_encoder_decoder", False) else None


def unwrapped(model: nn.Module) -> Any:
    """The model of transformers, say, in wrappers of PEFT and of torch.compile; the model itself where it is in none."""
    host: Any = model
    host = getattr(host, "_orig_mod", host)
    base = host.get_base_model() if hasattr(host, "get_base_model") else host
    return getattr(base, "_orig_mod", base)


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the logits at a position are for the next token: a decoder that generates, wrapped by PEFT or not."""
    base = unwrapped(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    return not type(base).__name__.endswith("ForMaskedLM") and hasattr(base, "generate")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this block a module computes something else."""
    attributes = vars(module)  # in which accelerate's hooks, and compiled modules, put a `forward` of their own
    present = {"forward": attributes["forward"]} if "forward" in attributes else {}
    try:
        attributes["forward"] = forward
        yield
    finally:
        attributes.pop("forward", None)
        attributes.update(present)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Have a module compute something else, in place."""
    vars(module)[_forward(module)] = forward


def restore_forward(module: nn.Module) -> None:
    """Have a module compute what its class says again, in place."""
    del vars(module)[_forward(module)]
    if hasattr(module, "_hf_hook"):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)


def _forward(module: nn.Module) -> str:
    """The attribute that holds what a module computes; accelerate, which moves inputs between devices, calls another one."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within this block modules that torch.compile has compiled run their own code.

    Compiled code takes no notice of hooks that were registered after it was compiled, nor of modules that were replaced.
    """
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    before = [module._compiled_call_impl for module in compiled]
    with ExitStack() as stack:
        try:
            for module in compiled:
                module._compiled_call_impl = None
            for module in model.modules():
                if isinstance(module, OptimizedModule):
                    stack.enter_context(forward_as(module, module._orig_mod))
            yield
        finally:
            for module, implementation in zip(compiled, before, strict=True):
                module._compiled_call_impl = implementation


def without_cache(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch for a pass that generates nothing: with `use_cache=False`, where the model takes that and the batch says nothing.

    Labels that the model does not take are left out.

    A cache holds memory for nothing there; and with one transformers does not look for documents that are packed into one row,
    so that these would attend to each other.

    Args:
        model: that is to be called as `model(**batch)`, wrapped by PEFT or not.
        batch: its keywords.
    """
    base = unwrapped(model)
    parameters = inspect.signature(base.forward).parameters
    # Models of text and images hand what they do not know on to their text model, others to the model that they are a head of.
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    config: Any = getattr(base, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    has_inner = text_config is not config or getattr(base, "base_model", base) is not base
    caches = hands_on and has_inner and hasattr(text_config, "use_cache") and not _says(base, "use_cache")
    taken = {name: value for name, value in batch.items() if name != "labels" or hands_on or name in parameters}
    return {"use_cache": False, **taken} if "use_cache" in parameters or caches else taken


def _says(model: nn.Module, keyword: str) -> bool:
    """Whether a model's `forward` itself calls something with this keyword, which then cannot be handed on, too."""
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    constants = getattr(code, "co_consts", ())  # keywords are there by themselves, or several in a tuple
    return any(constant == keyword or (isinstance(constant, tuple) and keyword in constant) for constant in constants)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter that holds data, as others may be offloaded."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings a module's own tensors to where it computes in each pass, and takes them away after it."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook]))


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its id: more than one for a weight that is shared."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


def abridged(names: Iterable[str]) -> list[str]:
    """Names of modules, those that differ by numbers only as one, with how many they are.

    >>> abridged(["layers.0.mlp.2", "layers.1.mlp.2", "head"])
    ['layers.*.mlp.2 (2)', 'head']
    """
    alike: defaultdict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        alike[tuple("*" if part.isdecimal() else part for part in parts)].append(parts)
    patterns = []
    for group in alike.values():
        places = (set(parts) for parts in zip(*group, strict=True))
        pattern = ".".join(place.pop() if len(place) == 1 else "*" for place in places)
        patterns.append(pattern if len(group) == 1 else f"{pattern} ({len(group)})")
    return patterns


def endings_of(names: Iterable[str], candidates: Iterable[str]) -> set[str]:
    """Those of the candidates with which one of the names ends.

    >>> endings_of(["first_layers.0", "second.layers.1"], ["layers.0", "layers.1", "layers.2"]) == {"layers.0", "layers.1"}
    True
    """
    backwards = sorted(name[::-1] for name in names)
    following = {ending: backwards[bisect_left(backwards, ending[::-1]) :][:1] for ending in candidates}
    return {ending for ending, found in following.items() if found and found[0].startswith(ending[::-1])}


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the module's name before the message of an error."""
    try:
        yield
    except (TypeError, ValueError, torch.linalg.LinAlgError) as error:
        raise type(error)(f"{name}: {error}") from error
