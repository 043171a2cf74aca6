"""No network, one thread, and a case for each layer kind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
# Tests run in as many processes as CPUs: threads of several would spin on each other, those of processes that tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from support.models import CASES, Case
from support.second_device import found_by_accelerate  # noqa: F401  a fixture

import reparam_peft  # noqa: F401  registers the method

TOO_OLD = ("version of PEFT you are using is not compatible", "quantised tables need torchao")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Forget what imports of other libraries print, which pytest-xdist would show after the closing line."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    if capture is not None and capture.is_globally_capturing():
        capture.read_global_capture()


def pytest_collection_finish() -> None:
    """Keep what was imported out of garbage collections, which `Trainer` asks for, too: each would take half a second more."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip what an installed library says that it is too old for.

    transformers 5.24 asks for PEFT 0.22, which came after it, for the adapters that it puts on models itself.
    """
    try:
        return (yield)
    except (ValueError, ImportError) as error:
        if not any(message in str(error) for message in TOO_OLD):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=CASES, ids=lambda case: case.kind)
def case(request: pytest.FixtureRequest) -> Case:
    """One case for each layer kind."""
    return request.param
