"""How a job runs: what is refused before it does."""

from __future__ import annotations

from typing import Any

import pytest

from reparam_peft.compression.options import Options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "`seed` must be"),
        ({"seed": "1"}, ValueError, "`seed` must be"),
        ({"objective": 3}, TypeError, r"`objective` must be callable as objective\(model, batch\), got 3"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Options(**options)
