"""Tests of what an installed library is known to be unable to do.

What raises an ImportError of torchao's version anywhere in a test needs none of this: `conftest.py` skips it.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.version import Version


def is_unable(library: str, newest: str) -> bool:
    """Whether a library is missing, or not newer than `newest`, the last version that is known to fail."""
    try:
        return Version(version(library)).release[:2] <= Version(newest).release
    except PackageNotFoundError:
        return True


def unless(library: str, newest: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test with versions up to `newest`; later ones have to pass."""
    return pytest.mark.skipif(is_unable(library, newest), reason=f"{library} up to {newest} {reason}")
