"""Fused experts of a mixture: parameters (experts, …, …), opened into a linear layer for each expert, and closed again.

transformers keeps the matrices of all experts of a layer in one parameter, which its `use_experts_implementation` computes
with. Opened, each is the weight of a linear layer, a view of the parameter, under the parameter's name and the expert's number;
everything that serves linear layers then serves experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.modules import replace_forward, restore_forward
from .alike import random_tensor
from .grouped_experts import computes_together, is_small, parts_of, product, with_neurons
from .neuron_groups import NeuronGroup, Producer

# Names of transformers' experts interface: what reads the hidden states, with a gate and without, and what writes them.
READERS, WRITER = ("gate_up_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class RoutedRows:
    """Which rows of its hidden states a mixture has given to an expert.

    Attributes:
        tokens: their indices, int64, in the order in which the expert gets them.
        count: of all rows.
    """

    tokens: Tensor
    count: int


_routed: ContextVar[RoutedRows | None] = ContextVar("routed", default=None)


def routed_rows() -> RoutedRows | None:
    """The rows that the expert which is computing was given; None outside of opened experts."""
    return _routed.get()


class ViewLinear(nn.Linear):
    """A matrix of a larger parameter: an `nn.Linear` whose own parameters are views of it.

    Args:
        matrix: weight (out, in).
        bias: (out,), or None.
    """

    def __init__(self, matrix: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = matrix.shape
        # Not assigned: loaders that start from empty parameters would move them to the meta device.
        self._parameters |= {"weight": matrix, "bias": bias}


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts behind transformers' interface, fused or opened."""
    return "is_concatenated" in vars(module) and hasattr(module, "_apply_gate") and _kept(module, WRITER) is not None


def fused_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """The names of a model's fused parameters of experts, opened ones too, each with the module that owns it."""
    names: dict[str, nn.Module] = {}
    for prefix, module in model.named_modules():
        if is_experts(module):
            own = [key for key in (*READERS, WRITER) if _kept(module, key) is not None]
            names |= {f"{prefix}.{key}" if prefix else key: module for key in own}
    return names


def is_open(experts: nn.Module, key: str) -> bool:
    """Whether one of the fused parameters of experts is opened."""
    return isinstance(experts._modules.get(key), nn.ModuleList)


def open_experts(experts: nn.Module, key: str) -> None:
    """Open one fused parameter of experts, and the bias that goes with it, in place. No numbers are copied.

    Args:
        experts: of transformers' interface.
        key: name of the parameter, of shape (experts, out, in) or transposed.
    """
    parameter = experts._parameters.get(key)
    if parameter is None:
        raise ValueError(f"the experts have no parameter {key!r}.")
    del experts._parameters[key]
    bias = experts._parameters.pop(f"{key}_bias", None)

    def view(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor, requires_grad=parameter.requires_grad)

    stacked = parameter.detach().mT if _is_transposed(experts) else parameter.detach()
    biases = [None] * len(stacked) if bias is None else [view(row) for row in bias.detach()]
    layers = [ViewLinear(view(matrix), row) for matrix, row in zip(stacked, biases, strict=True)]
    experts._modules[key] = nn.ModuleList(layers).train(experts.training)
    # An attribute of the object, not another class: what notes attributes before an error puts it back.
    replace_forward(experts, partial(_compute, experts))
    vars(experts)["_is_hf_initialized"] = True  # transformers would initialise parameters by their names


def close_experts(experts: nn.Module, key: str) -> None:
    """The inverse of `open_experts`, in place: the fused parameter, with a copy of the numbers that the layers have.

    Args:
        experts: with an opened parameter, all of whose layers are linear ones again.
        key: name of the parameter.
    """
    layers: Any = experts._modules.pop(key)
    stacked = in_layout(experts, torch.stack([layer.weight.detach() for layer in layers]))
    experts._parameters[key] = nn.Parameter(stacked, requires_grad=layers[0].weight.requires_grad)
    if layers[0].bias is not None:
        biases = torch.stack([layer.bias.detach() for layer in layers])
        experts._parameters[f"{key}_bias"] = nn.Parameter(biases, requires_grad=layers[0].bias.requires_grad)
    if not any(is_open(experts, other) for other in (*READERS, WRITER)):
        restore_forward(experts)


def in_layout(experts: nn.Module, matrices: Tensor) -> Tensor:
    """Matrices (experts, out, in) in the layout of the fused parameters; or such a parameter as matrices."""
    return matrices.mT.contiguous() if _is_transposed(experts) else matrices


def neurons_of_experts(model: nn.Module) -> Iterator[NeuronGroup]:
    """The MLPs of opened experts whose two matrices are linear layers: what reads, the gate or activation, what writes."""
    for prefix, experts in model.named_modules():
        key = next((key for key in READERS if is_open(experts, key)), None)
        if key is None or not is_open(experts, WRITER):
            continue
        readers, writers = experts.get_submodule(key), experts.get_submodule(WRITER)
        for expert, writer in writers.named_children():
            layout = _layout(experts, readers.get_submodule(expert), writer)
            if layout is not None:
                producer, consumer = (f"{prefix}.{name}.{expert}" if prefix else f"{name}.{expert}" for name in (key, WRITER))
                yield NeuronGroup((Producer(producer, layout),), consumer, int(writer.in_features))


def _layout(experts: nn.Module, reader: Any, writer: Any) -> str | None:
    """Which rows of the reader make a neuron, found by trying; None where they are not the reader's alone."""
    return _layout_of(experts, reader.out_features, writer.in_features)


def _layout_of(experts: Any, rows: int, neurons: int) -> str | None:
    """The same of an expert whose reader has so many rows."""
    if not _has_gate(experts):
        return "rows" if rows == neurons else None
    if rows != 2 * neurons:
        return None
    made = random_tensor(1, rows).double()
    layouts = {"split": (0, neurons), "interleaved": (0, 1)}
    for layout, makes_first in layouts.items():
        other = made.clone()
        other[:, list(makes_first)] += 1
        before, after = (experts._apply_gate(tensor) for tensor in (made, other))
        changed = (before != after).flatten().nonzero().flatten().tolist()
        if changed == [0] and before.shape == (1, neurons):
            return layout
    return None


@torch.compiler.disable  # how many tokens an expert gets differs from pass to pass, and each number would be compiled anew
def _compute(self: Any, hidden_states: Tensor, *routing: Any, **named_routing: Any) -> Tensor:
    """What opened experts compute, in the order of transformers' loop: of each expert, the rows of the tokens that chose it.

    Args:
        hidden_states: (tokens, hidden).
        routing, named_routing: in any order, the experts that each token has chosen, (tokens, k), int64, where numbers from the
            number of experts on stand for none; and their weights, (tokens, k).
    """
    chosen, weights = sorted((*routing, *named_routing.values()), key=Tensor.is_floating_point)
    reader = next(key for key in READERS if _kept(self, key) is not None)
    experts, count = len(_kept(self, WRITER)), len(hidden_states)
    result = torch.zeros_like(hidden_states)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)  # by expert, then by token
    numbers = torch.bincount(flat.clamp(max=experts), minlength=experts + 1)[:experts].tolist()
    weights_in_order = weights.flatten()[order]
    computed = [expert for expert, number in enumerate(numbers) if number or _trains(self, reader, expert)]
    total = sum(numbers)
    together = order[:total] // chosen.shape[-1]
    y = _grouped(self, reader, computed, [numbers[expert] for expert in computed], hidden_states, together)
    if y is not None:
        y = self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y
        return result.index_add_(0, together, (y * weights_in_order[:total, None]).to(result.dtype))
    start = 0
    for expert in computed:
        number = numbers[expert]
        tokens = order[start : start + number] // chosen.shape[-1]
        token = _routed.set(RoutedRows(tokens, count))
        try:
            made = _product(self, reader, expert, hidden_states[tokens])
            made = self._apply_gate(made) if _has_gate(self) else self.act_fn(made)
            y = _product(self, WRITER, expert, made)
        finally:
            _routed.reset(token)
        y = self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y
        y = y * weights_in_order[start : start + number, None]
        result.index_add_(0, tokens, y.to(result.dtype))
        start += number
    return result


def _grouped(
    experts: Any, reader: str, computed: list[int], counts: list[int], hidden_states: Tensor, tokens: Tensor
) -> Tensor | None:
    """What some experts make of rows, one expert after the other, computed together; None where each must be called.

    Args:
        experts: some of whose parameters are opened.
        reader: name of the parameter that reads the hidden states.
        computed: numbers of experts.
        counts: how many rows each of them has.
        hidden_states: (tokens, hidden).
        tokens: which of them the rows are.
    """
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    are_open = is_open(experts, reader) and is_open(experts, WRITER)
    if not len(tokens) or not are_open or not computes_together(hidden_states, implementation):
        return None
    if not is_small([_kept(experts, key)[computed[0]] for key in (reader, WRITER)]):
        return None
    layers = [[_kept(experts, key)[expert] for expert in computed] for key in (reader, WRITER)]
    readers, writers = (parts_of(some, hidden_states) for some in layers)
    if readers is None or writers is None:
        return None
    neurons = [part.B.shape[1] for part in writers]
    if len(set(neurons)) > 1:
        layout = _layout_of(experts, readers[0].out_features, neurons[0])
        if layout is None:
            return None
        readers = with_neurons(readers, max(neurons), layout)
    made = product(hidden_states[tokens], readers, counts)
    made = experts._apply_gate(made) if _has_gate(experts) else experts.act_fn(made)
    return product(made, writers, counts)


def _trains(experts: nn.Module, reader: str, expert: int) -> bool:
    """Whether an expert's layers are trained: without tokens they have gradients of zero, as a fused parameter has there.

    Processes that train together wait for the gradients of all parameters.
    """
    if not torch.is_grad_enabled():
        return False
    layers = [_kept(experts, key)[expert] for key in (reader, WRITER) if is_open(experts, key)]
    return any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def _product(experts: nn.Module, key: str, expert: int, x: Tensor) -> Tensor:
    """The product of one expert's matrix with rows x (…, in), whether the parameter is opened or fused."""
    kept: Any = _kept(experts, key)
    if is_open(experts, key):
        return kept[expert](x)
    bias: Any = experts._parameters.get(f"{key}_bias")
    matrix = kept[expert].mT if _is_transposed(experts) else kept[expert]
    return nn.functional.linear(x, matrix, None if bias is None else bias[expert])


def _kept(experts: nn.Module, key: str) -> Any:
    """A fused parameter, or the list of layers that it was opened into; None where there is none."""
    parameter = experts._parameters.get(key)
    is_fused = parameter is not None and parameter.ndim == 3
    return parameter if is_fused else experts._modules[key] if is_open(experts, key) else None


def _is_transposed(experts: nn.Module) -> bool:
    return bool(getattr(experts, "is_transposed", False))


def _has_gate(experts: nn.Module) -> bool:
    return bool(getattr(experts, "has_gate", True))
