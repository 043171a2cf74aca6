"""Hypothesis strategies: matrices of every kind of spectrum, ranks that fit, metrics, keeps, and configs."""

from __future__ import annotations

import string
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from reparam_peft import ReparamConfig
from reparam_peft.config.fields import ALLOCATIONS, INPUT_METRICS, OUTPUT_METRICS
from reparam_peft.numerics.methods import METHODS
from reparam_peft.numerics.storage import Storage

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
PRODUCTS = ("factors", "pivot")  # forms of products in the dtype of the model
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SPECTRA = ("flat", "polynomial", "exponential", "low rank", "zero")


def spectrum(kind: str, length: int) -> Tensor:
    """Singular values, float64, largest first; the first is 1 but for the zero matrix."""
    index = torch.arange(length, dtype=torch.float64)
    return {
        "flat": torch.ones(length, dtype=torch.float64),
        "polynomial": (1 + index) ** -1.5,
        "exponential": 10 ** (-12 * index / max(length - 1, 1)),
        "low rank": (index < (length + 2) // 3).double(),
        "zero": torch.zeros(length, dtype=torch.float64),
    }[kind]


def matrix_with(singular_values: Tensor, out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """A float64 matrix (out, in) with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    limit = min(out_features, in_features)
    U, V = (
        torch.linalg.qr(torch.randn(size, limit, generator=generator, dtype=torch.float64)).Q
        for size in (out_features, in_features)
    )
    return U * singular_values @ V.mT


@st.composite
def matrices(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, least: int = 1, most: int = 24) -> Tensor:
    """A matrix of any shape, dtype, spectrum, scale and memory layout."""
    out_features, in_features = (draw(st.integers(least, most)) for _ in range(2))
    values = spectrum(draw(st.sampled_from(SPECTRA)), min(out_features, in_features))
    weight = matrix_with(values, out_features, in_features, draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(dtypes))
    # float16 ends at 65,504 and at 6e-8.
    weight = (weight * draw(st.sampled_from((1.0, 1e2, 1e-2) if dtype == torch.float16 else (1.0, 1e15, 1e-15)))).to(dtype)
    return weight.mT.contiguous().mT if draw(st.booleans()) else weight


@st.composite
def matrices_and_ranks(draw: st.DrawFn, truncated: bool = False, **options: Any) -> tuple[Tensor, int]:
    """A matrix and a rank that fits it; `truncated`: below full rank."""
    weight = draw(matrices(least=2 if truncated else 1, **options))
    return weight, draw(st.integers(1, min(weight.shape) - truncated))


METRICS = ("full", "diagonal", "ill-conditioned", "few rows", "dead channels", "zero")


def gram_with(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A float64 positive semidefinite matrix with these eigenvalues and random eigenvectors."""
    size = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return Q * eigenvalues @ Q.mT


def activation_gram(size: int, seed: int = 0) -> Tensor:
    """E[x xᵀ] as of a transformer's activations: a slowly falling spectrum, a mean, and channels a hundred times the others."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.ones(size, dtype=torch.float64)
    channels[:: max(size // 3, 1)] = 100
    covariance = channels[:, None] * gram_with(spectrum("polynomial", size), seed) * channels
    mean = torch.randn(size, generator=generator, dtype=torch.float64) * channels / size**0.5
    return covariance + torch.outer(mean, mean)


@st.composite
def metrics(draw: st.DrawFn, size: int, kinds: tuple[str, ...] = METRICS) -> Tensor:
    """A metric for `size` features, whole or as a diagonal, singular or not, of any scale."""
    kind, seed = draw(st.sampled_from(kinds)), draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size // 2 if kind == "few rows" else 4 * size + 4, size, generator=generator, dtype=torch.float64)
    if kind == "ill-conditioned":
        metric = gram_with(10 ** (-8 * torch.arange(size, dtype=torch.float64) / size), seed)
    elif kind in ("diagonal", "dead channels", "zero"):
        metric = rows.square().sum(0) * {"diagonal": 1, "dead channels": torch.arange(size) % 3 != 0, "zero": 0}[kind]
        metric = torch.diag(metric) if kind != "diagonal" and draw(st.booleans()) else metric
    else:
        metric = rows.mT @ rows
    return metric * draw(st.sampled_from((1.0, 1e12, 1e-12)))


keeps = st.floats(1e-3, 1, allow_nan=False)
names = st.lists(st.text(string.ascii_lowercase + "_", min_size=1, max_size=8), min_size=1, max_size=3).map(".".join)
name_lists = st.lists(names, max_size=5, unique=True)
counts = st.none() | st.integers(0, 2**40)


@st.composite
def configs(draw: st.DrawFn) -> ReparamConfig:
    """A valid config, with or without what a model fills in."""
    targets = draw(st.none() | st.sampled_from(["all-linear", r".*\.(q|k)_proj"]) | name_lists.filter(bool))
    layers = {}
    if not isinstance(targets, str) and draw(st.booleans()):
        layers["layers_to_transform"] = draw(st.integers(0, 40) | st.lists(st.integers(0, 40), min_size=1, max_size=4))
        layers["layers_pattern"] = draw(st.none() | st.sampled_from(["layers", ["h", "blocks"]]))
    r = draw(st.none() | st.just("full") | st.integers(1, 4096))
    keep = draw(keeps)
    method = draw(st.none() | st.sampled_from(sorted(METHODS)))
    allocation = draw(st.none() | st.sampled_from(ALLOCATIONS if r is None else ("uniform",)))
    calibration = {}
    if method != "svd":  # which weighs nothing
        calibration["input_metric"] = draw(st.none() | st.sampled_from(INPUT_METRICS))
        calibration["output_metric"] = draw(st.none() | st.sampled_from(OUTPUT_METRICS))
        if calibration["output_metric"] != "none" or (r is None and allocation != "uniform"):  # else no gradients are needed
            calibration["shrinkage"] = draw(st.none() | st.floats(0, 1))
            calibration["output_shrinkage"] = draw(st.none() | st.floats(0, 1))
    if r is None and allocation != "uniform":  # ranks that are given cannot be chosen
        calibration["rank_multiple"] = draw(st.none() | st.integers(1, 128))
        calibration["floor"] = draw(st.none() | st.floats(0, keep, exclude_max=True))
        calibration["ceiling"] = draw(st.none() | st.floats(keep, 1))
    return ReparamConfig(
        target_modules=targets,
        exclude_modules=draw(st.none() | st.just(r".*lm_head") | name_lists),
        r=r,
        keep=keep,
        method=method,
        allocation=allocation,
        form=draw(st.none() | st.sampled_from(PRODUCTS)),
        keep_base=draw(st.booleans()),
        rank_pattern=draw(st.dictionaries(names, st.integers(1, 512), max_size=5)),
        dense_modules=draw(st.none() | name_lists),
        modules_to_save=draw(st.none() | name_lists),
        init_weights=draw(st.booleans()),
        dense_parameters=draw(counts),
        stored_parameters=draw(counts),
        dense_bytes=draw(counts),
        stored_bytes=draw(counts),
        moved_bias=draw(st.booleans()),
        calibration_tokens=draw(counts),
        gradient_tokens=draw(counts),
        seed=draw(counts),
        predicted_loss=draw(st.none() | st.floats(0, 1e6)),
        evaluation=draw(st.none() | st.dictionaries(names, st.floats(0, 1e6), max_size=3)),
        inference_mode=draw(st.booleans()),
        base_model_name_or_path=draw(st.none() | names),
        **layers,
        **calibration,
    )


sizes = st.integers(1, 20_000)


@st.composite
def decimal_keeps(draw: st.DrawFn) -> Fraction:
    """A `keep` below 1 as a person writes it: a fraction with a small denominator, which a float holds only roughly."""
    denominator = draw(st.sampled_from([2, 3, 5, 10, 64, 100]))
    return Fraction(draw(st.integers(1, denominator - 1)), denominator)


@st.composite
def storages(draw: st.DrawFn, most: int = 20_000) -> Storage:
    size = st.integers(1, most)
    return Storage(draw(size), draw(size), draw(st.sampled_from(PRODUCTS)), draw(st.booleans()))


@st.composite
def narrow_storages(draw: st.DrawFn, most: int = 20_000) -> Storage:
    """Of a matrix that has lost rows, columns or both."""
    storage = draw(storages(most))
    more = draw(st.tuples(st.integers(0, most), st.integers(0, most)).filter(any))
    return replace(storage, whole=(storage.out_features + more[0], storage.in_features + more[1]))


@st.composite
def pivot_sets(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Indices of pivots, ascending, and how many rows there are."""
    out_features = draw(st.integers(1, 40))
    chosen = draw(st.sets(st.integers(0, out_features - 1), min_size=1))
    return torch.tensor(sorted(chosen)), out_features


Targets = tuple[dict[str, Storage], dict[str, Tensor]]


@st.composite
def targets(draw: st.DrawFn, most: int = 40) -> Targets:
    """What the products of a few matrices take, and what their directions cost."""
    form, size = draw(st.sampled_from(PRODUCTS)), st.integers(1, most)
    storages, losses = {}, {}
    for name in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        storages[name] = Storage(draw(size), draw(size), form, draw(st.booleans()))
        length = min(storages[name].out_features, storages[name].in_features)
        losses[name] = spectrum(draw(st.sampled_from(SPECTRA)), length) * draw(st.sampled_from([1.0, 1e-4]))
    return storages, losses
