"""`gather_statistics`: equal to a brute-force oracle in float64, whatever the padding, the split and the layer kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accelerate.data_loader import DataLoaderShard
from support.batches import Batch, images, pairs, text, tokens
from support.gathering import assert_same, gather, linear_layers, named
from support.model_state import state_of
from support.models import bert, convnet, gpt2, llama, t5, vit
from support.tolerances import relative_error
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel

from reparam_peft import Statistics
from reparam_peft.calibration import gather as calibration
from reparam_peft.calibration.heads import HeldBack
from reparam_peft.runtime import processes as distributed


@dataclass
class Setting:
    """A model, some of its modules, and two batches."""

    name: str
    build: Callable[[], nn.Module]
    modules: Callable[[nn.Module], dict[str, nn.Module]]
    batches: list[Batch] = field(repr=False)


SETTINGS = [
    Setting("Llama", llama, linear_layers, [text([9, 9], 9), text([7, 7, 7], 7, seed=1)]),
    Setting("Llama, padded right", llama, linear_layers, [text([9, 5], 9), text([7, 1, 3], 7, seed=1)]),
    Setting("Llama, padded left", llama, linear_layers, [text([9, 5], 9, "left"), text([7, 1, 3], 7, "left", seed=1)]),
    Setting("BERT", bert, linear_layers, [text([9, 5], 9), text([7, 1, 3], 7, seed=1)]),
    Setting("GPT-2", gpt2, linear_layers, [text([9, 5], 9), text([7, 1, 3], 7, "left", seed=1)]),
    Setting("Conv2d", convnet, linear_layers, [images(2, (3, 10, 9), "x"), images(3, (3, 10, 9), "x", seed=1)]),
    Setting("Embedding", llama, named("model.embed_tokens"), [text([9, 5], 9), text([7, 1, 3], 7, seed=1)]),
    Setting("T5", t5, linear_layers, [pairs([8, 3], [6, 2], (8, 6)), pairs([5, 1, 2], [4, 4, 1], (5, 4), seed=9)]),
    Setting(
        "T5, same lengths", t5, linear_layers, [pairs([6, 3], [2, 5], (6, 6)), pairs([4, 1, 2], [4, 3, 1], (4, 4), seed=9)]
    ),
    Setting(
        "ViT", vit, linear_layers, [images(2, (3, 16, 16), "pixel_values"), images(1, (3, 16, 16), "pixel_values", seed=1)]
    ),
]


@pytest.fixture(params=SETTINGS, ids=lambda setting: setting.name)
def setting(request: pytest.FixtureRequest) -> Setting:
    return request.param


# The oracle


@contextmanager
def upstream_gradients(model: nn.Module) -> Iterator[list[Tensor]]:
    """The gradient at the output of the whole model, pass by pass, whose logits are not held back."""
    found: list[Tensor] = []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        prediction = output if isinstance(output, Tensor) else output.logits
        if prediction.requires_grad:
            prediction.register_hook(lambda g: found.append(g.clone()))

    handle = model.register_forward_hook(after)
    with mock.patch.object(HeldBack, "of", return_value=None):
        yield found
    handle.remove()


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution multiplies with its kernel, shape (batch, positions, in · height · width)."""
    (height, width), (down, across) = layer.kernel_size, layer.stride
    if layer.padding == "same":
        x = F.pad(x, (0, 1, 1, 1), mode="reflect")  # for a kernel of (3, 2)
    else:
        x = F.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    y = [
        x[:, :, i : i + height, j : j + width].flatten(1)
        for i in range(0, x.shape[2] - height + 1, down)
        for j in range(0, x.shape[3] - width + 1, across)
    ]
    return torch.stack(y, 1)


def keeps(name: str, batch: Batch) -> Tensor | None:
    """The mask of a module's rows, by its name."""
    if "decoder_attention_mask" in batch and not name.startswith("encoder"):
        crosses = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        return batch["attention_mask" if crosses else "decoder_attention_mask"].bool()
    return batch["attention_mask"].bool() if "attention_mask" in batch else None


def oracle(
    model: nn.Module, modules: dict[str, nn.Module], batches: list[Batch], upstream: list[Tensor]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Rows of inputs, of gradients at the outputs, and of gradients at the inputs, by module, without padding."""
    rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in modules}
    for batch, gradient in zip(batches, upstream, strict=True):
        seen: dict[str, list[Tensor]] = {name: [] for name in modules}

        def store(module: nn.Module, args: Any, output: Tensor, into: list[Tensor]) -> None:
            for tensor in (args[0], output):
                if tensor.requires_grad:
                    tensor.retain_grad()
                into.append(tensor)

        handles = [
            module.register_forward_hook(lambda m, args, output, into=seen[name]: store(m, args, output, into))
            for name, module in modules.items()
        ]
        output = model(**batch)
        (output if isinstance(output, Tensor) else output.logits).backward(gradient)
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            x, y = seen[name]
            g, h = y.grad, torch.zeros_like(x) if x.grad is None else x.grad
            if isinstance(module, nn.Conv2d):
                x, h, g = patches(module, x), patches(module, h), g.flatten(2).mT
            elif isinstance(module, nn.Embedding):
                x = torch.eye(module.num_embeddings, dtype=torch.float64)[x]
                h = x
            mask = keeps(name, batch) if x.ndim == 3 and not isinstance(module, nn.Conv2d) else None
            rows[name].append(tuple(t.detach().flatten(0, -2) if mask is None else t.detach()[mask] for t in (x, g, h)))
    return {name: tuple(map(torch.cat, zip(*parts, strict=True))) for name, parts in rows.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=["float64", "float32"])
def test_statistics_equal_the_brute_force_oracle(setting: Setting, dtype: torch.dtype, tolerance: float) -> None:
    def cast(batch: Batch, to: torch.dtype) -> Batch:
        return {name: value.to(to) if value.is_floating_point() else value for name, value in batch.items()}

    model = setting.build().to(dtype)
    with upstream_gradients(model) as upstream:
        got = gather(model, setting.modules, [cast(batch, dtype) for batch in setting.batches])
    exact = setting.build().double()
    modules = setting.modules(exact)
    batches = [cast(batch, torch.float64) for batch in setting.batches]
    expected = oracle(exact, modules, batches, [g.double() for g in upstream])
    assert got.weight_norms == pytest.approx({name: m.weight.norm().item() for name, m in modules.items()}, rel=1e-6)
    for name, (X, Y, H) in expected.items():
        assert got.input_rows(name) == got.output_rows(name) == len(X) == len(Y), name
        gram = X.mT @ X / len(X)
        if isinstance(modules[name], nn.Embedding):
            assert torch.equal(got.gram(name), gram.diagonal()), name
        else:
            assert relative_error(got.gram(name), gram) < tolerance, name
        assert relative_error(got.mean(name), X.mean(0)) < tolerance, name
        assert relative_error(got.fisher(name), Y.mT @ Y / len(Y)) < tolerance, name
        squares, norms = X.square().sum(1), Y.square().sum(1)
        if norms.any():
            scale = (squares * norms).mean() / (squares.mean() * norms.mean()) * len(Y) / got.outputs[name].gradient_tokens
            assert got.loss_scale(name) == pytest.approx(float(scale), rel=max(tolerance, 1e-5)), name
        weights = H.square().sum(1)
        weighted = None if isinstance(modules[name], nn.Embedding) else got.weighted_gram(name)
        if weighted is not None:
            assert relative_error(weighted, (X * weights[:, None]).mT @ X / weights.sum()) < tolerance, name
            centred = X - X.mean(0)
            weighted = got.weighted_gram(name, got.mean(name))
            assert relative_error(weighted, (centred * weights[:, None]).mT @ centred / weights.sum()) < tolerance, name
        for tensor in (got.gram(name), got.fisher(name)):
            assert tensor.dtype == torch.float64
            assert tensor.ndim == 1 or torch.equal(tensor, tensor.mT), name


def test_gradients_are_those_of_labels_drawn_from_the_model() -> None:
    model = llama()
    with upstream_gradients(model) as upstream:
        got = gather(model, linear_layers, [{"input_ids": tokens(40, 100)}])
    probabilities = model(input_ids=tokens(40, 100)).logits.softmax(-1)
    one_hot = (probabilities - torch.cat(upstream)).detach()
    assert got.gradient_tokens == 4000
    assert (one_hot.sum(-1) - 1).abs().max() < 1e-4
    assert torch.equal((one_hot.abs() > 0.5).sum(-1), torch.ones(40, 100, dtype=torch.int64))
    # Drawn with the model's probabilities: frequencies of all labels, within five standard deviations.
    frequency, expected = one_hot.sum((0, 1)), probabilities.sum((0, 1))
    assert ((frequency - expected).abs() < 5 * expected.sqrt()).all()


def test_labels_stand_in_for_the_mask_of_the_decoder() -> None:
    batch = pairs([5, 2], [4, 3], (5, 4))
    labels = batch.pop("decoder_input_ids").masked_fill(batch.pop("decoder_attention_mask") == 0, -100)
    got = gather(t5(), linear_layers, [{**batch, "labels": labels}])
    assert got.input_rows("decoder.block.0.layer.0.SelfAttention.q") == got.gradient_tokens == 7


# The split into batches, the seed


def split(batches: list[Batch], size: int) -> list[Batch]:
    """The same rows in other batches; all batches must be of one length."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    rows = len(next(iter(whole.values())))
    return [{n: v[start : start + size] for n, v in whole.items()} for start in range(0, rows, size)]


SPLITS = {
    "Llama": (llama, linear_layers, [text([8, 5, 8, 1, 3, 8], 8)]),
    "BERT": (bert, linear_layers, [text([8, 5, 8, 1, 3, 8], 8)]),
    "T5": (t5, linear_layers, [pairs([8, 3, 1, 2, 5, 8], [6, 2, 3, 4, 1, 6], (8, 6))]),
    "Conv2d": (convnet, linear_layers, [images(6, (3, 10, 9), "x")]),
    "Embedding": (llama, named("model.embed_tokens"), [text([8, 5, 8, 1, 3, 8], 8)]),
}


@pytest.mark.parametrize("key", SPLITS)
def test_statistics_do_not_depend_on_the_split_into_batches(key: str) -> None:
    build, modules, batches = SPLITS[key]
    # In float64 the model itself rounds alike in batches of any size, and draws the same labels.
    batches = [{n: v.double() if v.is_floating_point() else v for n, v in batch.items()} for batch in batches]
    whole = gather(build().double(), modules, batches)
    for size in (1, 2, 4):
        assert_same(gather(build().double(), modules, split(batches, size)), whole)


def test_statistics_follow_the_seed() -> None:
    batches = [text([8, 5], 8), text([7, 7], 7, seed=1)]
    one, two, three = (gather(llama(), linear_layers, batches, seed=seed) for seed in (3, 3, 4))
    assert_same(one, two, tolerance=0)
    assert one.seed == 3
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(one.gram(name), three.gram(name))
    assert not torch.equal(one.fisher(name), three.fisher(name))


def test_the_global_generator_is_left_alone() -> None:
    model = bert()
    state = torch.get_rng_state()
    gather(model, linear_layers, [text([8, 5], 8)])
    assert torch.equal(torch.get_rng_state(), state)


def test_without_gradients_there_is_no_backward_pass() -> None:
    batches = [text([8, 5], 8), text([7, 7], 7, seed=1)]
    with_gradients = gather(llama(), linear_layers, batches)
    got = gather(llama(), linear_layers, batches, gradients=False)
    assert got.reads == with_gradients.reads
    assert all(torch.equal(record.gram, with_gradients.inputs[name].gram) for name, record in got.inputs.items())
    assert got.outputs == {}
    assert got.gradient_tokens == 0


@pytest.mark.parametrize("build", [bert, lambda: BertModel(bert().config)], ids=["logits", "no logits"])
def test_models_with_and_without_logits_have_gradients(build: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    got = gather(build().eval(), linear_layers, [text([8, 5], 8)])
    assert got.gradient_tokens > 0
    assert all(record.gram.any() for record in got.outputs.values())
    assert len(got.outputs) == len(got.weight_norms)


# What is left behind


@pytest.mark.parametrize("fails", [None, "forward", "backward", "batches", "keyboard"])
@pytest.mark.parametrize("build", [llama, t5], ids=["Llama", "T5"])
def test_nothing_is_left_in_the_model(build: Callable[[], PreTrainedModel], fails: str | None) -> None:
    model = build().train()
    first = next(model.children())
    first.eval()  # a mixture of modes
    next(model.parameters()).requires_grad_(False)
    before, weights = state_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    batch = pairs([5, 2], [4, 3], (5, 4)) if build is t5 else text([5, 2], 5)
    error = {"keyboard": KeyboardInterrupt, "batches": ZeroDivisionError}.get(fails, ValueError)

    def batches() -> Iterator[Batch]:
        yield batch
        if fails == "forward":
            yield {"nonsense": torch.ones(2)}
        if fails == "batches":
            raise ZeroDivisionError
        if fails == "keyboard":
            raise KeyboardInterrupt
        yield batch

    modules = linear_layers(model)
    if fails == "backward":
        handle = list(modules.values())[-1].register_forward_hook(
            lambda m, args, out: out.register_hook(lambda g: g * float("nan")) and None
        )
        before = state_of(model)
    if fails is None:
        gather(model, modules, batches())
    else:
        with pytest.raises(error):
            gather(model, modules, batches())
    assert state_of(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    if fails == "backward":
        handle.remove()


def test_gradients_that_are_there_stay() -> None:
    model = llama()
    model(**text([5], 5)).logits.sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    gather(model, linear_layers, [text([5, 2], 5)])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_runs_inside_no_grad() -> None:
    with torch.no_grad():
        inside = gather(llama(), linear_layers, [text([5, 2], 5)])
    assert_same(inside, gather(llama(), linear_layers, [text([5, 2], 5)]))


def test_inference_mode_is_refused_where_gradients_are_needed() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="needs gradients, which `torch"):
        gather(llama(), linear_layers, [text([4], 4)])
    with torch.inference_mode():
        assert gather(llama(), linear_layers, [text([4], 4)], gradients=False).tokens == 4


def test_batches_that_are_shared_out_already_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: (2, 0))
    monkeypatch.setattr(calibration, "processes", lambda: (2, 0))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda *args: None)
    monkeypatch.setattr(distributed.dist, "get_backend_config", lambda: "cpu:gloo")
    loader = DataLoaderShard([text([4], 4)])
    with pytest.raises(ValueError, match="shared out among the processes by accelerate already; give every process"):
        gather(llama(), linear_layers, loader)


def test_a_batch_of_nothing_but_padding_counts_for_nothing(tmp_path: Path) -> None:
    batches = [text([4, 3], 4), text([0, 0], 4)]
    model = llama()
    whole, first = (gather(model, linear_layers, given) for given in (batches, batches[:1]))
    assert_same(whole, first, 0)
    nothing = gather(model, linear_layers, batches[1:])
    nothing.save(tmp_path / "statistics.safetensors")
    assert Statistics.load(tmp_path / "statistics.safetensors").tokens == 0
    with pytest.raises(ValueError, match="no batch reached these 14 of 14 targets"):
        nothing.check(linear_layers(model))


def test_a_generator_is_read_once_and_one_batch_at_a_time() -> None:
    running = []

    def batches() -> Iterator[Batch]:
        for seed in range(3):
            running.append(seed)
            yield text([5, 2], 5, seed=seed)

    generator = batches()
    model = llama()
    seen: list[int] = []
    handle = model.register_forward_hook(lambda *_: seen.append(len(running)))
    got = gather(model, linear_layers, generator)
    handle.remove()
    assert seen == [1, 2, 3]
    assert next(iter(got.inputs.values())).rows == 21
    with pytest.raises(ValueError, match="`batches` must hold at least one batch, got none; a generator can be read only once"):
        gather(model, linear_layers, generator)


# Faults


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "must hold at least one batch, got none"),
        ([torch.ones(2, 3)], "must hold mappings of keyword arguments, got a Tensor as batch 0"),
        ([text([5], 5), "text"], "must hold mappings of keyword arguments, got a str as batch 1"),
        ([(torch.ones(2),)], "got a tuple as batch 0"),
        ([text([5], 5), {"pixels": torch.ones(2)}], r"the model does not accept batch 1 \(\['pixels'\]\)"),
        ([{"input_ids": torch.tensor([[100]])}], r"the model does not accept batch 0 \(\['input_ids'\]\)"),
    ],
    ids=["none", "tensor", "string", "tuple", "unknown argument", "token out of range"],
)
def test_batches_that_cannot_be_used(batches: list[Any], match: str) -> None:
    model = llama()
    before = state_of(model)
    with pytest.raises(ValueError, match=match):
        gather(model, linear_layers, batches)
    assert state_of(model) == before


def test_documents_that_are_packed_into_one_row_do_not_see_each_other() -> None:
    apart = [{"input_ids": tokens(3, 8)}]
    packed = [{"input_ids": apart[0]["input_ids"].view(1, -1), "position_ids": torch.arange(8).repeat(3)[None]}]
    one, other = (gather(llama(), linear_layers, batches, gradients=False) for batches in (apart, packed))
    for name, of_input in one.inputs.items():
        assert relative_error(other.inputs[name].gram, of_input.gram) < 1e-5, name


def test_what_was_compiled_is_seen_by_the_hooks() -> None:
    batches = [{"input_ids": tokens(2, 8)}]
    expected, model = gather(llama(), linear_layers, batches), llama()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert_same(gather(model, linear_layers, batches), expected)
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
