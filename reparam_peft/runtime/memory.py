"""Memory of this process and of its devices."""

from __future__ import annotations

import ctypes
import sys


def return_freed() -> None:
    """Give memory that was freed back to the system, of which glibc keeps what lies between pieces that are still in use.

    Passes over data leave gigabytes of it. Elsewhere than with glibc, nothing is done.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
