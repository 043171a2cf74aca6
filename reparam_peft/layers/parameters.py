"""Parameters that a forward pass reads itself, as weights of an einsum: opened into linear layers, and closed again.

An opened parameter stands where the parameter stood. torch's functions that multiply by it compute with its layers; any other
use gets its numbers, made when they are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..runtime.modules import evaluating
from .computed_weight import WITHOUT_NUMBERS, ComputedWeight
from .experts import ViewLinear

PATTERN = re.compile(r"(?:(\w+(?: \w+)*) )?\((\w+(?: \w+)*)\) (?:(->|<-) )?\((\w+(?: \w+)*)\)")
PRODUCTS = {torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm}


@dataclass(frozen=True)
class Reading:
    """How the dimensions of a parameter make a matrix (out, in), or one for each index of its first dimensions.

    Attributes:
        batch: number of first dimensions, each index of which has a matrix of its own.
        first: number of dimensions after those that are one side of the matrix.
        second: number of the rest, the other side.
        first_is_input: whether the first side is summed over by what multiplies with it; None: not known.
        parts: how many matrices lie one after the other in the first side, as queries, keys and values in attention; without
            `batch`.
    """

    batch: int
    first: int
    second: int
    first_is_input: bool | None = None
    parts: int = 1

    @classmethod
    def parse(cls, pattern: str) -> Reading:
        """The reading that a pattern says: "(d) (n h)", "(d) -> (n h)" where d is summed over, "e (d) -> (m)" for each e.

        "3 (d) (m)" is of three matrices that lie one after the other in the first dimension.

        Raises:
            ValueError: it is no such pattern, or one dimension is named twice.

        >>> Reading.parse("e (d) -> (n h)")
        Reading(batch=1, first=1, second=2, first_is_input=True, parts=1)
        """
        match = PATTERN.fullmatch(pattern)
        names = re.findall(r"\w+", pattern)
        if match is None or len(set(names)) < len(names):
            raise ValueError(
                "a pattern must name each dimension once, in order, in two groups, as '(d) (n h)', with an arrow from the side "
                "that is summed over, '(d) -> (n h)', if it is known, and before them those that are indices of matrices, "
                f"'e (d) (m)'; got {pattern!r}."
            )
        arrow = match[3]
        batch, one, other = ((part or "").split() for part in (match[1], match[2], match[4]))
        parts = int(batch.pop()) if len(batch) == 1 and re.fullmatch("[1-9][0-9]*", batch[0]) else 1
        return cls(len(batch), len(one), len(other), None if arrow is None else arrow == "->", parts)

    def pattern(self) -> str:
        """The pattern that says it.

        >>> Reading(1, 1, 2, False).pattern()
        'a (b) <- (c d)'
        """
        names = [chr(ord("a") + i) for i in range(self.batch + self.first + self.second)]
        one, other = names[self.batch : self.batch + self.first], names[self.batch + self.first :]
        arrow = {True: "-> ", False: "<- ", None: ""}[self.first_is_input]
        before = names[: self.batch] if self.parts == 1 else [str(self.parts)]
        return f"{''.join(f'{name} ' for name in before)}({' '.join(one)}) {arrow}({' '.join(other)})"

    def check(self, shape: Sequence[int]) -> None:
        """Raise `ValueError` where it is of another number of dimensions than a parameter has, or of parts that it has not."""
        named = self.batch + self.first + self.second
        if named != len(shape):
            raise ValueError(f"the pattern names {named} dimensions, and the parameter has {len(shape)}: {tuple(shape)}.")
        if math.prod(shape[self.batch : self.batch + self.first]) % self.parts:
            raise ValueError(f"the first side of a parameter of shape {tuple(shape)} is not made of {self.parts} equal parts.")

    def agrees(self, other: Reading) -> bool:
        """Whether it is the same as another, as far as both are known."""
        same_sides = replace(self, first_is_input=None) == replace(other, first_is_input=None)
        return same_sides and (
            self.first_is_input == other.first_is_input or None in (self.first_is_input, other.first_is_input)
        )

    def matrices(self, parameter: Tensor) -> Tensor:
        """The matrices, shape (number, out, in): views, where the layout of the parameter allows it."""
        batch, one, other = self._sides(parameter.shape)
        stacked = parameter.reshape(math.prod(batch) * self.parts, math.prod(one) // self.parts, math.prod(other))
        return stacked.mT if self.first_is_input else stacked

    def parameter(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `matrices`: the numbers in the shape of the parameter."""
        return (matrices.mT if self.first_is_input else matrices).reshape(tuple(shape))

    def _sides(self, shape: Sequence[int]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        second = self.batch + self.first
        return shape[: self.batch], shape[self.batch : second], shape[second:]


@dataclass(frozen=True)
class Multiplication:
    """What a function of torch's does with a parameter, as an einsum of x and it.

    Attributes:
        x: the tensor that it is multiplied with.
        of_x, of_parameter, of_output: a letter for each of their dimensions.
        bias: that is added, or None.
    """

    x: Tensor
    of_x: str
    of_parameter: str
    of_output: str
    bias: Tensor | None = None

    def reading(self) -> Reading | None:
        """The reading that it multiplies by; None where its dimensions are in no such order."""
        roles = [
            "batch" if letter in self.of_output and letter in self.of_x else "in" if letter in self.of_x else "out"
            for letter in self.of_parameter
        ]
        batch = next((i for i, role in enumerate(roles) if role != "batch"), len(roles))
        sides = [role for i, role in enumerate(roles[batch:]) if i == 0 or role != roles[batch + i - 1]]
        summed_elsewhere = any(letter not in self.of_output and letter not in self.of_parameter for letter in self.of_x)
        if sorted(sides) != ["in", "out"] or summed_elsewhere:
            return None
        first = next(i for i, role in enumerate(roles[batch:]) if role != sides[0])
        return Reading(batch, first, len(roles) - batch - first, sides[0] == "in")

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether dimensions that x shares with a parameter of this shape have the same sizes, so that nothing is broadcast."""
        sizes = dict(zip(self.of_x, self.x.shape, strict=True))
        return all(sizes.get(letter, size) == size for letter, size in zip(self.of_parameter, shape, strict=True))

    def computed_by(self, layers: Sequence[nn.Module], shape: Sequence[int]) -> Tensor:
        """The output, by a layer for each matrix of a parameter of this shape that is read so."""
        batch = [letter for letter in self.of_parameter if letter in self.of_output and letter in self.of_x]
        inputs = [letter for letter in self.of_parameter if letter in self.of_x and letter not in batch]
        outputs = [letter for letter in self.of_parameter if letter not in self.of_x]
        free = [letter for letter in self.of_x if letter not in batch and letter not in inputs]
        size = dict(zip(self.of_parameter, shape, strict=True)) | dict(zip(self.of_x, self.x.shape, strict=True))
        order = [self.of_x.index(letter) for letter in (*batch, *free, *inputs)]
        x = self.x if order == sorted(order) else self.x.permute(order)
        x = x if len(inputs) == 1 else x.flatten(len(batch) + len(free))
        if batch:
            parts = x.flatten(0, len(batch) - 1)
            y = torch.stack([layer(part) for layer, part in zip(layers, parts, strict=True)])
        else:
            y = layers[0](x)
        y = y.reshape([size[letter] for letter in (*batch, *free, *outputs)])
        made = [*batch, *free, *outputs]
        y = y.permute([made.index(letter) for letter in self.of_output])
        return y if self.bias is None else y + self.bias


def multiplication(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], parameter: object, ndim: int
) -> Multiplication | None:
    """What a call does, if it multiplies a tensor by a parameter of so many dimensions, and nothing else; else None."""
    values = [*args, *kwargs.values()]
    if func is torch.einsum and len(args) == 3 and isinstance(args[0], str) and not kwargs:
        return _einsum(args[0], args[1:], parameter)
    if len(values) < 2 or values[1] is not parameter or type(values[0]) is not Tensor:
        return None
    x, letters = values[0], "abcdefghijklmnopqrstuvw"
    if func is F.linear and ndim == 2:
        rows = letters[: x.ndim - 1]
        return Multiplication(x, f"{rows}y", "zy", f"{rows}z", values[2] if len(values) > 2 else None)
    if func in PRODUCTS and ndim == 2 and x.ndim >= 1 and len(values) == 2:
        rows = letters[: x.ndim - 1]
        return Multiplication(x, f"{rows}y", "yz", f"{rows}z")
    if func in PRODUCTS and ndim == x.ndim >= 3 and len(values) == 2:
        batch = letters[: ndim - 2]
        return Multiplication(x, f"{batch}xy", f"{batch}yz", f"{batch}xz")
    return None


def _einsum(equation: str, operands: Sequence[Any], parameter: object) -> Multiplication | None:
    match = re.fullmatch(r"(\w+),(\w+)->(\w+)", equation.replace(" ", ""))
    if match is None or not any(operand is parameter for operand in operands):
        return None
    position = 0 if operands[0] is parameter else 1
    x, terms = operands[1 - position], (match[1], match[2])
    repeated = any(len(set(term)) < len(term) for term in (*terms, match[3]))
    return None if repeated or type(x) is not Tensor else Multiplication(x, terms[1 - position], terms[position], match[3])


class OpenedParameter(nn.Module):
    """What stands in the place of a parameter: a linear layer for each of its matrices, children "0", "1", ….

    Args:
        parameter: whose numbers the layers have.
        reading: how its dimensions make matrices.
        name: of the parameter, for messages.
    """

    def __init__(self, parameter: nn.Parameter, reading: Reading, name: str) -> None:
        super().__init__()
        self.shape, self.reading, self.name = parameter.shape, reading, name
        self._is_hf_initialized = True  # for transformers' functions that would initialise it
        for index, matrix in enumerate(reading.matrices(parameter.detach())):
            self._modules[str(index)] = ViewLinear(nn.Parameter(matrix, requires_grad=parameter.requires_grad), None)

    @property
    def layers(self) -> list[Any]:
        """A layer for each matrix."""
        return list(self._modules.values())

    def numbers(self) -> Tensor:
        """The numbers of the parameter, computed where its layers hold products, with their gradients."""
        return self.reading.parameter(torch.stack([layer.weight for layer in self.layers]), self.shape)

    def weight(self) -> Tensor:
        """The parameter as a tensor whose numbers are computed when they are read, and which cannot be written to."""
        placeholder = torch.empty((), dtype=self.dtype, device=self.device)
        return ComputedWeight.of(placeholder, self.shape, self.numbers, self.name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        opened = next(leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, OpenedParameter))
        called = multiplication(func, args, kwargs, opened, len(opened.shape))
        if called is not None and called.reading() == opened.reading and called.fits(opened.shape):
            return called.computed_by(opened.layers, opened.shape)
        weights = tree_map(lambda leaf: leaf.weight() if isinstance(leaf, OpenedParameter) else leaf, (args, dict(kwargs)))
        return func(*weights[0], **weights[1])

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device", "requires_grad", "is_floating_point"):
            return getattr(self.layers[0].weight, name)
        if name.startswith("_") or not hasattr(Tensor, name):
            return super().__getattr__(name)
        return getattr(self.weight(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> Any:  # as a model that reads a parameter means it
        """The parameter's numbers, converted; this very object where there is nothing to convert."""
        here = torch.empty(0, dtype=self.dtype, device=self.device)
        there = here.to(*args, **kwargs)
        return self if (here.dtype, here.device) == (there.dtype, there.device) else self.weight().to(*args, **kwargs)

    def type(self, *args: Any) -> Any:
        """As `Tensor.type`."""
        return self.to(*args) if args and isinstance(args[0], torch.dtype) else self.weight().type(*args)


def _as_of_tensors(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def call(self: OpenedParameter, *others: Any) -> Any:
        return OpenedParameter.__torch_function__(function, (), (self, *others))

    return call


# What Python looks up in the class, and conversions, which modules have, too, and which would change them.
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "neg", "getitem", "pow"):
    setattr(OpenedParameter, f"__{_name}__", _as_of_tensors(f"__{_name}__"))
for _name in ("float", "half", "bfloat16", "double"):
    setattr(OpenedParameter, _name, _as_of_tensors(_name))


def opened_parameters(model: nn.Module) -> dict[str, OpenedParameter]:
    """The parameters of a model that are open, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OpenedParameter)}


def open_parameter(model: nn.Module, name: str, reading: Reading) -> None:
    """Open a parameter of a model, in place. Numbers are copied only where the reading merges dimensions that lie apart.

    Raises:
        ValueError: the reading is of another number of dimensions.
    """
    prefix, _, key = name.rpartition(".")
    owner = model.get_submodule(prefix)
    parameter = owner.get_parameter(key)
    reading.check(parameter.shape)
    opened = OpenedParameter(parameter, reading, name).train(owner.training)
    del owner._parameters[key]
    owner._modules[key] = opened
    vars(owner)["_is_hf_initialized"] = True  # transformers would initialise parameters by their names


def close_parameter(model: nn.Module, name: str) -> None:
    """The inverse of `open_parameter`, in place: the parameter, with a copy of the numbers that its layers have."""
    prefix, _, key = name.rpartition(".")
    owner = model.get_submodule(prefix)
    opened: Any = owner._modules.pop(key)
    requires_grad = opened.layers[0].weight.requires_grad
    owner._parameters[key] = nn.Parameter(opened.numbers().detach().contiguous().clone(), requires_grad=requires_grad)


@contextmanager
def readings(parameters: Mapping[str, Any]) -> Iterator[dict[str, Reading]]:
    """Within this block a dict fills with how parameters are read, by name; those that are read in several ways are left out.

    Args:
        parameters: of a model, by name, which the block runs; opened ones, too.
    """
    found: dict[str, Reading] = {}
    with _Watch({id(parameter): name for name, parameter in parameters.items()}) as watch:
        yield found
    found |= {name: ways[0] for name, ways in watch.ways.items() if ways[0] is not None and len(set(ways)) == 1}


def readings_of(model: nn.Module, parameters: Mapping[str, Any]) -> dict[str, Reading]:
    """How a model reads parameters, open or not, when it runs on its example (`dummy_inputs`); empty where it cannot be run."""
    example = getattr(model, "dummy_inputs", None)
    if not parameters or example is None or any(parameter.is_meta for parameter in model.parameters()):
        return {}
    with readings(parameters) as found, suppress(Exception), torch.no_grad(), evaluating(model):
        device = next(iter(parameters.values())).device
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in example.items()})
    return found


class _Watch(torch.overrides.TorchFunctionMode):
    """Notes what functions of torch's do with some parameters.

    Attributes:
        ways: name of a parameter → a reading for each call that multiplies by it, or None for one that does something else.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.ways: dict[str, list[Any]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_flatten((args, kwargs))[0] if func not in WITHOUT_NUMBERS else ():
            if id(leaf) in self.names:
                called = multiplication(func, args, kwargs, leaf, leaf.ndim)
                self.ways.setdefault(self.names[id(leaf)], []).append(None if called is None else called.reading())
        return func(*args, **kwargs)
