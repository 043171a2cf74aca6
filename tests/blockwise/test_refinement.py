"""Blocks that are trained to compute what others do, and left as they were where that fails."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reparam_peft import Refinement
from reparam_peft.blockwise.refinement import Task, refine_block

OPTIONS = Refinement(epochs=6, learning_rate=6e-2, autocast=None)


class Block(nn.Module):
    """A residual block whose output has one channel of huge values in the first token."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.linear = nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.linear(self.norm(x)).tanh(), None


def task(batches: int = 8, dtype: torch.dtype = torch.float32, mask: Tensor | None = None) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 5, 12, generator=generator).to(dtype) for _ in range(batches)]
    for x in inputs:
        x[:, 0, 0] = 1000.0
    target = Block(1).to(dtype)
    with torch.no_grad():
        outputs = [target(x)[0] for x in inputs]
    return Task(lambda i: ((inputs[i],), {}), lambda i: outputs[i], lambda i, output: mask)


def state(block: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_the_error_on_batches_held_out_falls_and_the_best_epoch_is_taken(autocast: str | None) -> None:
    block = Block(0)
    before = state(block)
    options = Refinement(epochs=6, learning_rate=6e-2, autocast=autocast)
    errors = refine_block(block, list(block.parameters()), task(), 8, options)
    assert min(errors) < 0.7 * errors[0]
    train, held = options.split(8)
    assert task().error(block, held) == pytest.approx(min(errors), rel=1e-6)
    assert any(not torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert not set(train) & set(held)


def test_a_block_that_computes_without_gradients_is_refused() -> None:
    block = Block(0)
    before, block.forward = state(block), torch.no_grad()(block.forward)
    with pytest.raises(ValueError, match="its output has no gradient"):
        refine_block(block, list(block.parameters()), task(), 8, OPTIONS)
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


def test_where_no_epoch_helps_nothing_changes_and_training_stops() -> None:
    block = Block(0)
    before = state(block)
    options = Refinement(epochs=50, learning_rate=100.0, warmup=0.0, patience=3, autocast=None)
    errors = refine_block(block, list(block.parameters()), task(), 8, options)
    assert len(errors) == 1 + 3
    assert min(errors) == errors[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


def test_only_parameters_that_are_given_are_trained() -> None:
    block = Block(0)
    before = state(block)
    refine_block(block, [block.linear.weight], task(), 8, OPTIONS)
    changed = {name for name, tensor in block.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {"linear.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_trained_in_float32_and_rounded(dtype: torch.dtype) -> None:
    block = Block(0).to(dtype)
    errors = refine_block(block, list(block.parameters()), task(dtype=dtype), 8, OPTIONS)
    assert min(errors) < 0.9 * errors[0]
    assert {parameter.dtype for parameter in block.parameters()} == {dtype}
    assert task(dtype=dtype).error(block, OPTIONS.split(8)[1]) == pytest.approx(min(errors), rel=1e-3)


def test_updates_that_half_precision_loses_are_kept_until_they_count() -> None:
    """At this learning rate no single step changes a bfloat16 weight by as much as its rounding."""
    options = Refinement(epochs=40, learning_rate=1e-3, warmup=0.0, autocast=None)
    block = Block(0).bfloat16()
    errors = refine_block(block, list(block.parameters()), task(dtype=torch.bfloat16), 8, options)
    assert min(errors) < 0.98 * errors[0]


def test_every_token_counts_alike_whatever_its_size() -> None:
    made = task(1)
    x, y = made.call(0)[0][0], made.target(0)
    scales = torch.tensor([1e4, 1.0, 1.0, 1e-3, 1.0])[None, :, None]

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1.1 * y * scales

    scaled = Task(lambda i: ((x,), {}), lambda i: y * scales, lambda i, output: None)
    assert scaled.error(Scaled(), [0]) == pytest.approx(math.log(1.01), rel=1e-4)


def test_tokens_that_are_huge_in_the_compressed_model_only_do_not_drown_the_others() -> None:
    made = task()
    x = torch.ones(1, 1, 1)

    class Huge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[[1e4], [1.1], [1.1]]])

    outlier = Task(lambda i: ((x,), {}), lambda i: torch.ones(1, 3, 1), lambda i, output: None)
    assert outlier.error(Huge(), [0]) < math.log(1e8)
    assert made.error(Block(1), [0]) == 0.0


def test_padding_does_not_count() -> None:
    mask = torch.tensor([True, True, True, False, False] * 3)
    made = task(1, mask=mask)
    x = made.call(0)[0][0].clone()
    block = Block(0)
    expected = made.error(block, [0])
    x[:, 3:] = torch.randn(3, 2, 12)
    assert Task(lambda i: ((x,), {}), made.target, made.mask).error(block, [0]) == pytest.approx(expected, rel=1e-6)
    assert Task(lambda i: ((x,), {}), made.target, lambda i, output: None).error(block, [0]) > 1.5 * expected


def test_the_same_seed_gives_the_same_parameters_and_another_seed_others() -> None:
    results = []
    for seed in (0, 0, 1):
        block = Block(0)
        refine_block(block, list(block.parameters()), task(), 8, Refinement(epochs=2, seed=seed, autocast=None))
        results.append(block.linear.weight.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_block_whose_output_has_another_length_than_that_of_the_original_is_refused() -> None:
    made = task()
    longer = Task(made.call, lambda i: made.target(i).repeat(1, 2, 1), made.mask)
    with pytest.raises(ValueError, match=r"the output has shape \(3, 5, 12\), and \(3, 10, 12\) in the original model"):
        longer.error(Block(0), [0])


def test_a_block_that_is_broken_already_is_refused() -> None:
    block = Block(0)
    with torch.no_grad():
        block.linear.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the output of the block is not finite"):
        refine_block(block, list(block.parameters()), task(), 8, OPTIONS)


def test_steps_with_broken_gradients_are_left_out() -> None:
    block = Block(0)
    made = task()

    def call(batch: int) -> Any:
        (x,), kwargs = made.call(batch)
        return ((x * (torch.nan if batch == 2 else 1.0),), kwargs)

    broken = Task(call, made.target, made.mask)
    errors = refine_block(block, list(block.parameters()), broken, 8, OPTIONS)
    assert min(errors) < 0.7 * errors[0]


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (8, 1), (32, 4)])
def test_the_last_batches_are_held_out(count: int, held: int) -> None:
    assert Refinement().split(count) == ([*range(count - held)], [*range(count - held, count)])
    assert Refinement(holdout=0.0).split(count) == ([*range(count)], [])


def test_one_batch_is_checked_on_itself() -> None:
    block = Block(0)
    errors = refine_block(block, list(block.parameters()), task(1), 1, OPTIONS)
    assert min(errors) < errors[0]
    assert task(1).error(block, [0]) == pytest.approx(min(errors), rel=1e-6)


def test_a_block_without_parameters_to_train_is_left_alone() -> None:
    block = Block(0)
    before = state(block)
    assert refine_block(block, [], task(), 8, OPTIONS) == [task().error(block, [7])]
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


def test_training_does_not_touch_copies() -> None:
    block = Block(0)
    other = copy.deepcopy(block)
    refine_block(block, list(block.parameters()), task(), 8, OPTIONS)
    assert torch.equal(other.linear.weight, Block(0).linear.weight)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, r"`epochs` must be a whole number of at least 1, got 0"),
        ("batch_size", 0, "`batch_size` must be a whole number of at least 1"),
        ("epochs", 1.5, "`epochs` must be a whole number"),
        ("patience", True, "`patience` must be a whole number"),
        ("seed", -1, r"`seed` must be a whole number in \[0, 2\*\*63\)"),
        ("learning_rate", 0.0, r"`learning_rate` must be positive and finite, got 0\.0"),
        ("learning_rate", float("nan"), "`learning_rate` must be positive"),
        ("max_grad_norm", float("inf"), "`max_grad_norm` must be positive"),
        ("weight_decay", -0.1, "`weight_decay` must be finite and not negative"),
        ("warmup", 1.0, r"`warmup` must be in \[0, 1\)"),
        ("holdout", -0.1, r"`holdout` must be in \[0, 1\)"),
        ("autocast", "float32", "`autocast` must be one of"),
    ],
)
def test_what_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Refinement(**{field: value})


@pytest.mark.parametrize("padding", [{0}, {7}, set(range(8))], ids=["in training", "held out", "everywhere"])
def test_batches_of_padding_only_count_nowhere(padding: set[int]) -> None:
    whole, block = task(), Block(2).eval()
    mask = lambda i, output: torch.full((15,), i not in padding)  # noqa: E731
    errors = refine_block(block, list(block.parameters()), Task(whole.call, whole.target, mask), 8, OPTIONS)
    assert all(math.isfinite(error) for error in errors)
    assert all(parameter.isfinite().all() for parameter in block.parameters())
    assert (min(errors) < errors[0]) == (padding == {0})
