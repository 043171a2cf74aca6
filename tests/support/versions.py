"""Tests of what an installed library is known to be unable to do."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def unless(library: str, newest: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test with versions up to `newest`, the last one that is known to fail; later ones have to pass."""
    too_old = Version(version(library)).release[:2] <= Version(newest).release
    return pytest.mark.skipif(too_old, reason=f"{library} {version(library)} {reason}")
