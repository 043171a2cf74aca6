"""Grams are summed in full precision, whatever the caller and the model compute with."""

from __future__ import annotations

import threading

import pytest
import torch
from support.batches import text
from support.gathering import gather, linear_layers, named
from support.models import llama
from support.tolerances import assert_close, relative_error
from torch import nn

from reparam_peft.numerics import grams

ROWS_64 = [{"input": torch.randn(200, 64, generator=torch.Generator().manual_seed(0))}]


@pytest.mark.parametrize("size", [1, 2, 5, 8, 255, 300, 513])
def test_packed_matrices_are_half_as_large_and_lose_nothing(size: int) -> None:
    X = torch.randn(3, size, dtype=torch.float64)
    gram = X.mT @ X
    gram = (gram + gram.mT) / 2
    packed = grams.pack(gram)
    assert packed.numel() == size * (size + 1) // 2
    assert grams.packed_size(packed) == size
    assert torch.equal(grams.unpack(packed), gram)
    assert torch.equal(grams.packed_diagonal(packed), gram.diagonal())
    total = grams.packed_zeros(size, gram.device)
    for sums in (None, X.sum(0)):
        grams.add_gram(total, X, sums)
    assert_close(grams.unpack(total), 2 * gram)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (2, 4), (3, 2), (0, 0)])
def test_no_matrix_is_packed_into_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no symmetric matrix is packed into the shape"):
        grams.packed_size(torch.zeros(shape))


def test_precision_set_for_one_backend_is_put_back() -> None:
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this PyTorch has no precision by backend")
    expected, before = gather(nn.Linear(64, 8), named(""), ROWS_64), backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        got = gather(nn.Linear(64, 8), named(""), ROWS_64)
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
    assert torch.equal(got.gram(""), expected.gram(""))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_float32_whatever_the_caller_allows(precision: str) -> None:
    expected = gather(nn.Linear(64, 8), named(""), ROWS_64)
    torch.set_float32_matmul_precision(precision)
    try:
        got = gather(nn.Linear(64, 8), named(""), ROWS_64)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got.gram(""), expected.gram(""))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_variance_of_nearly_constant_channels_is_exact(size: int) -> None:
    X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1e-2, 1e-1, 1, 1])
    X += torch.tensor([0.0, 30.0, 1000.0, -500.0, 0.1])
    got = gather(nn.Linear(5, 3), named(""), [{"input": rows} for rows in X.split(size)]).covariance("")
    assert relative_error(got, X.double().T.cov(correction=0)) < 1e-6
    assert_close(got.diagonal().sqrt(), X.double().std(0, correction=0), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_wide_statistics(dtype: torch.dtype) -> None:
    batches = [text([8, 5], 8)]
    got, exact = gather(llama().to(dtype), linear_layers, batches), gather(llama(), linear_layers, batches)
    for name in exact.reads:
        assert got.gram(name).dtype == torch.float64
        assert relative_error(got.gram(name), exact.gram(name)) < 0.05, name


def test_the_precision_is_as_before_once_the_last_of_several_threads_is_done() -> None:
    backend = torch.backends.cuda.matmul
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this PyTorch has one setting for all")
    before = backend.fp32_precision
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with grams._full_precision(torch.device("cpu")):
            inside.set()
            leave.wait(10)

    try:
        backend.fp32_precision = "tf32"
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
        with grams._full_precision(torch.device("cpu")):
            leave.set()
            thread.join()
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before
