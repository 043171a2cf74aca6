"""A second device where there is none: what is computed on it must all be there, as on a GPU.

Its memory is the processor's and so are its operators, but tensors of two devices in one call are refused, as those of a GPU
and of the processor are. `second_device.cpp` registers it as PyTorch's backend for devices that it does not know.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState

NAME = "second"


def other_device() -> str:
    """What tests of devices compute on: the device of `REPARAM_TEST_DEVICE`, a GPU where there is one, or the second one."""
    return os.environ.get("REPARAM_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else second_device())


@pytest.fixture
def found_by_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has accelerate, and with it `Trainer`, find the second device as it finds a GPU."""
    if other_device() != NAME:
        yield
        return
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", f"{NAME}:0")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@cache
def second_device() -> str:
    """The name of the device, which is compiled at the first call in an environment; skips the tests where nothing compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # of an environment that is not activated
        if shutil.which("c++") is None or shutil.which("ninja") is None:
            pytest.skip("needs a C++ compiler and ninja", allow_module_level=True)
        from torch.utils.cpp_extension import load

        backend = load("reparam_second_device", [Path(__file__).with_suffix(".cpp")], extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend(NAME)
    backend.start()
    module = ModuleType(f"torch.{NAME}")
    nothing = torch.empty(0, dtype=torch.uint8)
    answers = {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": False}
    answers |= {"manual_seed_all": None, "synchronize": None, "set_device": None, "get_rng_state": nothing}
    answers |= {"set_rng_state": None, "get_amp_supported_dtype": [torch.bfloat16, torch.float16], "_lazy_init": None}
    for name, answer in answers.items():
        setattr(module, name, lambda *_, answer=answer, **__: answer)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_module=False, for_storage=True)
    return NAME
