"""Factorised layers for a transformers model, in one file that needs torch and transformers only.

`reparam export --self-contained` copies this file into a checkpoint, whose `auto_map` names classes at its end. It is the
reader of docs/checkpoints.md and no more: to compress, train and check checkpoints, use reparam_peft.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

AS_THE_MODEL, LEAST_INPUTS, NF4_BLOCK = 16, 16, 64
SMALLEST_SCALE = 1e-30  # which whole numbers that were cast from scales are below
NF4 = (  # the levels of 4-bit NormalFloat, arXiv:2305.14314, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

FIELDS = {"rank": int, "form": str, "bias": bool}  # of a layer in config.json
MORE_FIELDS = {"out": int, "in": int, "bits": int, "correction_bits": int}
FORMS, WIDTHS = ("factors", "pivot", "dense", "corrected"), (AS_THE_MODEL, 8, 4)
INTEGERS = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32"}  # in the words of safetensors

WITHOUT_NUMBERS = [getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_cuda", "requires_grad")]

OTHER_NAMES = (
    f"transformers {transformers.__version__} may have this architecture under other names of layers: use the version in "
    "config.json, or a later one"
)

EACH_HOOK = ("backward_hooks", "backward_pre_hooks", "forward_hooks", "forward_pre_hooks")
HOOKS_ON_ALL = [getattr(nn.modules.module, f"_global_{name}", (True,)) for name in EACH_HOOK]  # empty where there are none
_levels: dict[torch.device, Tensor] = {}  # of NF4, by where they are


def levels_on(device: torch.device) -> Tensor:
    """The levels of NF4, float32."""
    if torch.compiler.is_compiling() or device not in _levels:
        levels = torch.tensor(NF4, dtype=torch.float32, device=device)
        if torch.compiler.is_compiling() or type(levels) is not Tensor:  # a tensor of this pass alone
            return levels
        _levels[device] = levels
    return _levels[device]


class Product(Tensor):
    """The weight of a factorised layer, for models that read it themselves: computed where its numbers are used."""

    layer: Factorized

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in WITHOUT_NUMBERS:
            args, kwargs = tree_map(lambda leaf: leaf.layer.product() if isinstance(leaf, cls) else leaf, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def call(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, by its `forward` alone where no hook is to see it: what comes before takes a third of a small product."""
    if torch.compiler.is_compiling() or any(HOOKS_ON_ALL) or module._compiled_call_impl:
        return module(x)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return module(x) if any(hooks) else module.forward(x)


class Factor(nn.Linear):
    """A linear layer that looks its weight up as fast as it can: of small products that is half of the time."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        return super().forward(x) if weight is None else nn.functional.linear(x, weight, self._parameters.get("bias"))


class Coded(nn.Module):
    """A linear layer in 8 bits (int8, a scale for each row) or 4 (NF4, one for each 64 numbers), decoded as it runs.

    Scales are float32, held as the whole numbers of the same bits, so that no cast of the model rounds them.
    """

    def __init__(self, in_features: int, out_features: int, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, count = in_features, out_features, bits, in_features * out_features
        shape, dtype = ((out_features, in_features), torch.int8) if bits == 8 else (((count + 1) // 2, 1), torch.uint8)
        self.scale, scales = ("weight_scale", (out_features, 1)) if bits == 8 else ("weight_absmax", (-(-count // NF4_BLOCK),))
        self.register_buffer("weight", torch.zeros(shape, dtype=dtype))
        self.register_buffer(self.scale, torch.zeros(scales, dtype=torch.int32))

    @property
    def scales(self) -> Tensor:
        """What codes are multiplied by, float32."""
        return self._buffers[self.scale].view(torch.float32)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in)."""
        if self.bits == 8:
            return (self.weight * self.scales).to(dtype)
        count = self.out_features * self.in_features
        codes = torch.cat([self.weight >> 4, self.weight & 15], 1).flatten()[:count].int()
        numbers = levels_on(codes.device)[codes] * self.scales.repeat_interleave(NF4_BLOCK)[:count]
        return numbers.view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == 8 and x.dtype in (torch.float32, torch.bfloat16):  # as torchao; sums may leave the range of float16
            return nn.functional.linear(x, self.weight.to(x.dtype)) * self.scales[:, 0].to(x.dtype)
        return nn.functional.linear(x, self.matrix(x.dtype))

    def check(self, name: str) -> None:
        """Raise `ValueError` where a file held what no matrix has."""
        if not (self.scales.isfinite() & (self.scales >= SMALLEST_SCALE)).all():
            raise ValueError(f"{name}: the checkpoint holds scales that are not positive, NaN or infinite; it is damaged.")


def linear(in_features: int, out_features: int, bits: int) -> nn.Module:
    """A linear layer without bias; in few bits, where rows are long enough for scales of their own."""
    if bits == AS_THE_MODEL or in_features < LEAST_INPUTS:
        return Factor(in_features, out_features, bias=False)
    return Coded(in_features, out_features, bits)


def matrix_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """(out, in) of a linear layer or a convolution without its geometry, (features, tokens) of an embedding."""
    if isinstance(layer, Coded):
        return layer.matrix(dtype)
    return layer.weight.mT if isinstance(layer, nn.Embedding) else layer.weight.flatten(1)


class Pivot(nn.Module):
    """z (…, r) → y (…, out): z itself in the rows whose bit is set in `mask`, K z in the others."""

    def __init__(self, K: nn.Module | None, rank: int, out_features: int, dim: int) -> None:
        super().__init__()
        self.K, self.rank, self.out_features, self.dim = K, rank, out_features, dim
        self.register_buffer("mask", torch.zeros((out_features + 7) // 8, dtype=torch.uint8))
        self.order: Tensor | None = None

    def chosen(self) -> Tensor:
        """Which rows are z itself, (out,)."""
        bits = self.mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=self.mask.device)
        return (bits & 1).flatten()[: self.out_features].bool()

    def check(self, name: str) -> None:
        """Raise `ValueError` where the mask of a file has not one row for each number of z."""
        if self.chosen().sum() != self.rank:
            raise ValueError(f"{name}: the checkpoint holds a mask of other rows than {self.rank}; it is damaged.")

    def forward(self, z: Tensor) -> Tensor:
        K = self._modules.get("K")
        if K is None:
            return z
        if self.order is None or self.order.device != z.device:
            chosen = self.chosen()
            self.order = torch.where(chosen, chosen.cumsum(0), chosen.sum() + (~chosen).cumsum(0)) - 1
        y = torch.cat([z, call(K, z)], self.dim)
        if self.dim != -1 or not y.is_cpu or torch.compiler.is_compiling():
            return y.index_select(self.dim, self.order)
        if y.dtype != torch.float32:  # on a CPU `index_select` is slow but for matrices in float32
            return y.gather(-1, self.order.expand_as(y))
        return y.view(-1, y.shape[-1]).index_select(1, self.order).view_as(y)


class Stretching(nn.Module):
    """A transposed convolution whose weight has the outputs first: (out, in, elements of the kernel)."""

    def __init__(self, layer: nn.ConvTranspose1d, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rank, layer.in_channels, *layer.kernel_size))
        self.geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv_transpose1d(x, self.weight.transpose(0, 1), None, *self.geometry)


class Factorized(nn.Module):
    """The layer of a matrix W ≈ A B: x → A (B x) + b; of W itself in the form "dense": B is W; "corrected": of Q + A B.

    Matrices of linear layers are in `bits`, those beside Q in `correction_bits`; 16: in the dtype of the model. Of a narrow
    matrix `size` says (out, in).
    """

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        form: str,
        bias: bool,
        size: tuple[int, int] | None = None,
        bits: int = AS_THE_MODEL,
        correction_bits: int = AS_THE_MODEL,
    ) -> None:
        super().__init__()
        of_factors = correction_bits if form == "corrected" else bits
        convolution, dim, self.scale, self.groups = None, -1, 1.0, 1
        self.is_split = False  # among processes, by outputs: set by the model
        self.shape, self.is_transposed, self.is_loaded = layer.weight.shape, isinstance(layer, (Conv1D, nn.Embedding)), False
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)):
            convolution = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Conv1d
            dim, self.groups = 1 - layer.weight.ndim, layer.groups
            if isinstance(layer, nn.ConvTranspose1d):
                self.B = Stretching(layer, rank)
            else:
                geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
                channels, mode = layer.in_channels // layer.groups, layer.padding_mode
                self.B = convolution(channels, rank, *geometry, bias=False, padding_mode=mode)
            out_features = layer.out_channels
        elif isinstance(layer, nn.Embedding):
            self.B = nn.Embedding(layer.num_embeddings, rank, padding_idx=layer.padding_idx)
            out_features = layer.embedding_dim
            scale = getattr(layer, "embed_scale", 1.0)
            if isinstance(scale, Tensor):  # rounded to the dtype of the table, as the layer does
                exact = float(getattr(layer, "scalar_embed_scale", scale))
                scale = torch.tensor(exact, dtype=layer.weight.dtype, device="cpu")
            self.scale = float(scale)
        else:
            whole = (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
            out_features, in_features = size or whole
            self.B = linear(in_features, out_features if form == "dense" else rank, of_factors)
            if form == "corrected":
                self.Q = linear(in_features, out_features, bits)
            # Which rows and columns of W are left: without meaning here, where the model computes with these alone.
            for name, left, features in (("kept_rows", out_features, whole[0]), ("kept_columns", in_features, whole[1])):
                if left < features:
                    self.register_buffer(name, torch.zeros((features + 7) // 8, dtype=torch.uint8))

        def expand(rows: int) -> nn.Module:
            return convolution(rank, rows, 1, bias=False) if convolution else linear(rank, rows, of_factors)

        if form == "dense":
            self.A = nn.Identity()
        elif form == "pivot":
            self.A = Pivot(expand(out_features - rank) if out_features > rank else None, rank, out_features, dim)
        else:
            self.A = expand(out_features)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.bias_shape = (-1, *[1] * (-1 - dim))
        self.register_buffer("weight", torch.zeros(1))  # without meaning; makes other readers fail
        for module in self.modules():
            module._is_hf_initialized = True  # by what is loaded; transformers would look at the weight's shape

    @property
    def weight(self) -> Tensor:
        """A B, for models that read it themselves; until all is loaded, the element without meaning."""
        marker = self._buffers.get("weight")
        if marker is None:
            raise AttributeError("weight")
        if not self.is_loaded or torch.compiler.is_compiling():
            return self.product() if self.is_loaded else marker
        weight = marker.new_empty(()).expand(self.shape).as_subclass(Product)
        weight.layer = self
        return weight

    def train(self, mode: bool = True) -> Factorized:
        self.is_loaded = self.is_loaded or not any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))
        return super().train(mode)  # every loader ends with `eval()`

    def product(self) -> Tensor:
        """A B in the shape of the weight; of what is left, where neurons were left out."""
        B = matrix_of(self.B, self._buffers["weight"].dtype)
        if isinstance(self.B, Stretching):
            return self.A(B).unflatten(1, (-1, self.shape[2])).transpose(0, 1)
        if isinstance(self.B, (nn.Conv1d, nn.Conv2d)):
            return self.A(B.view(*B.shape, *[1] * (len(self.shape) - 3))).reshape(self.shape)
        matrix = self.A(B.mT)  # (in, out)
        if "Q" in self._modules:
            matrix = matrix_of(self.Q, matrix.dtype).mT + matrix
        return matrix if self.is_transposed else matrix.mT

    def grouped(self, x: Tensor) -> Tensor:
        """Of a grouped convolution: B maps each group alike, A has rows of its own for each."""
        z = self.B(x.unflatten(1, (self.groups, -1)).flatten(0, 1)).unflatten(0, (-1, self.groups)).flatten(1, 2)
        rank, spare = z.shape[1] // self.groups, [1] * (z.ndim - 3)
        A = self.A(torch.eye(rank, dtype=z.dtype, device=z.device).view(rank, rank, *spare))
        return (nn.functional.conv2d if spare else nn.functional.conv1d)(z, A[..., None], groups=self.groups)

    def parallel(self, style: str) -> dict[str, str]:
        """How a server splits the linear layers in here among processes, if the dense layer were split in this style.

        By outputs ("colwise"): A is split, B is not; of a pivot form neither, but its outputs are. By inputs ("rowwise"): B is
        split, A is not. What is in few bits is not split.
        """
        if any(isinstance(module, Coded) for module in self.modules()):
            return {}
        self.is_split = style == "colwise"
        if isinstance(self.A, nn.Identity):
            return {"B": style}
        if isinstance(self.A, Pivot):
            return {"B": style if style.startswith("rowwise") else "replicate", "A.K": "replicate"}
        return {"B": style, "A": "replicate"} if style.startswith("rowwise") else {"B": "replicate", "A": style}

    def of_this_process(self, outputs: Tensor, dim: int) -> Tensor:
        """The part of what belongs to all outputs, where a server has given B the place of this process, as vLLM does."""
        return outputs.chunk(getattr(self.B, "tp_size", 1), dim)[getattr(self.B, "tp_rank", 0)] if self.is_split else outputs

    def forward(self, x: Tensor) -> Tensor:
        modules = self._modules
        y = call(modules["A"], call(modules["B"], x)) if self.groups == 1 else self.grouped(x)
        if "Q" in modules:
            y = call(modules["Q"], x) + y
        if isinstance(modules["A"], Pivot):
            y = self.of_this_process(y, -1)
        if self.bias is not None:
            y = y + self.of_this_process(self.bias, 0).view(self.bias_shape)
        return y if self.scale == 1.0 else y * self.scale


def check_layer(name: str, layer: Any) -> None:
    """Raise `ValueError` where config.json says of a layer what is none: a field is missing, or of another type or value."""
    if not isinstance(layer, dict):
        raise ValueError(f"{name}: `reparam_layers` in config.json must say what it is, got {layer!r}; it is damaged.")
    types = FIELDS | {field: kind for field, kind in MORE_FIELDS.items() if field in layer}
    types |= {"out": int, "in": int} if {"out", "in"} & layer.keys() else {}
    for field, kind in types.items():
        if field not in layer:
            raise ValueError(f"{name}: `reparam_layers` in config.json lacks {field!r} of this layer; it is damaged.")
        value = layer[field]
        wrong = type(value) is not kind or (field in ("rank", "out", "in") and value < 1)
        if wrong or (field == "form" and value not in FORMS) or (field.endswith("bits") and value not in WIDTHS):
            raise ValueError(f"{name}: `reparam_layers` in config.json says {field!r}: {value!r}, which it cannot be.")


def check_integers(model: nn.Module, prefix: str, headers: dict[str, Any]) -> None:
    """Raise `ValueError` where a file has whole numbers in another dtype, which transformers would cast and say nothing.

    Args:
        model: that was loaded.
        prefix: of names of its base model.
        headers: of the tensors in the files, as safetensors has them.
    """
    buffers = dict(model.named_buffers())
    for name, header in headers.items():
        buffer = next((buffers[n] for n in (name, name.removeprefix(prefix), prefix + name) if n in buffers), None)
        if buffer is not None and header["dtype"] != INTEGERS.get(buffer.dtype, header["dtype"]):
            dtypes = f"{header['dtype']}, and this layer has {buffer.dtype}"
            raise ValueError(f"{name}: the checkpoint holds numbers in {dtypes}; it is damaged, or was changed by hand.")


def headers_of(checkpoint: Any, **where: Any) -> dict[str, Any]:
    """What the files of a checkpoint that was loaded say of their tensors; nothing where they are not safetensors."""
    config = cached_file(checkpoint, "config.json", _raise_exceptions_for_missing_entries=False, **where)
    headers: dict[str, Any] = {}
    folder = os.path.dirname(config) if config else ""
    files, index = ["model.safetensors"], os.path.join(folder, "model.safetensors.index.json")
    if config and os.path.exists(index):
        with open(index, encoding="utf-8") as content:
            files = sorted({os.path.basename(name) for name in json.load(content)["weight_map"].values()})
    for path in (os.path.join(folder, name) for name in files):
        if config and os.path.exists(path):
            with open(path, "rb") as content:
                headers |= json.loads(content.read(int.from_bytes(content.read(8), "little")))
    headers.pop("__metadata__", None)
    return headers


def _is_custom_code() -> bool:
    return True


def name_rope_as_before(config: Any) -> None:
    """Give transformers before 5 the names that it knows rotary embeddings by; it would use those of its defaults."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return
    for part in (config, *vars(config).values()):
        rope = getattr(part, "rope_parameters", None)
        if not isinstance(rope, dict):
            continue
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"`rope_parameters` of a {type(part).__name__}, by kinds of layers, need transformers 5.")
        rope = dict(rope)
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                setattr(part, name, rope.pop(name))
        if rope.get("rope_type", "default") != "default":
            part.rope_scaling = rope


class WithFactors:
    """Before a model's class in the order of resolution: its layers that `config.reparam_layers` names are factorised."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of transformers, which would only warn of layers of the base model that have other names in the checkpoint."""
        where = {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder", "token") if kwargs.get(name)}
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        is_base = not hasattr(model, model.base_model_prefix)
        for name in sorted(info["missing_keys"]):
            if is_base or name.startswith(f"{model.base_model_prefix}."):  # others are of another head
                raise ValueError(f"{name}: the checkpoint lacks this tensor; {OTHER_NAMES}.")
        prefix = f"{model.base_model_prefix}."
        checkpoint = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if checkpoint is not None and any(isinstance(module, (Coded, Pivot)) for module in model.modules()):
            check_integers(model, prefix, headers_of(checkpoint, local_files_only=True, **where))
        others = sorted({other for name in info["unexpected_keys"] for other in (name, name.removeprefix(prefix))})
        for name, module in model.named_modules():
            if isinstance(module, (Coded, Pivot)) and not any(buffer.is_meta for buffer in module.buffers(False)):
                module.check(name)
            spare = [other for other in others if other.startswith(f"{name}.")] if isinstance(module, Factorized) else []
            if spare:
                raise ValueError(f"{spare[0]}: config.json has this layer without such a tensor; the checkpoint is damaged.")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As of transformers, which before 5.23 leaves this file out."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(inspect.getfile(type(self)), os.path.join(save_directory, "modeling_reparam.py"))

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        name_rope_as_before(config)
        super().__init__(config, *args, **kwargs)
        for model in self.modules():
            if isinstance(model, transformers.PreTrainedModel):  # whose conversions of names would catch factors
                model.is_custom_code = _is_custom_code
        prefix = f"{self.base_model_prefix}."
        plan, plan_of_factors = getattr(self, "_tp_plan", None) or {}, {}
        layers = getattr(config, "reparam_layers", None)
        if not isinstance(layers, dict) or not layers:
            raise ValueError(f"`reparam_layers` in config.json must name the factorised layers, got {layers!r}; it is damaged.")
        for saved, how in layers.items():
            check_layer(saved, how)
            for name in (saved, saved.removeprefix(prefix), prefix + saved):
                parent, _, child = name.rpartition(".")
                try:
                    layer = self.get_submodule(name)
                except AttributeError:
                    continue
                # Where new parameters go, and where buffers, is up to the caller: vLLM puts parameters alone on meta.
                size = (how["out"], how["in"]) if "out" in how else None
                bits = (how.get("bits", AS_THE_MODEL), how.get("correction_bits", AS_THE_MODEL))
                module = Factorized(layer, how["rank"], how["form"], how["bias"], size, *bits).to(layer.weight.dtype)
                setattr(self.get_submodule(parent), child, module)
                style = plan.get(re.sub(r"\b\d+\b", "*", name))
                if style is not None and isinstance(layer, nn.Linear):
                    plan_of_factors |= {f"{name}.{part}": how for part, how in module.parallel(style).items()}
                break
            else:
                if saved.startswith(prefix):  # others belong to another head
                    raise ValueError(f"{saved}: the checkpoint has factors for this layer; {OTHER_NAMES}.")
        self._tp_plan = plan_of_factors | plan  # of which servers take the first entry that fits
