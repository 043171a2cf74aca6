"""The truncated SVD, plain and in metrics, against spectra from `torch.linalg.svdvals` in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import (
    DTYPES,
    METRICS,
    PROPERTY,
    activation_gram,
    matrices,
    matrices_and_ranks,
    matrix_with,
    metrics,
    spectrum,
)
from support.tolerances import TOLERANCE
from torch import Tensor, nn

from reparam_peft import Factors, factorize
from reparam_peft.numerics.decompositions import (
    _leading_left_singular_vectors,
    direction_losses,
    find_directions,
    narrowed,
    random_factors,
    truncate,
)

SHAPES = [(200, 320), (320, 200), (256, 256)]


def tail(weight: Tensor, rank: int) -> float:
    """The least Frobenius error at this rank."""
    return float(torch.linalg.svdvals(weight.double())[rank:].norm())


def error(weight: Tensor, factors: Factors) -> float:
    """‖W − A B‖_F, the product in float64."""
    return float((weight.double() - factors.A.double() @ factors.B.double()).norm())


def rounding(weight: Tensor, rank: int) -> float:
    """What rounding A and B once to the dtype of W may add: ‖δA B‖_F + ‖A δB‖_F, with room for one rounding before it."""
    finfo = torch.finfo(weight.dtype)
    relative = 2 * (1 + rank**0.5) * finfo.eps * float(weight.double().norm())
    return relative + finfo.smallest_normal * finfo.eps * weight.numel()


def assert_optimal(weight: Tensor, factors: Factors) -> None:
    rank = factors.A.shape[1]
    least, slack, got = tail(weight, rank), rounding(weight, rank), error(weight, factors)
    assert got <= least * (1 + 1e-5) + slack
    assert got >= least * (1 - 1e-9) - slack, "no matrix of this rank is so close"


@PROPERTY
@given(matrices_and_ranks())
def test_error_is_the_tail_of_the_spectrum(case: tuple[Tensor, int]) -> None:
    weight, rank = case
    assert_optimal(weight, factorize(weight, rank))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["flat", "polynomial", "exponential", "low rank"])
def test_error_is_the_tail_of_the_spectrum_at_medium_size(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = matrix_with(spectrum(kind, min(shape)), *shape).to(dtype)
    for rank in (1, 60, min(shape) - 1):
        assert_optimal(weight, factorize(weight, rank))


@PROPERTY
@given(matrices())
def test_full_rank_is_exact_to_the_bit(weight: Tensor) -> None:
    A, B = factorize(weight, min(weight.shape))
    assert torch.equal(A @ B, weight)
    identity, dense = (A, B) if weight.shape[0] <= weight.shape[1] else (B, A)
    assert torch.equal(identity, torch.eye(min(weight.shape), dtype=weight.dtype))
    assert torch.equal(dense, weight)
    assert dense.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


@PROPERTY
@given(matrices_and_ranks())
def test_shape_dtype_and_contiguity(case: tuple[Tensor, int]) -> None:
    weight, rank = case
    A, B = factorize(weight, rank)
    assert (A.shape, B.shape) == ((weight.shape[0], rank), (rank, weight.shape[1]))
    for factor in (A, B):
        assert factor.dtype == weight.dtype
        assert factor.is_contiguous()
        assert not factor.requires_grad
        assert factor.untyped_storage().nbytes() == factor.numel() * factor.element_size(), "keeps a larger matrix alive"


@PROPERTY
@given(matrices_and_ranks())
def test_the_smaller_side_is_orthonormal(case: tuple[Tensor, int]) -> None:
    weight, rank = case
    A, B = factorize(weight, rank)
    basis = (A if weight.shape[0] <= weight.shape[1] else B.mT).double()
    deviation = (basis.mT @ basis - torch.eye(rank, dtype=torch.float64)).norm()
    assert deviation <= TOLERANCE[weight.dtype] * rank**0.5


@PROPERTY
@given(matrices_and_ranks())
def test_the_error_is_that_of_the_transpose(case: tuple[Tensor, int]) -> None:
    weight, rank = case
    difference = error(weight, factorize(weight, rank)) - error(weight.mT, factorize(weight.mT, rank))
    assert abs(difference) <= 1e-5 * tail(weight, rank) + 2 * rounding(weight, rank)


@PROPERTY
@given(matrices_and_ranks())
def test_is_deterministic_and_leaves_its_input_alone(case: tuple[Tensor, int]) -> None:
    weight, rank = case
    weight = nn.Parameter(weight)
    before, generator = weight.detach().clone(), torch.get_rng_state()
    first, second = factorize(weight, rank), factorize(weight, rank)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(weight.detach(), before)
    assert torch.equal(torch.get_rng_state(), generator)


@PROPERTY
@given(matrices_and_ranks(truncated=True, dtypes=(torch.bfloat16, torch.float16)))
def test_half_precision_is_rounded_once(case: tuple[Tensor, int]) -> None:
    weight, rank = case
    once = Factors(*(factor.to(weight.dtype) for factor in factorize(weight.double(), rank)))
    # The singular vectors differ in sign and, where values coincide, by a rotation: the rounding is of the same size only.
    finfo = torch.finfo(weight.dtype)
    assert error(weight, factorize(weight, rank)) <= error(weight, once) + finfo.eps * float(weight.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_at_medium_size_is_as_good_as_rounded_float64_factors(dtype: torch.dtype) -> None:
    weight = matrix_with(spectrum("polynomial", 200), 200, 320).to(dtype)
    for rank in (8, 64, 150):
        once = Factors(*(factor.to(dtype) for factor in factorize(weight.double(), rank)))
        assert error(weight, factorize(weight, rank)) <= 1.02 * error(weight, once)


def steps(values: list[tuple[int, float]]) -> Tensor:
    return torch.cat([torch.full((number,), value, dtype=torch.float64) for number, value in values])


# Spectrum of a 40 × 60 matrix at rank 10, dtype, and the decompositions that it takes.
BRANCHES = {
    "much is discarded": (steps([(10, 1.0), (30, 0.5)]), torch.float32, [("eigh", torch.float32)]),
    "much is discarded, bf16": (steps([(10, 1.0), (30, 0.5)]), torch.bfloat16, [("eigh", torch.float32)]),
    "much is discarded, float64": (steps([(10, 1.0), (30, 0.5)]), torch.float64, [("eigh", torch.float64)]),
    "little is discarded": (
        steps([(10, 1.0), (30, 1e-3)]),
        torch.float32,
        [("eigh", torch.float32), ("eigh", torch.float64)],
    ),
    "little is discarded, float64": (steps([(10, 1.0), (30, 1e-3)]), torch.float64, [("eigh", torch.float64)]),
    "nothing is discarded": (
        steps([(10, 1.0), (30, 0.0)]),
        torch.float32,
        [("eigh", torch.float32), ("eigh", torch.float64), ("svd", torch.float64)],
    ),
    "nothing is discarded, float64": (
        steps([(10, 1.0), (30, 1e-9)]),
        torch.float64,
        [("eigh", torch.float64), ("svd", torch.float64)],
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])  # the Gram's would overflow and underflow float32
def test_each_accuracy_branch_is_taken_where_it_suffices(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    values, dtype, expected = BRANCHES[name]
    weight = (scale * matrix_with(values, 40, 60)).to(dtype)
    taken = []

    def spy(function: str) -> None:
        original = getattr(torch.linalg, function)

        def recorded(matrix: Tensor, *args: object, **kwargs: object) -> object:
            taken.append((function, matrix.dtype))
            return original(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, function, recorded)

    for function in ("eigh", "svd"):
        spy(function)
    U = _leading_left_singular_vectors(weight, 10).double()
    assert taken == expected
    # The error of the subspace alone, before A and B are rounded to the dtype: ‖W − U Uᵀ W‖_F.
    exact = weight.double()
    floor = 2e-15 * float(exact.norm())
    assert float((exact - U @ (U.mT @ exact)).norm()) <= tail(weight, 10) * (1 + 1e-5) + floor


@pytest.mark.parametrize("transposed", [False, True])
def test_branches_agree_on_tall_and_wide_matrices(transposed: bool) -> None:
    for values, dtype, _ in BRANCHES.values():
        weight = matrix_with(values, 40, 60).to(dtype)
        weight = weight.mT if transposed else weight
        assert_optimal(weight, factorize(weight, 10))


@pytest.mark.parametrize("ratio", [0.0999, 0.1001, 0.02, 1e-2, 1e-3, 1e-4, 2e-5, 0.5e-5, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_either_side_of_the_thresholds_is_accurate(ratio: float, dtype: torch.dtype) -> None:
    """‖discarded‖ = ratio · σ₁, with singular values that crowd around the cut: the hard case for a Gram."""
    leading = torch.linspace(1, 1.1 * ratio / 100**0.5, 100, dtype=torch.float64)
    weight = matrix_with(torch.cat([leading, torch.full((100,), ratio / 100**0.5, dtype=torch.float64)]), 200, 320).to(dtype)
    assert_optimal(weight, factorize(weight, 100))


@pytest.mark.parametrize("crowding", [1.001, 1.005, 1.01])
@pytest.mark.parametrize("ratio", [0.11, 0.3])
@pytest.mark.parametrize("size", [200, 500])
def test_one_singular_value_far_above_a_flat_rest_is_accurate(size: int, ratio: float, crowding: float) -> None:
    """As of a weight with an outlier direction: σ₁ sets the error of a float32 `eigh`, and half of the rest is discarded."""
    rank = size // 2
    discarded = ratio / (size - rank) ** 0.5
    values = steps([(1, 1.0), (rank - 1, crowding * discarded), (size - rank, discarded)])
    weight = matrix_with(values, size, size + 100).float()
    U, exact = _leading_left_singular_vectors(weight, rank).double(), weight.double()
    assert float((exact - U @ (U.mT @ exact)).norm()) <= tail(weight, rank) * (1 + 1e-5)


def test_random_factors_have_the_norm_of_the_weight_on_average() -> None:
    torch.manual_seed(0)
    weight = matrix_with(spectrum("polynomial", 30), 30, 50)
    for rank in (1, 8, 30):
        squares = [
            float((A.double() @ B.double()).square().sum()) for A, B in (random_factors(weight, rank) for _ in range(600))
        ]
        mean = sum(squares) / len(squares)
        assert mean == pytest.approx(float(weight.square().sum()), rel=0.1), f"rank {rank}"


@PROPERTY
@given(matrices_and_ranks())
def test_random_factors_keep_shape_and_dtype_and_follow_the_seed(case: tuple[Tensor, int]) -> None:
    weight, rank = case
    pairs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        pairs.append(random_factors(weight, rank))
    (A, B), same, other = pairs
    assert (A.shape, B.shape) == ((weight.shape[0], rank), (rank, weight.shape[1]))
    assert A.dtype == B.dtype == weight.dtype
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    assert torch.equal(A, same.A)
    assert torch.equal(B, same.B)
    assert weight.any() == (not torch.equal(A, other.A))


BAD_WEIGHTS = {
    "NaN": (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), ValueError, "NaN or infinite"),
    "infinite": (torch.tensor([[1.0, float("-inf")], [0.0, 1.0]]), ValueError, "NaN or infinite"),
    "meta": (torch.empty(3, 4, device="meta"), ValueError, "meta device"),
    "integer": (torch.ones(3, 4, dtype=torch.int8), TypeError, "floating dtype, got torch.int8"),
    "complex": (torch.ones(3, 4, dtype=torch.complex64), TypeError, "floating dtype, got torch.complex64"),
    "vector": (torch.ones(4), ValueError, r"must be a matrix, got 1 dimensions of shape \(4,\)"),
    "kernel": (torch.ones(2, 2, 3, 3), ValueError, "must be a matrix, got 4 dimensions"),
    "empty": (torch.ones(0, 4), ValueError, r"must be in \[1, 0\]"),
}
BAD_RANKS = [
    (0, ValueError, r"must be in \[1, 3\] for a weight of shape \(3, 4\), got 0"),
    (-1, ValueError, "got -1"),
    (4, ValueError, r"must be in \[1, 3\] for a weight of shape \(3, 4\), got 4"),
    (2.0, TypeError, "must be an int, got 2.0"),
    (True, TypeError, "must be an int, got True"),
    ("2", TypeError, "must be an int, got '2'"),
    (None, TypeError, "must be an int, got None"),
]


@pytest.mark.parametrize("function", [factorize, random_factors])
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_refuses_what_is_no_finite_matrix(function: object, name: str) -> None:
    weight, error_class, message = BAD_WEIGHTS[name]
    with pytest.raises(error_class, match=message):
        function(weight, 1)


@pytest.mark.parametrize("function", [factorize, random_factors])
@pytest.mark.parametrize(("rank", "error_class", "message"), BAD_RANKS)
def test_refuses_ranks_that_do_not_fit(function: object, rank: object, error_class: type[Exception], message: str) -> None:
    with pytest.raises(error_class, match=message):
        function(torch.ones(3, 4), rank)


@pytest.mark.parametrize("function", [factorize, random_factors])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_never_overflows_silently(shape: tuple[int, int], dtype: torch.dtype, function: object) -> None:
    """B = Uᵀ W is up to √out larger than W: near the end of the dtype's range the factors are finite, or there is an error."""
    weight = torch.full(shape, 0.9 * torch.finfo(dtype).max, dtype=dtype)
    try:
        factors = function(weight, 1)
    except (ValueError, OverflowError):
        return
    assert all(torch.isfinite(factor).all() for factor in factors)


def root(metric: Tensor | None, size: int) -> Tensor:
    """The symmetric square root of a metric, by another way than the package's."""
    if metric is None:
        return torch.eye(size, dtype=torch.float64)
    if metric.ndim == 1:
        return torch.diag(metric.double().sqrt())
    eigenvalues, Q = torch.linalg.eigh(metric.double())
    return (Q * eigenvalues.clamp(min=0).sqrt()) @ Q.mT


def whitened(weight: Tensor, gram: Tensor | None, output_gram: Tensor | None) -> Tensor:
    """F^½ W G^½."""
    return root(output_gram, weight.shape[0]) @ weight.double() @ root(gram, weight.shape[1])


def metric_error(weight: Tensor, factors: Factors, gram: Tensor | None, output_gram: Tensor | None) -> float:
    """‖F^½ (W − A B) G^½‖_F."""
    return float(whitened(weight.double() - factors.A.double() @ factors.B.double(), gram, output_gram).norm())


Weighted = tuple[Tensor, int, Tensor | None, Tensor | None]


@st.composite
def weighted(draw: st.DrawFn, kinds: tuple[str, ...] = METRICS, both: bool = False, truncated: bool = True) -> Weighted:
    """A float64 matrix, a rank, and metrics of its inputs, its outputs, or both."""
    weight, rank = draw(matrices_and_ranks(truncated=truncated, dtypes=(torch.float64,)))
    given_ = "both" if both else draw(st.sampled_from(["both", "gram", "output_gram"]))
    gram = draw(metrics(weight.shape[1], kinds)) if given_ != "output_gram" else None
    output_gram = draw(metrics(weight.shape[0], kinds)) if given_ != "gram" else None
    return weight, rank, gram, output_gram


def unresolved(weight: Tensor, gram: Tensor | None, output_gram: Tensor | None) -> float:
    """What a decomposition of the squared matrix in float64 does not resolve: 1e-7 of the largest singular value."""
    return 1e-7 * float(torch.linalg.matrix_norm(whitened(weight, gram, output_gram), 2))


@PROPERTY
@given(weighted())
def test_the_error_in_the_metric_is_the_tail_of_the_whitened_spectrum(case: Weighted) -> None:
    weight, rank, gram, output_gram = case
    least = float(torch.linalg.svdvals(whitened(weight, gram, output_gram))[rank:].norm())
    got, slack = (
        metric_error(weight, factorize(weight, rank, gram, output_gram), gram, output_gram),
        unresolved(weight, gram, output_gram),
    )
    assert got <= least * (1 + 1e-5) + slack
    assert got >= least * (1 - 1e-5) - slack, "no matrix of this rank is so close"


@PROPERTY
@given(weighted())
def test_is_never_worse_in_the_metric_than_the_plain_svd(case: Weighted) -> None:
    weight, rank, gram, output_gram = case
    plain = metric_error(weight, factorize(weight, rank), gram, output_gram)
    got = metric_error(weight, factorize(weight, rank, gram, output_gram), gram, output_gram)
    assert got <= plain * (1 + 1e-5) + unresolved(weight, gram, output_gram)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_activations_the_metric_pays_also_after_rounding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = matrix_with(spectrum("polynomial", min(shape)), *shape).to(dtype)
    gram, output_gram = activation_gram(shape[1], seed=1), activation_gram(shape[0], seed=2)
    for metrics_ in ((gram, None), (None, output_gram), (gram, output_gram)):
        values = torch.linalg.svdvals(whitened(weight, *metrics_))
        for rank in (8, 60):
            got = metric_error(weight, factorize(weight, rank, *metrics_), *metrics_)
            plain = metric_error(weight, factorize(weight, rank), *metrics_)
            assert got <= float(values[rank:].norm()) + TOLERANCE[dtype] * float(values.norm())
            assert got < 0.8 * plain


@PROPERTY
@given(weighted())
def test_factors_of_a_lower_rank_are_the_first_of_a_higher_one(case: Weighted) -> None:
    weight, rank, gram, output_gram = case
    higher = factorize(weight, min(rank + 1, min(weight.shape) - 1), gram, output_gram)
    A, B = factorize(weight, rank, gram, output_gram)
    assert float((A - higher.A[:, :rank]).norm()) <= 1e-8 * float(higher.A.norm())
    assert float((B - higher.B[:rank]).norm()) <= 1e-8 * float(higher.B.norm())


@PROPERTY
@given(weighted(truncated=False))
def test_with_metrics_too_full_rank_is_exact_to_the_bit(case: Weighted) -> None:
    weight, _, gram, output_gram = case
    A, B = factorize(weight, min(weight.shape), gram, output_gram)
    assert torch.equal(A @ B, weight)


@PROPERTY
@given(weighted(("full", "diagonal")), st.sampled_from([1e-9, 3.0, 1e9]))
def test_the_scale_of_a_metric_and_how_a_diagonal_is_given_do_not_matter(case: Weighted, scale: float) -> None:
    weight, rank, gram, output_gram = case
    error_ = metric_error(weight, factorize(weight, rank, gram, output_gram), gram, output_gram)

    def changed(metric: Tensor | None) -> Tensor | None:
        return None if metric is None else scale * (torch.diag(metric) if metric.ndim == 1 else metric)

    other = metric_error(weight, factorize(weight, rank, changed(gram), changed(output_gram)), gram, output_gram)
    assert abs(error_ - other) <= 1e-9 * error_ + unresolved(weight, gram, output_gram)


@PROPERTY
@given(weighted(("full", "diagonal", "zero"), truncated=False))
def test_metrics_change_neither_shape_nor_dtype_nor_what_is_given(case: Weighted) -> None:
    weight, rank, gram, output_gram = case
    before = [None if tensor is None else tensor.clone() for tensor in (weight, gram, output_gram)]
    for dtype in DTYPES[:3]:
        A, B = factorize(weight.to(dtype), rank, gram, output_gram)
        assert (A.shape, B.shape) == ((weight.shape[0], rank), (rank, weight.shape[1]))
        for factor in (A, B):
            assert factor.dtype == dtype
            assert factor.is_contiguous()
            assert torch.isfinite(factor).all()
            assert factor.untyped_storage().nbytes() == factor.numel() * factor.element_size()
    for tensor, old in zip((weight, gram, output_gram), before, strict=True):
        assert tensor is None or torch.equal(tensor, old)


@PROPERTY
@given(weighted(both=True), st.sampled_from([torch.float32, torch.float64]))
def test_directions_that_are_known_give_the_same_bits(case: Weighted, dtype: torch.dtype) -> None:
    weight, rank, gram, output_gram = case
    weight = weight.to(dtype)
    directions = find_directions(weight, gram, output_gram)
    expected = factorize(weight, rank, gram, output_gram)
    for outputs in (output_gram, *([] if directions.needs_output_gram else [None])):
        assert all(map(torch.equal, factorize(weight, rank, gram, outputs, directions), expected))
    losses = direction_losses(weight, gram, output_gram, gram, output_gram)
    assert float((directions.losses - losses).abs().max()) <= 1e-9 * float(losses.max())


@PROPERTY
@given(weighted(both=True))
def test_direction_losses_are_half_of_the_squared_tail(case: Weighted) -> None:
    weight, rank, gram, output_gram = case
    values = torch.linalg.svdvals(whitened(weight, gram, output_gram))
    slack = unresolved(weight, gram, output_gram) * float(values.norm())
    for copies in ((gram, output_gram), (gram.clone(), output_gram.clone())):  # as eigenvalues, and as norms of the factors
        q = direction_losses(weight, gram, output_gram, *copies)
        assert q.dtype == torch.float64
        assert q.shape == values.shape
        assert (q >= 0).all()
        assert float((q - values.square() / 2).abs().max()) <= 1e-9 * float(values.square().sum()) + slack
        lost = metric_error(weight, factorize(weight, rank, gram, output_gram), gram, output_gram) ** 2 / 2
        assert float(q[rank:].sum()) == pytest.approx(lost, rel=1e-6, abs=slack)


@PROPERTY
@given(weighted(both=True), st.data())
def test_direction_losses_of_another_factorisation_are_those_of_its_directions(case: Weighted, data: st.DataObject) -> None:
    weight, rank, gram, fisher = case
    definite = ("full", "diagonal")
    input_metric = data.draw(st.none() | metrics(weight.shape[1], definite))
    output_metric = data.draw(st.none() | metrics(weight.shape[0], definite))
    q = direction_losses(weight, gram, fisher, input_metric, output_metric)
    # The identity as a metric: without any, factors may be orthonormal on the other side.
    ones = torch.ones(weight.shape[1], dtype=torch.float64)
    A, B = factorize(weight, rank, ones if input_metric is None else input_metric, output_metric)
    directions = [
        metric_error(torch.zeros_like(weight), Factors(A[:, i : i + 1], B[i : i + 1]), gram, fisher) for i in range(rank)
    ]
    expected = torch.tensor(directions, dtype=torch.float64).square() / 2
    largest = float(q.max().clamp(min=1e-300))
    assert float((q[:rank] - expected).abs().max()) <= 1e-9 * largest + unresolved(weight, gram, fisher) ** 2
    assert len(q) == min(weight.shape)


def test_metrics_take_a_direction_in_use_before_a_large_one_that_is_not() -> None:
    weight = torch.diag(torch.tensor([100.0, 1.0, 10.0, 2.0]))
    gram, output_gram = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    kept = [
        int(torch.argmax((A @ B).abs().diagonal()))
        for A, B in (factorize(weight, 1), factorize(weight, 1, gram), factorize(weight, 1, gram, output_gram))
    ]
    assert kept == [0, 2, 3]
    assert torch.equal(direction_losses(weight, gram, output_gram), torch.tensor([0.0, 0.0, 2.0, 0.5], dtype=torch.float64))


BAD_METRICS = [
    (torch.eye(3), r"must have shape \(5, 5\), or \(5,\) for a diagonal, got \(3, 3\)"),
    (torch.ones(3), r"must have shape .* got \(3,\); it belongs to another weight"),
    (torch.full((5,), float("nan")), "contains NaN or infinite values"),
    (torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0]), "must be positive semidefinite"),
]


@pytest.mark.parametrize(("metric", "message"), BAD_METRICS)
def test_refuses_what_is_no_metric_of_the_weight(metric: Tensor, message: str) -> None:
    weight, good = torch.ones(5, 5), torch.ones(5)
    for name, pair in (("gram", (metric, good)), ("output_gram", (good, metric))):
        for function, arguments in ((factorize, (weight, 2)), (direction_losses, (weight,))):
            with pytest.raises(ValueError, match=f"`{name}` {message}"):
                function(*arguments, *pair)


@PROPERTY
@given(matrices(least=2, most=12, dtypes=(torch.float32, torch.float64)), st.data())
def test_truncation_is_that_of_the_product(weight: Tensor, data: st.DataObject) -> None:
    present = data.draw(st.integers(1, min(weight.shape)))
    rank = data.draw(st.integers(1, present))
    A, B = weight[:, :present], weight[:present].double()
    B = B / B.abs().max().clamp(min=1e-30)
    M = A.double() @ B.double()
    values = torch.linalg.svdvals(M)
    got = truncate(Factors(A, B), rank)
    assert (got.A.shape, got.B.shape, got.A.dtype) == ((len(A), rank), (rank, B.shape[1]), torch.float64)
    assert abs(float((M - got.A @ got.B).norm() - values[rank:].norm())) <= 1e-10 * float(values.norm())


@pytest.mark.parametrize(("rank", "message"), [(0, r"in \[1, 2\]"), (3, r"in \[1, 2\]")])
def test_rank_out_of_range(rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncate(Factors(torch.eye(4, 2), torch.eye(2, 4)), rank)


def test_factors_share_their_size_where_one_would_overflow() -> None:
    A, B = torch.tensor([[1e5, 1.0], [2e4, 0.5]]), torch.tensor([[1e-3, 2e-3], [3.0, 4.0]])
    narrow = narrowed(Factors(A, B), torch.float16)
    assert all(factor.isfinite().all() and factor.dtype == torch.float16 for factor in narrow)
    torch.testing.assert_close(narrow.A.float() @ narrow.B.float(), A @ B, rtol=2e-3, atol=0)
    fitting = Factors(torch.eye(2), B)
    assert all(torch.equal(x, y.half()) for x, y in zip(narrowed(fitting, torch.float16), fitting, strict=True))
    with pytest.raises(ValueError, match=r"overflow torch\.float16"):
        narrowed(Factors(A, 1e8 * B), torch.float16)
