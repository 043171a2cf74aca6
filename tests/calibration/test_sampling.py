"""Labels drawn from a model's own distribution: gradients have the Fisher information as second moment."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import PROPERTY
from support.tolerances import TOLERANCE
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutput, QuestionAnsweringModelOutput

from reparam_peft.calibration import sampling as sampling
from reparam_peft.calibration.sampling import sampled_objective

FEW = settings(PROPERTY, max_examples=30)
DRAWS = 20_000


def model_of(problem_type: str | None = None) -> nn.Module:
    model = nn.Module()
    model.config = SimpleNamespace(problem_type=problem_type)
    return model


def logits_of(values: Tensor) -> CausalLMOutput:
    return CausalLMOutput(logits=values)


def gradients(
    output: Any, *leaves: Tensor, mask: Tensor | None = None, first_row: int = 0, seed: int = 0, problem_type: str | None = None
) -> tuple[list[Tensor], int]:
    """Of the objective with respect to what a model returned, and the number of labels."""
    for leaf in leaves:
        leaf.grad = None
    objective, count = sampled_objective(model_of(problem_type), output, mask, first_row, seed)
    objective.backward()
    return [leaf.grad for leaf in leaves], count


def assert_second_moment(G: Tensor, expected: Tensor) -> None:
    """E[g gᵀ] over rows is `expected`, to within five standard errors."""
    products = G.double()[:, :, None] * G.double()[:, None]
    error = (products.mean(0) - expected).abs()
    assert (error <= 5 * products.std(0) / len(G) ** 0.5 + 1e-6).all(), error


@pytest.mark.parametrize("mode", ["one row", "one position per row"])
def test_the_fisher_information_of_a_softmax(mode: str) -> None:
    logits = torch.tensor([1.5, 0.0, -0.5, -2.0])
    shape = (1, DRAWS, 4) if mode == "one row" else (DRAWS // 4, 4)
    values = logits.expand(shape).clone().requires_grad_()
    (G,), count = gradients(logits_of(values), values)
    assert count == values.numel() // 4
    p = logits.double().softmax(0)
    assert_second_moment(G.view(-1, 4), torch.diag(p) - torch.outer(p, p))
    # Each is p − e_label.
    labels = (p - G.view(-1, 4).double()).round()
    assert torch.equal(labels.sum(1), torch.ones(count, dtype=torch.float64))
    assert float((G.view(-1, 4) - (p - labels)).abs().max()) < TOLERANCE[torch.float32]


def test_the_fisher_information_of_bernoulli_labels() -> None:
    logits = torch.tensor([1.5, 0.0, -2.0])
    values = logits.expand(DRAWS, 3).clone().requires_grad_()
    (G,), count = gradients(logits_of(values), values, problem_type="multi_label_classification")
    assert count == DRAWS
    p = logits.double().sigmoid()
    assert_second_moment(G, torch.diag(p * (1 - p)))


@pytest.mark.parametrize(
    ("name", "width", "problem_type"),
    [
        ("logits", 1, None),
        ("logits", 1, "regression"),
        ("logits", 3, "regression"),
        ("last_hidden_state", 3, None),
        ("", 3, None),
    ],
)
def test_the_fisher_information_of_a_regression_is_the_identity(name: str, width: int, problem_type: str | None) -> None:
    values = torch.randn(DRAWS, width, requires_grad=True)
    output = {name: values} if name else values
    (G,), count = gradients(output, values, problem_type=problem_type)
    assert count == DRAWS
    assert_second_moment(G, torch.eye(width, dtype=torch.float64))
    assert float(G.mean().abs()) < 5 / (DRAWS * width) ** 0.5


def test_a_single_output_without_a_feature_dimension_is_a_regression() -> None:
    values = torch.randn(DRAWS, requires_grad=True)
    (G,), count = gradients({"logits": values}, values)
    assert count == DRAWS
    assert float(G.var()) == pytest.approx(1, rel=0.06)


@pytest.mark.parametrize("kind", ["hidden states", "answers"])
def test_two_predictions_of_a_row_are_drawn_independently(kind: str) -> None:
    """The Fisher information of a model of both is the sum of theirs: there are no terms between them."""
    first, second = (torch.zeros(DRAWS, 2, requires_grad=True) for _ in range(2))
    if kind == "answers":
        output = QuestionAnsweringModelOutput(start_logits=first, end_logits=second)
    else:
        output = BaseModelOutputWithPooling(last_hidden_state=first, pooler_output=second)
    (G, H), count = gradients(output, first, second)
    assert count == 2 * DRAWS
    own = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 4 if kind == "answers" else torch.eye(2)
    assert_second_moment(torch.cat([G, H], 1), torch.block_diag(own, own).double())


def test_rows_and_seeds_have_draws_of_their_own() -> None:
    values = torch.zeros(2, DRAWS // 4, 3, requires_grad=True)
    pairs = [gradients(logits_of(values), values, seed=seed)[0][0] for seed in (0, 0, 1, 2**32, 2**63)]
    assert torch.equal(pairs[0], pairs[1])
    rows = [G[row] for G in pairs[1:] for row in range(2)]
    for i, one in enumerate(rows):
        for other in rows[:i]:
            # Of three equally probable labels, a third agree by chance.
            assert float((one == other).all(-1).float().mean()) == pytest.approx(1 / 3, abs=0.05)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int], bool]:
    """Outputs (rows, length, width), a mask with at least one position, where to split, and whether they are logits."""
    rows, length, width = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 999)))
    values = 3 * torch.randn(rows, length, width)
    mask = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows)))
    mask[0, 0] = True
    return values, mask, sorted(draw(st.sets(st.integers(1, rows)))), draw(st.booleans())


@FEW
@given(batches(), st.sampled_from([None, "multi_label_classification", "regression"]), st.integers(0, 2**40))
def test_the_split_into_batches_and_the_padding_do_not_matter(
    case: tuple[Tensor, Tensor, list[int], bool], problem_type: str | None, seed: int
) -> None:
    values, mask, cuts, are_logits = case
    name = "logits" if are_logits else "last_hidden_state"
    rows, length, width = values.shape

    def run(start: int, end: int, pad: int = 0, left: bool = False) -> tuple[Tensor, int]:
        """Gradients of some rows, with more padding on either side, whose content is arbitrary."""
        extra = (pad, 0) if left else (0, pad)
        part = nn.functional.pad(values[start:end], (0, 0, *extra), value=99.0).requires_grad_()
        within = nn.functional.pad(mask[start:end], extra)
        (G,), count = gradients({name: part}, part, mask=within, first_row=start, seed=seed, problem_type=problem_type)
        assert count == int(mask[start:end].sum())
        assert not G[~within].any(), "padding is left out"
        return G[:, pad if left else 0 :][:, :length], count

    expected, _ = run(0, rows)
    bounds = [0, *[cut for cut in cuts if cut < rows], rows]
    for pad, left in ((0, False), (2, False), (3, True)):
        parts = [run(start, end, pad, left)[0] for start, end in pairwise(bounds)]
        # Sums may be taken in another order.
        assert float((torch.cat(parts) - expected).abs().max()) <= TOLERANCE[torch.float32]
    assert expected.shape == (rows, length, width)


def test_without_a_mask_that_fits_all_positions_count() -> None:
    values = torch.randn(2, 3, 4, requires_grad=True)
    for mask in (None, torch.zeros(2, 7, dtype=torch.bool)):
        assert gradients({"logits": values}, values, mask=mask)[1] == 6
    pooled = torch.randn(2, 4, requires_grad=True)
    assert gradients({"logits": pooled}, pooled, mask=torch.zeros(2, 4, dtype=torch.bool))[1] == 2, "(batch, classes)"


@pytest.mark.parametrize("number", [1e-15, 0.5, 1 - 1e-15])
@pytest.mark.parametrize("forbidden", [[0], [3, 4], [0, 2, 4]])
def test_impossible_labels_are_never_drawn(forbidden: list[int], number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a vocabulary that is padded, or a grammar: their logits are −∞, and the objective would be infinite."""
    monkeypatch.setattr(
        sampling, "_uniform", lambda values, mask, width, *rest: torch.full((len(values), width), number, dtype=torch.float64)
    )
    torch.manual_seed(0)
    values = torch.randn(500, 5)
    values[:, forbidden] = -torch.inf
    objective, _ = sampled_objective(model_of(), logits_of(values), None, 0, 0)
    assert torch.isfinite(objective)


def test_half_precision_is_taken_as_float32() -> None:
    values = torch.zeros(DRAWS, 3, dtype=torch.bfloat16, requires_grad=True)
    objective, _ = sampled_objective(model_of(), logits_of(values), None, 0, 0)
    assert objective.dtype == torch.float32
    assert float(objective.detach()) == pytest.approx(DRAWS * math.log(3), rel=1e-4)


def test_what_a_model_predicts_with() -> None:
    """Logits before hidden states, both before whatever comes first; a loss, which has no dimensions, never."""
    leaf, other = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    loss, index = torch.tensor(1.0), torch.ones(2, 3, dtype=torch.int64)
    for output in (
        leaf,
        (loss, index, leaf, other),
        [leaf, other],
        {"loss": loss, "last_hidden_state": other, "logits": leaf},
        {"attentions": other, "last_hidden_state": leaf},
        {"loss": loss, "anything": leaf, "more": other},
        {"logits": index, "pooler_output": leaf},
    ):
        other.grad = None
        (G,), _ = gradients(output, leaf)
        assert G.any()
        assert other.grad is None


@pytest.mark.parametrize(
    "output", [None, "text", (), {}, {"logits": None}, torch.ones(2, dtype=torch.int64), [torch.tensor(1.0)]]
)
def test_refuses_what_predicts_nothing(output: Any) -> None:
    with pytest.raises(ValueError, match=f"the model returned a {type(output).__name__} without a floating-point tensor"):
        sampled_objective(model_of(), output, None, 0, 0)


def test_logits_of_several_heads_may_come_as_a_tuple() -> None:
    heads = (torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 5, requires_grad=True))
    objective, tokens = sampled_objective(model_of(), {"logits": heads}, None, 0, 0)
    assert tokens == 2 * 3 + 2
    objective.backward()
    assert all(head.grad is not None and head.grad.any() for head in heads)
