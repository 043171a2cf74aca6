"""What is recorded in one pass: which modules read one tensor, which rows count, and what no gradient reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.batches import Batch, padding, pairs, text
from support.gathering import assert_same, gather, linear_layers, named
from support.models import bert, llama, mixture, t5, tied
from support.tolerances import assert_close, relative_error
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reparam_peft.calibration.gather import gather_statistics


def test_distinct_inputs_have_one_gram_each() -> None:
    got = gather(llama(), linear_layers, [text([5], 5)])
    for layer in ("model.layers.0", "model.layers.1"):
        assert {got.reads[f"{layer}.self_attn.{name}_proj"] for name in "qkv"} == {f"{layer}.self_attn.q_proj"}
        assert {got.reads[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up")} == {f"{layer}.mlp.gate_proj"}
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            assert got.reads[f"{layer}.{name}"] == f"{layer}.{name}"
    assert len(got.inputs) == 8
    assert len(got.outputs) == 14


def test_cross_attention_of_all_decoder_layers_shares_the_encoders_output() -> None:
    got = gather(t5(), linear_layers, [pairs([5, 2], [4, 3], (5, 4))])
    first = "decoder.block.0.layer.1.EncDecAttention"
    crossing = [f"decoder.block.{block}.layer.1.EncDecAttention.{name}" for block in (0, 1) for name in "kv"]
    assert {got.reads[name] for name in crossing} == {f"{first}.k"}
    assert got.input_rows(f"{first}.k") == 7
    assert got.reads[f"{first}.q"] == f"{first}.q"
    assert got.input_rows(f"{first}.q") == 7 == 4 + 3


def test_a_tensor_that_was_changed_in_place_is_another_input() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            x.mul_(2)
            return y + self.two(x)

    got = gather(Net(), named("one", "two"), [{"x": torch.randn(10, 6)}])
    assert got.reads == {"one": "one", "two": "two"}
    torch.testing.assert_close(got.gram("two"), 4 * got.gram("one"))


def test_an_input_that_changes_before_the_backward_pass_has_no_weighted_gram() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, change: bool) -> Tensor:
            h = self.first(x)
            y = self.second(h)
            return y + (h.mul_(2) if change else h)

    torch.manual_seed(0)
    model, x = Changing(), torch.randn(6, 4)
    modules = named("first", "second")
    steady, changing = (gather(model, modules, [{"x": x, "change": change}]) for change in (False, True))
    assert [name for name, record in steady.inputs.items() if record.weighted is not None] == ["second"]
    assert all(record.weighted is None for record in changing.inputs.values())
    assert torch.equal(changing.gram("second"), steady.gram("second"))


def test_a_module_without_rows_in_one_batch_adds_nothing() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            chosen = (x[:, 0] > 0).nonzero()[:, 0]
            return x.index_put((chosen,), self.expert(x[chosen]))

    X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Routed()
    first, both = (gather(model, named("expert"), [{"x": x} for x in given]) for given in ([X], [X, -X.abs()]))
    assert both.input_rows("expert") == first.input_rows("expert") > 0
    assert torch.equal(both.gram("expert"), first.gram("expert"))


@pytest.mark.parametrize("constant", [1e2, 1e3])
def test_constant_channels_have_no_variance_whoever_reads_them_first(constant: float) -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = 0.01 * torch.tanh(self.first(x)) + torch.tensor([constant, 0, 0, 0])
            return self.k(h) + self.v(h)

    torch.manual_seed(0)
    model, x = Sharing(), torch.randn(50, 4)
    got = gather(model, named("first", "k", "v"), [{"x": x[:20]}, {"x": x[20:]}])
    assert got.reads["v"] == "k"
    with torch.no_grad():
        h = (0.01 * torch.tanh(model.first(x)) + torch.tensor([constant, 0, 0, 0])).double()
    assert relative_error(got.covariance("v"), h.T.cov(correction=0)) < 1e-5
    assert got.weighted_gram("v", got.mean("v")).diagonal().max() < 1e-3


def test_a_module_that_runs_twice_sees_both_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(input=x).relu())

    torch.manual_seed(0)
    net, x = Net(), torch.randn(10, 6)
    got = gather(net, named("layer"), [{"x": x}])
    X = torch.cat([x, net.layer(x).relu()]).detach().double()
    assert got.input_rows("layer") == 20 == got.output_rows("layer")
    assert relative_error(got.gram("layer"), X.mT @ X / 20) < 1e-6


def test_inputs_that_are_shared_at_times_only_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x if len(x) > 3 else x + 1)

    with pytest.raises(ValueError, match="two: it read the same input as one in one batch and not in another"):
        gather(Net(), named("one", "two"), [{"x": torch.randn(4, 6)}, {"x": torch.randn(3, 6)}])


def test_modules_that_share_some_of_their_inputs_have_sums_of_their_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three, self.four = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            shared, other = self.one(x) + self.two(x) + self.three(x) + self.four(x), x - 1
            return shared + self.two(x + 1) + self.one(other) + self.four(other)

    x = torch.randn(10, 6)
    got = gather(Net(), named("one", "two", "three", "four"), [{"x": x}, {"x": x}])
    assert got.reads == {"one": "one", "two": "two", "three": "three", "four": "one"}
    for name, read in (("one", [x, x - 1]), ("two", [x, x + 1]), ("three", [x])):
        X = torch.cat(read).double()
        assert got.input_rows(name) == 2 * len(X)
        assert relative_error(got.gram(name), X.mT @ X / len(X)) < 1e-6


def test_the_output_of_an_encoder_may_be_a_list() -> None:
    class Net(nn.Module):
        config = SimpleNamespace(is_encoder_decoder=True)

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Sequential(nn.Linear(6, 6), Listed()), nn.Linear(6, 6)

        def get_encoder(self) -> nn.Module:
            return self.encoder

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x)[0][0])

    class Listed(nn.Module):
        def forward(self, x: Tensor) -> tuple[list[Tensor]]:
            return ([x],)

    assert gather(Net(), named("head"), [{"x": torch.randn(4, 6)}]).input_rows("head") == 4


def test_experts_see_the_tokens_that_are_routed_to_them() -> None:
    model = mixture()
    x = torch.randn(4, 30, 16, generator=torch.Generator().manual_seed(0))
    got = gather(model, linear_layers, [{"x": x}])
    flat = x.flatten(0, 1).double()
    chosen = model.router(x.flatten(0, 1)).argmax(-1)
    for index in range(3):
        X = flat[chosen == index]
        name = f"experts.{index}.0"
        assert got.input_rows(name) == len(X) > 0
        assert relative_error(got.gram(name), X.mT @ X / len(X)) < 1e-6
    assert "experts.3.0" not in got.reads


def test_inputs_of_two_dimensions_are_not_taken_for_padded_ones() -> None:
    model = bert()  # hidden size 48: the input of the pooler is as large as the mask of 48 tokens
    got = gather(model, linear_layers, [text([48, 20], 48)])
    assert got.input_rows("bert.pooler.dense") == 2
    assert got.input_rows("bert.encoder.layer.0.attention.self.query") == 68


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
@pytest.mark.parametrize("second", [lambda: nn.Linear(8, 4), lambda: nn.Linear(8, 4, bias=False), lambda: Conv1D(4, 8)])
def test_gradients_reach_targets_through_operations_in_place(second: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), second(), nn.ReLU(inplace=True))
    twin = nn.Sequential(net[0], nn.ReLU(), net[2], nn.ReLU())
    got, expected = (gather(model, named("0", "2"), [{"input": torch.ones(shape).cumsum(-2)}]) for model in (net, twin))
    assert_same(got, expected)
    assert got.output_rows("2") == math.prod(shape[:-1])


def test_a_target_whose_output_is_not_predicted_with_has_no_gradient() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.used(x), "other": self.unused(x)}

    got = gather(Net(), named("used", "unused"), [{"x": torch.randn(10, 6)}])
    assert got.fisher("used").any()
    assert not got.fisher("unused").any()
    assert got.loss_scale("unused") == 0.0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_name_the_first_module(value: float) -> None:
    model = llama()

    def batches() -> Iterator[Batch]:
        yield text([5], 5)
        handle = model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda m, a, output: output + value)
        yield text([5], 5)
        handle.remove()

    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.gate_proj: its inputs hold NaN or infinite values in batch 1"
    ):
        gather(model, linear_layers, batches())


def test_padding_may_hold_anything() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x) * attention_mask[..., None].nan_to_num()

    x = torch.randn(2, 4, 6)
    mask = padding([4, 1], 4)
    spoilt = x.masked_fill(mask[..., None] == 0, torch.inf)
    net = Net()
    one, two = (gather(net, named("layer"), [{"x": v, "attention_mask": mask}], gradients=False) for v in (x, spoilt))
    assert torch.equal(one.gram("layer"), two.gram("layer"))


def test_a_head_adds_its_use_of_a_table() -> None:
    model: Any = tied()
    name, heads = "model.embed_tokens", {"model.embed_tokens": [model.lm_head]}
    batches, modules = [{"input_ids": torch.arange(24).view(2, 12)}], {name: model.model.embed_tokens}
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1)))
    alone = gather_statistics(model, modules, batches, progress=False)
    both = gather_statistics(model, modules, batches, progress=False, heads=heads)
    X = seen[-1].double()
    assert_close(48 * both.fisher(name) - 24 * alone.fisher(name), X.mT @ X, torch.float32)
    assert (alone.outputs[name].rows, both.outputs[name].rows) == (24, 48)
    assert both.inputs[name].rows == 48
    assert (both.inputs[name].gram > alone.inputs[name].gram).all()
    assert both.loss_scale(name) > 0
    without = gather_statistics(model, modules, batches, gradients=False, progress=False, heads=heads)
    assert_close(without.inputs[name].gram - alone.inputs[name].gram, torch.full((100,), 0.24, dtype=torch.float64))
