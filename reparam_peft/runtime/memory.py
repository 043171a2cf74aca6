"""Memory of this process and of its devices."""

from __future__ import annotations

import ctypes
import sys

import torch
from accelerate.utils import get_max_memory


def return_freed() -> None:
    """Give memory that was freed back to the system, of which glibc keeps what lies between pieces that are still in use.

    Passes over data leave gigabytes of it. Elsewhere than with glibc, nothing is done.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, as accelerate and psutil tell it."""
    free = get_max_memory()
    return int(free.get(device.type if device.type in free else device.index or 0, free["cpu"]))
