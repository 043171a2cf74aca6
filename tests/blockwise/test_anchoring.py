"""The matrix that makes up for what the compressed part before it changes, against least squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.batches import text
from support.models import bert, gpt2, llama, mixture
from support.tolerances import assert_close
from torch import Tensor, nn

from reparam_peft import Anchoring
from reparam_peft.blockwise.anchoring import Deviation, Observed, anchored, input_groups, observe, residual_sources
from reparam_peft.blockwise.blocks import Replay
from reparam_peft.numerics.grams import unpack
from reparam_peft.runtime.blocks import find_blocks

GENERATOR = torch.Generator().manual_seed(0)


class Block(nn.Module):
    """A block in which two layers share an input and a third adds to the stream."""

    def __init__(self, seed: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(6)
        self.one, self.two, self.out = nn.Linear(6, 8, bias), nn.Linear(6, 8, bias), nn.Linear(8, 6, bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.out((self.one(h) * self.two(h).sigmoid()).tanh())


def streams(batches: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Inputs of the original and of the compressed block, which deviate, about a mean that is not zero."""
    found = []
    for _ in range(batches):
        x = torch.randn(3, 7, 6, generator=GENERATOR, dtype=torch.float64) + 0.5
        found.append((x, x + 0.3 * torch.randn(3, 7, 6, generator=GENERATOR, dtype=torch.float64) - 0.2))
    return found


def watch(block: Block, pairs: Any, group: list[str], sources: Any = None, mask: Any = None) -> Observed:
    calls = [(((x,), {}), ((y,), {}), lambda x: mask) for x, y in pairs]
    return observe(block, block, calls, group, sources or {})


def inside(block: Block, x: Tensor) -> Tensor:
    """What `out` sees."""
    with torch.no_grad():
        h = block.norm(x)
        return (block.one(h) * block.two(h).sigmoid()).tanh().flatten(0, 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("original", "residual"), [(1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (0.3, 0.7), (0.0, 1.0)])
def test_it_is_the_least_squares_fit(original: float, residual: float, bias: bool) -> None:
    block, pairs = Block(0, bias), streams()
    seen = watch(block, pairs, ["out"], {"out": "norm"})
    inputs = seen.moments(bias)
    options = Anchoring(original, residual)
    W, mean = anchored(block.out.weight, block.out.bias, "out", seen, inputs.gram, options)
    x, y = (torch.cat([inside(block, pair[i]) for pair in pairs]) for i in (0, 1))
    h = torch.cat([(a - b).flatten(0, 1) for a, b in pairs])
    with torch.no_grad():
        target = block.out(original * x + (1 - original) * y) + residual * h
    if bias:
        assert_close(mean, target.mean(0))
        target, y = target - target.mean(0), y - y.mean(0)
    assert_close(W, torch.linalg.lstsq(y, target).solution.mT, torch.float64)
    assert_close(inputs.gram, y.mT @ y / len(y))
    assert_close(inputs.mean, torch.cat([inside(block, pair[1]) for pair in pairs]).mean(0))


def test_without_drift_or_anchor_the_matrix_stays() -> None:
    block, pairs = Block(0), streams()
    same = [(x, x) for x, _ in pairs]
    for options, given in ((Anchoring(1.0, 1.0), same), (Anchoring(0.0, 0.0), pairs)):
        seen = watch(block, given, ["out"], {"out": "norm"})
        W, mean = anchored(block.out.weight, block.out.bias, "out", seen, seen.moments(True).gram, options)
        assert_close(W, block.out.weight.detach())
        assert_close(mean, torch.cat([block.out(inside(block, pair[1])) for pair in given]).mean(0).detach())


def test_sums_do_not_depend_on_the_split_into_batches_and_leave_padding_out() -> None:
    block, pairs = Block(0), streams(2)
    whole = [(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))]
    one, two = watch(block, pairs, ["one", "two"]), watch(block, whole, ["one", "two"])
    assert one.rows == two.rows == 42
    for get in (lambda s: s.gram, lambda s: s.sum, lambda s: s.drift.cross, lambda s: s.drift.sum):
        assert_close(get(one), get(two))
    mask = torch.rand(21, generator=GENERATOR) < 0.5
    masked = watch(block, pairs[:1], ["one"], mask=mask)
    rows = block.norm(pairs[0][1]).flatten(0, 1)[mask].detach()
    assert masked.rows == int(mask.sum())
    assert_close(unpack(masked.gram), rows.mT @ rows)


def test_modules_that_read_the_same_tensor_are_one_group_in_the_order_of_the_data_flow() -> None:
    model = llama()
    replay = Replay(model, find_blocks(model), [text([5, 4], 5)])
    block = replay.blocks["model.layers.0"]
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    call = replay.inputs(0, 0, {})
    shown = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    shown += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    assert input_groups(block, call, list(reversed(names))) == shown
    assert input_groups(block, call, names[-1:]) == shown[-1:]


def test_modules_that_do_not_run_come_last() -> None:
    block = mixture()
    names = [f"experts.{i}.{j}" for i in range(4) for j in (0, 2)]
    groups = input_groups(block, ((torch.randn(1, 2, 16, generator=GENERATOR),), {}), names)
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert groups[-1] == ["experts.3.2"]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (llama, {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}),
        (gpt2, {"attn.c_proj": "", "mlp.c_proj": "ln_2"}),
        (bert, {"attention.output.dense": "", "output.dense": "intermediate"}),
    ],
)
def test_streams_that_outputs_are_added_to_are_found(build: Any, expected: dict[str, str]) -> None:
    model = build()
    replay = Replay(model, find_blocks(model), [text([5, 4], 5)])
    position = len(replay.order) - 1
    block = replay.blocks[replay.order[position]]
    with torch.no_grad():
        outputs: dict[int, Any] = {}
        for j in range(position):
            args, kwargs = replay.inputs(j, 0, outputs)
            outputs[j] = replay.blocks[replay.order[j]](*args, **kwargs)
        call = replay.inputs(position, 0, outputs)
        names = [name for name, module in block.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
        sources = residual_sources(block, call, names)
    assert sources.keys() == expected.keys()
    found = {name: first_input(block, call, source) for name, source in sources.items()}
    assert all(torch.equal(found[name], first_input(block, call, expected[name])) for name in expected)


def first_input(block: nn.Module, call: Any, name: str) -> Tensor:
    seen: list[Tensor] = []
    hook = block.get_submodule(name).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
    )
    with torch.no_grad():
        block(*call[0], **call[1])
    hook.remove()
    return seen[0]


def test_rows_of_routed_tokens_are_not_paired() -> None:
    block = mixture()
    x = torch.randn(4, 9, 16, generator=GENERATOR)
    calls = [(((x,), {}), ((x + 0.1,), {}), lambda x: None)]
    routed = observe(block, block, calls, ["experts.0.0"], {})
    assert routed is not None
    assert routed.drift is None
    assert 0 < routed.rows < 36
    W, _ = anchored(block.experts[0][0].weight, block.experts[0][0].bias, "", routed, unpack(routed.gram), Anchoring(1.0))
    assert_close(W, block.experts[0][0].weight.detach().double())
    assert observe(block, block, calls, ["experts.3.0"], {}) is None
    everyone = observe(block, block, calls, ["router"], {})
    assert everyone is not None
    assert everyone.drift is not None


class Embeds(nn.Module):
    """A block that is called with token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(8, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.embed(ids))


def test_rows_of_a_block_that_embeds_its_tokens_are_paired() -> None:
    block, ids = Embeds(), torch.arange(8).view(2, 4)
    seen = observe(block, block, [(((ids,), {}), ((ids,), {}), lambda x: None)], ["linear"], {})
    assert seen is not None
    assert seen.rows == 8
    assert seen.drift is not None


def test_broken_activations_are_named() -> None:
    block, ((x, y),) = Block(0), streams(1)
    y = y.clone()
    y[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="its inputs in the compressed model are NaN or infinite"):
        watch(block, [(x, y)], ["one"])


@pytest.mark.parametrize("options", [{"original": 1.5}, {"original": -0.1}, {"residual": 2}, {"residual": float("nan")}])
def test_what_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"`{next(iter(options))}` must be in \[0, 1\]"):
        Anchoring(**options)


def test_sums_of_deviations_are_those_of_all_rows_whatever_their_number_and_width() -> None:
    generator = torch.Generator().manual_seed(0)
    D, X = (torch.randn(40, size, generator=generator) for size in (300, 7))  # wider than what is multiplied at a time
    deviation = Deviation.between(300, 7, D.device)
    for rows in (slice(0, 25), slice(25, 40)):
        deviation.add(D[rows], X[rows])
    torch.testing.assert_close(deviation.cross, D.double().mT @ X.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(deviation.sum, D.double().sum(0))
