"""Each layer kind: its matrix, its rows and its factorised module are checked against the layer itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import PROPERTY
from support.tolerances import TOLERANCE, assert_close
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from reparam_peft.layers.factorized import FactorizedModule
from reparam_peft.layers.kinds import KINDS, layer_kind
from reparam_peft.numerics.decompositions import Factors, factorize, random_factors
from reparam_peft.numerics.storage import Storage

sizes = st.integers(1, 12)
batches = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@dataclass
class Example:
    """A layer in float64 with random weights, an input, and how to lay out rows of outputs (n, out) as the layer does."""

    layer: nn.Module
    inputs: Tensor
    lay_out: Callable[[Tensor], Tensor]
    scale: float = 1.0

    def __repr__(self) -> str:
        return f"{self.layer}, input {tuple(self.inputs.shape)}"


@st.composite
def linears(draw: st.DrawFn) -> Example:
    layer = nn.Linear(draw(sizes), draw(sizes), bias=draw(st.booleans()))
    shape = draw(batches)
    return Example(layer, torch.randn(*shape, layer.in_features), lambda rows: rows.view(*shape, layer.out_features))


@st.composite
def conv1ds(draw: st.DrawFn) -> Example:
    layer = Conv1D(draw(sizes), draw(sizes))
    shape = draw(batches)
    nn.init.normal_(layer.bias)
    return Example(layer, torch.randn(*shape, layer.nx), lambda rows: rows.view(*shape, layer.nf))


@st.composite
def conv2ds(draw: st.DrawFn) -> Example:
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    same = draw(st.booleans())
    layer = nn.Conv2d(
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
        draw(pairs),
        stride=1 if same else draw(pairs),
        padding=draw(st.sampled_from(["same", "valid"])) if same else draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        dilation=draw(pairs),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    # 7 is the extent of the largest dilated kernel.
    inputs = torch.randn(*batch, layer.in_channels, draw(st.integers(7, 10)), draw(st.integers(7, 10)))
    with torch.no_grad():
        height, width = layer(inputs).shape[-2:]
    return Example(layer, inputs, lambda rows: rows.view(*batch, height, width, layer.out_channels).movedim(-1, -3))


def laid_out(layer: nn.Module, inputs: Tensor) -> Example:
    """An example of a convolution, of one group."""
    with torch.no_grad():
        output = layer(inputs)
    n = len(layer.kernel_size)
    batch, places = output.shape[: output.ndim - n - 1], output.shape[output.ndim - n :]
    return Example(layer, inputs, lambda rows: rows.view(*batch, *places, layer.out_channels).movedim(-1, -1 - n))


@st.composite
def sequences(draw: st.DrawFn) -> Example:
    """`nn.Conv1d` and `nn.ConvTranspose1d`."""
    channels, out_channels, kernel, dilation = (draw(st.integers(1, 3)) for _ in range(4))
    stride, padding, extra = draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.integers(0, 2))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    bias = draw(st.booleans())
    inputs = torch.randn(*batch, channels, draw(st.integers(7, 10)))
    if draw(st.booleans()):
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        layer = nn.Conv1d(channels, out_channels, kernel, stride, padding, dilation, bias=bias, padding_mode=mode)
    else:
        extra = extra if extra < max(stride, dilation) else 0
        layer = nn.ConvTranspose1d(channels, out_channels, kernel, stride, padding, extra, bias=bias, dilation=dilation)
    return laid_out(layer, inputs)


@st.composite
def embeddings(draw: st.DrawFn) -> Example:
    number, width, shape = draw(sizes), draw(sizes), draw(batches)
    padding_idx = draw(st.none() | st.integers(0, number - 1))
    scale = draw(st.sampled_from([1.0, 3.5]))
    layer_class = draw(st.sampled_from([Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding]))
    scaled = [] if scale == 1.0 else [scale]
    layer = (layer_class if scaled else nn.Embedding)(number, width, padding_idx, *scaled)
    nn.init.normal_(layer.weight)  # the padding row too: a trained table may hold anything there
    return Example(layer, torch.randint(number, shape), lambda rows: rows.view(*shape, width), scale)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    torch.manual_seed(draw(st.integers(0, 999)))
    example = draw(st.one_of(linears(), conv1ds(), conv2ds(), sequences(), embeddings()))
    example.layer.double()
    if example.inputs.is_floating_point():
        example.inputs = example.inputs.double()
    return example


def bias_of(layer: nn.Module) -> Tensor | None:
    return getattr(layer, "bias", None)


def factorized(layer: nn.Module, factors: Factors, form: str = "factors", bias: bool = False) -> FactorizedModule:
    module = layer_kind(layer).factorized(layer, factors.A.shape[1], form, bias, device=None, dtype=layer.weight.dtype)
    module.set_factors(factors)
    return module


@PROPERTY
@given(examples())
@torch.no_grad()
def test_the_layer_is_its_matrix_times_its_rows(example: Example) -> None:
    layer = example.layer
    kind = layer_kind(layer)
    rows, W = kind.rows(layer, example.inputs), kind.matrix(layer.weight)
    assert tuple(W.shape) == kind.shape(layer)
    assert rows.ndim == 2
    assert rows.dtype == layer.weight.dtype
    y = example.scale * (rows @ W.mT)
    y = y if bias_of(layer) is None else y + bias_of(layer)
    expected = layer(example.inputs)
    assert example.lay_out(y).shape == expected.shape
    assert_close(example.lay_out(y), expected)


@PROPERTY
@given(examples())
@torch.no_grad()
def test_weight_is_the_inverse_of_matrix(example: Example) -> None:
    layer = example.layer
    kind = layer_kind(layer)
    W = kind.matrix(layer.weight)
    is_view = W.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
    assert is_view or isinstance(layer, nn.ConvTranspose1d), "a view, so that no memory is taken"
    weight = kind.weight(W.clone(), layer.weight.shape)
    assert torch.equal(weight, layer.weight)
    assert weight.is_contiguous()
    layer.weight = None
    assert kind.shape(layer) == tuple(W.shape), "known also when the weight is gone"


@PROPERTY
@given(examples())
@torch.no_grad()
def test_full_rank_factors_give_the_layer(example: Example) -> None:
    layer = example.layer
    W = layer_kind(layer).matrix(layer.weight)
    module = factorized(layer, factorize(W, min(W.shape)))
    expected, got = layer(example.inputs), module(example.inputs, bias_of(layer))
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert_close(got, expected)


@PROPERTY
@given(examples(), st.data())
@torch.no_grad()
def test_the_factorised_module_is_the_layer_of_the_product(example: Example, data: st.DataObject) -> None:
    layer = example.layer
    kind = layer_kind(layer)
    factors = random_factors(kind.matrix(layer.weight), data.draw(st.integers(1, min(kind.shape(layer)))))
    module = factorized(layer, factors)
    for own, given_ in zip(module.factors, factors, strict=True):
        assert torch.equal(own, given_)
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    assert sum(torch.Size(shape).numel() for shape in shapes) == factors.A.numel() + factors.B.numel(), "no bias, no weight"
    with_bias, without = module(example.inputs, bias_of(layer)), module(example.inputs)
    layer.weight.copy_(kind.weight(factors.A @ factors.B, layer.weight.shape))
    assert_close(with_bias, layer(example.inputs))
    if bias_of(layer) is not None:
        layer.bias.zero_()
    assert_close(without, layer(example.inputs))


@PROPERTY
@given(examples())
def test_gradient_rows_are_gradients_at_the_product_without_bias_and_scale(example: Example) -> None:
    layer = example.layer
    kind = layer_kind(layer)
    rows, W = kind.rows(layer, example.inputs), kind.matrix(layer.weight.detach())
    Y = (rows.detach() @ W.mT).requires_grad_()
    y = example.scale * example.lay_out(Y)
    probe = torch.randn_like(y)
    (y * probe).sum().backward()
    g = kind.gradient_rows(layer, probe)
    assert g.shape == (len(rows), W.shape[0]) == Y.shape
    assert_close(g, Y.grad)
    # The rows belong together: gᵀ X is the gradient of the weight.
    layer.weight.requires_grad_()
    (layer(example.inputs) * probe).sum().backward()
    expected = kind.matrix(layer.weight.grad)
    got = g.mT @ rows.detach()
    padding = getattr(layer, "padding_idx", None)
    if padding is not None:  # whose gradient an embedding drops
        got[:, padding] = 0
    assert float((got - expected).norm()) <= TOLERANCE[torch.float64] * (1 + float(expected.norm()))


def test_gradient_rows_of_one_image_are_those_of_a_batch_of_one() -> None:
    layer, gradients = nn.Conv2d(2, 3, 3), torch.arange(3 * 4 * 5.0).view(3, 4, 5)
    rows = layer_kind(layer).gradient_rows(layer, gradients)
    assert torch.equal(rows, gradients.movedim(0, -1).reshape(20, 3))
    assert torch.equal(rows, layer_kind(layer).gradient_rows(layer, gradients[None]))


@PROPERTY
@given(examples())
@torch.no_grad()
def test_row_counts_are_the_diagonal_of_the_gram(example: Example) -> None:
    layer = example.layer
    kind = layer_kind(layer)
    X = kind.rows(layer, example.inputs)
    counts = kind.row_counts(layer, example.inputs)
    G = X.mT @ X
    assert counts.shape == (kind.shape(layer)[1],)
    assert_close(counts.double(), G.diagonal())
    assert kind.one_hot == isinstance(layer, nn.Embedding)
    if kind.one_hot:
        assert torch.equal(G, torch.diag(counts.double())), "all of it"
        assert torch.equal(X.sum(0), counts.double()), "the sum of the rows too"


@PROPERTY
@given(examples(), st.data())
@torch.no_grad()
def test_the_pivot_form_is_the_layer_of_the_same_product(example: Example, data: st.DataObject) -> None:
    layer = example.layer
    kind = layer_kind(layer)
    out_features, in_features = kind.shape(layer)
    factors = random_factors(kind.matrix(layer.weight), data.draw(st.integers(1, min(kind.shape(layer)))))
    module = factorized(layer, factors, "pivot")
    plain = factorized(layer, factors)
    assert (plain.form, module.form) == ("factors", "pivot")
    A, B = module.factors
    assert (A.shape, B.shape) == ((out_features, len(B)), (len(B), in_features))
    assert_close(A @ B, factors.A @ factors.B)
    for bias in (bias_of(layer), None):
        expected = plain(example.inputs, bias)
        got = module(example.inputs, bias)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert_close(got, expected)
    stored = sum(tensor.numel() for tensor in module.state_dict().values())
    assert stored == Storage(out_features, in_features, "pivot").parameters(len(B)), "what the table of sizes says"
    assert sum(tensor.numel() for tensor in plain.state_dict().values()) == Storage(out_features, in_features).parameters(
        len(B)
    )


@PROPERTY
@given(examples(), st.sampled_from(["factors", "pivot"]), st.data())
@torch.no_grad()
def test_a_bias_of_its_own_replaces_that_of_the_layer(example: Example, form: str, data: st.DataObject) -> None:
    layer = example.layer
    kind = layer_kind(layer)
    out_features, in_features = kind.shape(layer)
    factors = random_factors(kind.matrix(layer.weight), data.draw(st.integers(1, min(kind.shape(layer)))))
    module = factorized(layer, factors, form, bias=True)
    own = torch.randn(out_features, dtype=torch.float64)
    module.set_bias(own)
    assert torch.equal(module.bias, own)
    rows = kind.rows(layer, example.inputs) @ (factors.A @ factors.B).mT + own
    expected = example.scale * example.lay_out(rows)
    for given_ in (None, torch.full((out_features,), 7.0, dtype=torch.float64)):
        assert_close(module(example.inputs, given_), expected)
    stored = sum(tensor.numel() for tensor in module.state_dict().values())
    assert stored == Storage(out_features, in_features, form, bias=True).parameters(len(module.factors.B))


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_training_reaches_every_parameter_in_either_form(form: str) -> None:
    for layer, x in (
        (nn.Linear(5, 6), torch.randn(3, 5)),
        (Conv1D(6, 5), torch.randn(3, 5)),
        (nn.Conv2d(2, 6, 3), torch.randn(1, 2, 5, 5)),
        (nn.Embedding(5, 6), torch.arange(5)),
    ):
        module = factorized(layer, factorize(layer_kind(layer).matrix(layer.weight.detach()), 2), form, bias=True)
        module(x).square().sum().backward()
        assert len(list(module.parameters())) == 3
        for name, parameter in module.named_parameters():
            assert parameter.grad.any(), f"{type(layer).__name__}: {name}"


def test_factors_are_views_that_gradients_and_updates_go_through() -> None:
    for layer in (nn.Linear(5, 4), Conv1D(4, 5), nn.Conv2d(2, 4, 3), nn.Embedding(5, 4)):
        W = layer_kind(layer).matrix(layer.weight.detach())
        module = factorized(layer, factorize(W, 2))
        A, B = module.factors
        (A @ B).sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters()), type(layer).__name__
        with torch.no_grad():
            A.mul_(2)
            B.add_(1)
        assert torch.equal(module.factors.A, A)
        assert torch.equal(module.factors.B, B)


def test_set_factors_casts_and_refuses_other_shapes() -> None:
    layer = nn.Linear(5, 4).bfloat16()
    A, B = factorize(layer.weight.double(), 2)
    module = factorized(layer, Factors(A, B))
    assert module.dtype == module.factors.A.dtype == torch.bfloat16
    assert torch.equal(module.factors.A, A.bfloat16())
    with pytest.raises(RuntimeError, match="size"):
        module.set_factors(Factors(A[:, :1].expand(4, 3), B))


def test_the_padding_row_gets_no_gradient() -> None:
    layer = nn.Embedding(6, 4, padding_idx=2)
    module = factorized(layer, factorize(layer.weight.detach().mT, 3))
    module(torch.tensor([1, 2, 3])).sum().backward()
    touched = module.B.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("layer_class", [Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding])
def test_a_scaled_embedding_is_scaled_in_its_dtype(layer_class: type[nn.Embedding]) -> None:
    layer = layer_class(20, 8, 0, 12**0.5).bfloat16()
    module = factorized(layer, factorize(layer.weight.detach().mT, 8))
    tokens = torch.arange(20)
    with torch.no_grad():
        assert torch.equal(module(tokens), layer(tokens)), "full-rank factors hold the table to the bit"


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factorised_modules_are_made_on_the_device_in_the_dtype(device: str, dtype: torch.dtype, form: str) -> None:
    for layer in (nn.Linear(5, 4), Conv1D(4, 5), nn.Conv2d(2, 4, 3), nn.Embedding(5, 4)):
        module = layer_kind(layer).factorized(layer, 2, form, True, device=torch.device(device), dtype=dtype)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, dtype)}
        assert {(b.device.type, b.dtype) for b in module.buffers()} <= {(device, torch.uint8), (device, torch.int64)}
        assert len(list(module.buffers())) == (2 if form == "pivot" else 0)


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), Conv1D(6, 8)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linear_layers_are_made_of_what_is_left(layer: nn.Module, device: str) -> None:
    kind = layer_kind(layer)
    made = {"pivot": ((4, 8), {"A.mask", "kept_rows"}), "factors": ((6, 5), {"kept_columns"})}
    made["dense"] = ((4, 5), {"kept_rows", "kept_columns"})
    for form, (size, masks) in made.items():
        module = kind.factorized(layer, 4 if form == "dense" else 2, form, True, size, device=torch.device(device))
        assert (module.size, module.whole, module.form, module.bias.shape) == (size, (6, 8), form, size[:1])
        assert (module.out_features, module.in_features) == size
        assert {tensor.device.type for tensor in module.state_dict().values()} == {device}
        assert module.masks.keys() == masks == {key for key in module.state_dict() if "mask" in key or "kept" in key}
    for size in ((6, 8), (7, 8), (6, 9), (0, 8), (6, 0)):
        with pytest.raises(ValueError, match=rf"of a matrix \(6, 8\) must be .* got \({size[0]}, {size[1]}\)"):
            kind.factorized(layer, 2, size=size)


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 4, 3), nn.Embedding(5, 4)], ids=["Conv2d", "Embedding"])
def test_other_layers_have_no_neurons(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"a {type(layer).__name__} has no neurons that could be left out"):
        layer_kind(layer).factorized(layer, 2, size=(3, 5))


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OnlyRenamed(nn.Linear):
    """Computes as nn.Linear does."""


def integer_linear() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def without_weight() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = None
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "depthwise convolution": (
        lambda: nn.Conv2d(4, 8, 3, groups=4),
        ValueError,
        "`groups` of a Conv2d must be fewer than its 4 input channels: .* has 9 columns",
    ),
    "grouped transposed convolution": (
        lambda: nn.ConvTranspose1d(4, 4, 3, groups=2),
        ValueError,
        "`groups` of a ConvTranspose1d must be 1, got 2",
    ),
    "nn.Conv3d": (
        lambda: nn.Conv3d(4, 4, 3),
        TypeError,
        "a Conv3d .*, only Linear, Conv1D, Embedding, Conv1d, Conv2d, ConvTranspose1d can",
    ),
    "nn.ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 4, 3), TypeError, "a ConvTranspose2d cannot be factorised"),
    "nn.LSTM": (lambda: nn.LSTM(4, 4), TypeError, "a LSTM cannot be factorised"),
    "nn.LayerNorm": (lambda: nn.LayerNorm(4), TypeError, "a LayerNorm cannot be factorised"),
    "nn.Bilinear": (lambda: nn.Bilinear(4, 4, 4), TypeError, "a Bilinear cannot be factorised"),
    "nn.EmbeddingBag": (lambda: nn.EmbeddingBag(4, 4), TypeError, "a EmbeddingBag cannot be factorised"),
    "a container": (lambda: nn.Sequential(nn.Linear(4, 4)), TypeError, "a Sequential cannot be factorised"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), ValueError, "`max_norm` of an Embedding must be None, got 1.0"),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        TypeError,
        "is not a plain parameter; remove its parametrisation",
    ),
    "spectral_norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        TypeError,
        "is not a plain parameter; remove its parametrisation",
    ),
    "MultiheadAttention's output": (
        lambda: nn.MultiheadAttention(4, 2).out_proj,
        TypeError,
        "an nn.MultiheadAttention that is no plain one, or is still being loaded, reads the weight of its output layer itself",
    ),
    "own forward": (lambda: OwnForward(4, 4), TypeError, "a OwnForward computes differently from Linear"),
    "integer weight": (integer_linear, TypeError, "the weight of this Linear has dtype torch.int8; dequantise it first"),
    "no weight": (without_weight, TypeError, "the weight of this Linear is not a plain parameter"),
    "OPT's positions": (
        lambda: OPTLearnedPositionalEmbedding(4, 4),
        TypeError,
        "a OPTLearnedPositionalEmbedding computes differently from Embedding and cannot be factorised",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    build, error, message = REFUSED[name]
    layer = build()
    with pytest.raises(error, match=f"{message}.*`exclude_modules`"):
        layer_kind(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_refuses_a_weight_that_a_hook_recomputes() -> None:
    with pytest.raises(TypeError, match="the weight of this Linear is not a plain parameter"):
        layer_kind(nn.utils.weight_norm(nn.Linear(4, 4)))


def test_refuses_a_scaled_embedding_that_does_more_than_scale() -> None:
    """T5Gemma 2 puts a parameter of its own in the place of one token's vector."""
    with pytest.raises(TypeError, match="a T5Gemma2TextScaledWordEmbedding computes differently from Embedding"):
        layer_kind(T5Gemma2TextScaledWordEmbedding(4, 4, 0, 2.0, eoi_token_index=1))


def test_accepts_a_subclass_that_computes_alike() -> None:
    assert layer_kind(OnlyRenamed(3, 2)).shape(OnlyRenamed(3, 2)) == (2, 3)


def test_each_kind_is_found_by_its_class() -> None:
    layers = [nn.Linear(3, 2), Conv1D(2, 3), nn.Embedding(3, 2)]
    grouped = [nn.Conv1d(6, 2, 1, groups=2), nn.Conv2d(6, 2, 1, groups=2)]
    layers += [*grouped, nn.Conv1d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.ConvTranspose1d(3, 2, 1)]
    assert [layer_kind(layer) for layer in layers] == list(KINDS[1:])  # the first one is of quantised layers
    assert [layer_kind(layer).shape(layer) for layer in layers] == [(2, 3)] * 8


def test_sizes_that_are_tensors_are_numbers() -> None:
    layer = nn.Linear(4, 6)
    layer.in_features, layer.out_features = torch.tensor(4), torch.tensor(6)  # type: ignore[assignment]
    assert [type(size) for size in layer_kind(layer).shape(layer)] == [int, int]
