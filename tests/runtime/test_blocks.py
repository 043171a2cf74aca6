"""Which modules are the blocks of a model."""

from __future__ import annotations

import pytest
from support.models import Residual, convnet
from torch import nn

from reparam_peft.runtime.blocks import find_blocks


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ConvNet has no blocks.*: .* as ALBERT.* Leave out `sequential` and `refine`"):
        find_blocks(convnet())


def test_blocks_inside_of_blocks_do_not_count() -> None:
    nested = nn.ModuleList([nn.ModuleDict({"inner": nn.ModuleList([Residual(), Residual()])}) for _ in range(2)])
    assert list(find_blocks(nn.ModuleDict({"outer": nested}))) == ["outer.0", "outer.1"]
