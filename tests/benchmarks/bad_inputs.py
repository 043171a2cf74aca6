"""Bad inputs and the message that each gives.

    python tests/benchmarks/bad_inputs.py

Every call is expected to raise; one that does not ends the script with an error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import bert, convnet, llama, token_inputs
from torch import nn

from reparam_peft import ReparamConfig, benchmark, factorize, perplexity

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def compress(model: nn.Module, **options: Any) -> PeftModel:
    return get_peft_model(model, ReparamConfig(**{"target_modules": ["q_proj"], "keep": 0.5, **options}))


def spoilt(value: float) -> nn.Module:
    model = llama()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = value
    model.lm_head.weight.data[0, 0] = value  # PyTorch's fused attention swallows NaN
    return model


def depthwise() -> nn.Module:
    model = convnet()
    model.conv1 = nn.Conv2d(12, 12, 3, groups=12)
    return model


def skeleton() -> nn.Module:
    with torch.device("meta"):
        return type(llama())(llama().config)


def load_damaged(damage: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compress(llama()).save_pretrained(folder)
        damage(Path(folder))
        PeftModel.from_pretrained(llama(), folder)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def edit_config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **fields}))


def other_model() -> None:
    folder = tempfile.mkdtemp()
    try:
        compress(llama(), target_modules=["up_proj"]).save_pretrained(folder)
        PeftModel.from_pretrained(llama(intermediate_size=96), folder)
    finally:
        shutil.rmtree(folder)


CASES: dict[str, Callable[[], Any]] = {
    "rank 0": lambda: ReparamConfig(r=0),
    "rank '64'": lambda: ReparamConfig(r="64"),
    "keep 1.5": lambda: ReparamConfig(keep=1.5),
    "keep 0": lambda: ReparamConfig(keep=0),
    "keep True": lambda: ReparamConfig(keep=True),
    "unknown method": lambda: ReparamConfig(method="lora"),
    "method without data": lambda: ReparamConfig(method="whitened"),
    "allocation without data": lambda: ReparamConfig(allocation="loss"),
    "pivot form": lambda: ReparamConfig(form="pivot"),
    "invalid expression": lambda: ReparamConfig(target_modules="*q_proj"),
    "expression and layers": lambda: ReparamConfig(target_modules=".*q_proj", layers_to_transform=[0]),
    "rank_pattern of floats": lambda: ReparamConfig(rank_pattern={"q_proj": 0.5}),
    "rank above the matrix's": lambda: compress(llama(), rank_pattern={"q_proj": 65}),
    "no such module": lambda: compress(llama(), target_modules=["query"]),
    "no targets, unknown architecture": lambda: compress(convnet(), target_modules=None),
    "target of another kind": lambda: compress(llama(), target_modules=["norm"]),
    "depthwise convolution": lambda: compress(depthwise(), target_modules=["conv1"]),
    "tied output layer": lambda: compress(llama(tie_word_embeddings=True), target_modules=["lm_head"]),
    "NaN in a weight": lambda: compress(spoilt(torch.nan)),
    "inf in a weight": lambda: compress(spoilt(torch.inf)),
    "weights on meta": lambda: compress(skeleton()),
    "adapter name with a dot": lambda: get_peft_model(llama(), ReparamConfig(target_modules=["q_proj"]), adapter_name="v1.0"),
    "matrix of integers": lambda: factorize(torch.ones(3, 3, dtype=torch.int8), 1),
    "disable without the base": lambda: compress(llama()).disable_adapter().__enter__(),
    "unload without the base": lambda: compress(llama()).unload(),
    "truncated weights": lambda: load_damaged(truncate),
    "tensor missing": lambda: load_damaged(edit_tensors(lambda t: t.pop(sorted(t)[0]))),
    "NaN in the checkpoint": lambda: load_damaged(edit_tensors(lambda t: t[sorted(t)[0]].fill_(torch.nan))),
    "ranks tampered with": lambda: load_damaged(edit_config(rank_pattern={"model.layers.0.self_attn.q_proj": 3})),
    "config is no JSON": lambda: load_damaged(lambda folder: (folder / CONFIG).write_text("{")),
    "checkpoint of another model": other_model,
    "no tokens to predict": lambda: perplexity(llama(), []),
    "batch without input_ids": lambda: perplexity(llama(), [{"text": "hello"}]),
    "encoder without labels": lambda: perplexity(bert(), [token_inputs()]),
    "model of NaN": lambda: perplexity(spoilt(torch.nan), [token_inputs()]),
    "no repeats": lambda: benchmark(llama(), repeats=0),
}


def main() -> None:
    """Print a row for each."""
    warnings.simplefilter("ignore")
    print("| input | error | message |\n| --- | --- | --- |")
    for name, call in CASES.items():
        try:
            call()
        except Exception as error:
            message = " ".join(str(error).split()).replace("|", "\\|")
            print(f"| {name} | {type(error).__name__} | {message} |")
        else:
            sys.exit(f"{name}: nothing was raised")
    print(f"\n{len(CASES)} inputs")


if __name__ == "__main__":
    main()
