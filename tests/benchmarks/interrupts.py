"""Interrupt each operation that changes a model, and look whether the model is as it was.

python tests/benchmarks/interrupts.py [--points 40] [--every] [--within reparam_peft peft] [--only compress merge]

Two kinds of interrupts, each at points spread evenly over the operation, from a seeded first one: `torch.OutOfMemoryError` at
an operation of torch, and `KeyboardInterrupt` at a line of code of the packages in `--within`. With `--every`, at all of them.
What is compared: types, modes, attributes and hooks of all modules, `requires_grad` and identity of all parameters, the bytes
of all parameters and buffers, and the output. The exit status is 1 where a model was changed. It takes minutes.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import reparam_peft
from reparam_peft import Refinement, ReparamConfig, calibrate, compress, retruncate, search

PACKAGES = {"reparam_peft": Path(reparam_peft.__file__).parent, "peft": Path(sys.modules["peft"].__file__ or "").parent}
TOKENS = torch.arange(16).view(2, 8) % 20
DATA = [{"input_ids": TOKENS}, {"input_ids": TOKENS.flip(1)}]
DATA_FREE: dict[str, Any] = {"target_modules": "all-linear", "keep": 0.6}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=20, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.model.layers[0].eval()  # so that modes differ
    return model


def adapted(keep_base: bool = False, **options: Any) -> PeftModel:
    return get_peft_model(llama(), ReparamConfig(**{**DATA_FREE, **options}, keep_base=keep_base))


def second(model: PeftModel) -> PeftModel:
    model.add_adapter("second", ReparamConfig(**DATA_FREE))
    return model


def saved(folder: Path) -> Path:
    if not folder.exists():
        adapted().save_pretrained(str(folder))
    return folder


def operations(folder: Path) -> dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object]]]:
    """Name → what makes a model, and what is done to it."""
    quiet: dict[str, Any] = {"progress": False}
    statistics = calibrate(llama(), ReparamConfig(**DATA_FREE), DATA, **quiet)
    config = ReparamConfig(**DATA_FREE)
    searched = ReparamConfig(target_modules="all-linear")
    limits: dict[str, Any] = {"metric": "perplexity", "evaluation": DATA, "keeps": [0.5, 0.9], "tolerance": "900%"}
    refinement = Refinement(epochs=1, batch_size=2)
    return {
        "get_peft_model": (llama, lambda m: get_peft_model(m, ReparamConfig(**DATA_FREE))),
        "get_peft_model, bfloat16": (lambda: llama(torch.bfloat16), lambda m: get_peft_model(m, ReparamConfig(**DATA_FREE))),
        "compress": (llama, lambda m: compress(m, config, DATA, **quiet)),
        "sequential": (llama, lambda m: compress(m, config, DATA, sequential=True, statistics=statistics, **quiet)),
        "refine": (llama, lambda m: compress(m, config, DATA, refine=refinement, statistics=statistics, **quiet)),
        "search": (llama, lambda m: search(m, searched, statistics, **limits, **quiet)),
        "add_adapter": (adapted, second),
        "add_adapter, W kept": (lambda: adapted(keep_base=True), second),
        "retruncate": (adapted, lambda m: retruncate(m, 0.3, **quiet)),
        "retruncate with data": (adapted, lambda m: retruncate(m, 0.3, DATA, **quiet)),
        "merge": (adapted, lambda m: m.merge_adapter()),
        "merge, W kept": (lambda: adapted(keep_base=True), lambda m: m.merge_adapter()),
        "unmerge": (merged, lambda m: m.unmerge_adapter()),
        "merge_and_unload": (adapted, lambda m: m.base_model.merge_and_unload()),
        "unload": (lambda: adapted(keep_base=True), lambda m: m.base_model.unload()),
        "delete": (lambda: second(adapted()), lambda m: m.base_model.delete_adapter("second")),
        "load": (llama, lambda m: PeftModel.from_pretrained(m, str(saved(folder / "adapter")))),
        "load another": (adapted, lambda m: m.load_adapter(str(saved(folder / "adapter")), "second")),
    }


def merged() -> PeftModel:
    model = adapted(keep_base=True)
    model.merge_adapter()
    return model


def state_of(model: nn.Module) -> dict[str, Any]:
    """What must be the same after an interrupt; compared with ==."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        state[name] = (type(module), id(module), module.training, sorted(vars(module)), [len(h) for h in hooks])
        state[f"{name} buffers"] = {key: content(value) for key, value in module._buffers.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"{name} parameter"] = (id(parameter), parameter.requires_grad, content(parameter))
    state["configs"] = {key: copy.deepcopy(vars(value)) for key, value in getattr(model, "peft_config", {}).items()}
    try:
        with torch.no_grad():
            state["output"] = content(copy.deepcopy(model).eval()(input_ids=TOKENS).logits)
    except RuntimeError as error:
        state["output"] = str(error)
    return state


def content(tensor: torch.Tensor | None) -> Any:
    if tensor is None or tensor.is_meta:
        return tensor
    return tensor.shape, tensor.dtype, tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class OutOfMemory(TorchDispatchMode):
    """Raises at the operation of a number; counts them."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


class Interrupt:
    """Raises at the line of a number, of those within some folders; counts them."""

    def __init__(self, at: int, folders: tuple[str, ...]) -> None:
        self.at, self.folders, self.count, self.where = at, folders, 0, ""

    def __call__(self, frame: Any, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.folders):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt("injected")
        return self

    @contextmanager
    def tracing(self) -> Iterator[None]:
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(None)


def points(count: int, most: int, every: bool) -> range:
    """Numbers from 1 on, evenly spread."""
    stride = 1 if every else max(1, count // most)
    return range(1 + random.Random(count).randrange(stride), count + 1, stride)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--within", nargs="+", choices=list(PACKAGES), default=["reparam_peft"])
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folders = tuple(f"{PACKAGES[name]}/" for name in options.within)
    in_all = 0
    with tempfile.TemporaryDirectory() as temporary:
        chosen = {n: pair for n, pair in operations(Path(temporary)).items() if not options.only or n in options.only}
        for name, (make, operate) in chosen.items():
            for kind in ("out of memory", "interrupt"):

                def attempt(at: int, kind: str = kind, make: Any = make, operate: Any = operate) -> tuple[int, str, bool]:
                    model = make()
                    before = state_of(model)
                    raised = False
                    injected: Any = OutOfMemory(at) if kind == "out of memory" else Interrupt(at, folders)
                    try:
                        with injected if kind == "out of memory" else injected.tracing():
                            operate(model)
                    except BaseException:  # a library may make another error of it
                        if injected.count < at or not at:
                            raise
                        raised = True
                    if not raised:
                        return injected.count, "", False
                    after = state_of(model)
                    changed = next((key for key in before.keys() | after.keys() if before.get(key) != after.get(key)), "")
                    return injected.count, f"{getattr(injected, 'where', '') or at}: {changed}", changed != ""

                total = attempt(0)[0]
                tried = [attempt(at) for at in points(total, options.points, options.every)]
                failures = [where for _, where, changed in tried if changed]
                in_all += len(failures)
                print(f"{name:26} {kind:14} {total:7} points, {len(tried):5} tried, {len(failures):4} changed", flush=True)
                for where in failures[:5]:
                    print(f"    {where}")
    print(f"{in_all} changed models")
    return int(in_all > 0)


if __name__ == "__main__":
    sys.exit(main())
