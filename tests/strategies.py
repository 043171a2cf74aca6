"""Hypothesis strategies: matrices of every kind of spectrum, ranks that fit, keeps, and configs."""

from __future__ import annotations

import string
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from reparam_peft import ReparamConfig

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
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
    return ReparamConfig(
        target_modules=targets,
        exclude_modules=draw(st.none() | st.just(r".*lm_head") | name_lists),
        r=draw(st.none() | st.just("full") | st.integers(1, 4096)),
        keep=draw(keeps),
        method=draw(st.sampled_from([None, "svd"])),
        allocation=draw(st.sampled_from([None, "uniform"])),
        form=draw(st.sampled_from([None, "factors"])),
        keep_base=draw(st.booleans()),
        rank_pattern=draw(st.dictionaries(names, st.integers(1, 512), max_size=5)),
        dense_modules=draw(st.none() | name_lists),
        modules_to_save=draw(st.none() | name_lists),
        init_weights=draw(st.booleans()),
        dense_parameters=draw(counts),
        stored_parameters=draw(counts),
        dense_bytes=draw(counts),
        stored_bytes=draw(counts),
        evaluation=draw(st.none() | st.dictionaries(names, st.floats(0, 1e6), max_size=3)),
        inference_mode=draw(st.booleans()),
        base_model_name_or_path=draw(st.none() | names),
        **layers,
    )
