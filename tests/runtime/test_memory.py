"""Memory that was freed goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from reparam_peft.runtime.memory import free_memory, return_freed


def resident() -> int:
    """Pages of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_returning_what_was_freed_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    return_freed()
    monkeypatch.setattr(sys, "platform", "win32")
    return_freed()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_holes_between_what_is_in_use_are_returned() -> None:
    pieces = [torch.ones(2**15) for _ in range(800)]  # 100 MB
    full, kept = resident(), pieces[::8]
    del pieces
    return_freed()
    assert len(kept) == 100
    assert resident() < full


def test_some_memory_is_free() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
    assert free_memory(torch.device("cuda", 99)) > 0, "of a device that is not told of, as much as the processor has"
