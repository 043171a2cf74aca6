"""Principal angles between row spaces."""

from __future__ import annotations

import math

import pytest
import torch

from reparam_peft import principal_angles


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([[1.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]], [math.pi / 2]),
        ([[1.0, 0.0, 0.0]], [[1.0, 1.0, 0.0]], [math.pi / 4]),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 5.0, 0.0], [0.0, 0.0, 1.0]], [0.0, math.pi / 2]),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 0.0, 1e-9]], [1e-9]),
    ],
)
def test_principal_angles(first: list[list[float]], second: list[list[float]], expected: list[float]) -> None:
    for one, other in ((first, second), (second, first)):
        got = principal_angles(torch.tensor(one), torch.tensor(other))
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-6)


def test_angles_do_not_depend_on_the_basis() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(4, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    mixed = torch.randn(4, 4, dtype=torch.float64) @ A
    torch.testing.assert_close(principal_angles(mixed, B), principal_angles(A, B))
    assert principal_angles(A, mixed).max() < 1e-7


def test_matrices_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="same width"):
        principal_angles(torch.ones(1, 2), torch.ones(1, 3))
