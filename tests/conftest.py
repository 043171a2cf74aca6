"""No network, one thread, and a case for each layer kind."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from support.models import CASES, Case

import reparam_peft  # noqa: F401  registers the method

torch.set_num_threads(1)  # tests run in as many processes as CPUs, and threads of several would spin on each other


def pytest_configure(config: pytest.Config) -> None:
    """Forget what imports of other libraries print, which pytest-xdist would show after the closing line."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    if capture is not None and capture.is_globally_capturing():
        capture.read_global_capture()


@pytest.fixture(params=CASES, ids=lambda case: case.kind)
def case(request: pytest.FixtureRequest) -> Case:
    """One case for each layer kind."""
    return request.param
