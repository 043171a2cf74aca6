"""ONNX files of standalone models: transformers' exporters, and a check of what they made in ONNX Runtime."""

from __future__ import annotations

import copy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..runtime.modules import input_device
from .checkpoint import CheckpointConfig, check_closed, with_layers_in_config

LARGEST_DIFFERENCE = 1e-3  # of outputs, relative to the largest of them; float32 gives about 1e-6


def save_onnx(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a standalone model as ONNX files, with dynamic numbers of rows and tokens, after a check in ONNX Runtime.

    A model that generates becomes two graphs, `prefill.onnx` and `decode.onnx`, of which the second one takes and returns the
    keys and values of the past; any other model becomes `model.onnx`. `export.json` names their inputs and outputs, and
    `transformers.exporters.ExportedModel.from_pretrained` reads them.

    Args:
        model: what `to_standalone()` returns, of text or images; in float32 or float16. One that is not on the processor is
            copied there.
        folder: where to write.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing, transformers is older than 5.23, or PyTorch than 2.11.
        TypeError: the model takes neither tokens nor images.
        ValueError: the factors are quantised, or of parameters; or ONNX Runtime computes something else than PyTorch.
    """
    described = getattr(model.config, "quantization_config", None)
    if isinstance(described, CheckpointConfig) and described.is_in_few_bits:
        raise ValueError(
            "factors, matrices and tables in few bits have no ONNX form; export a model in its own dtype, and quantise with "
            "ONNX Runtime's tools."
        )
    check_closed(model, "an ONNX file")
    few, more = _inputs(model, 2, 8), _inputs(model, 3, 11)
    try:
        import onnxruntime  # noqa: F401
        from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter
        from transformers.exporters.utils import decompose_for_generation

        exporter, options = OnnxExporter(), OnnxConfig(dynamic=True)  # asks for the versions that it needs
    except ImportError as error:
        raise ImportError(
            f"ONNX files need transformers 5.23, PyTorch 2.11 and the extra `onnx` ({error}): pip install --upgrade "
            "'transformers>=5.23' 'torch>=2.11' 'reparam_peft[onnx]'."
        ) from error
    if input_device(model).type != "cpu":
        model = nn.Module.to(copy.deepcopy(model), "cpu")  # where the inputs are, and ONNX Runtime computes
    plain = with_layers_in_config(model, described) if isinstance(described, CheckpointConfig) else model
    with redirect_stdout(sys.stderr):  # PyTorch prints what it does
        if plain.can_generate():
            exported: ExportedModel = exporter.export_for_generation(plain, few, options)
            parts = decompose_for_generation(plain, more)
        else:
            exported = exporter.export(plain, few, options)
            parts = {"model": (plain, more)}
    for name, (part, inputs) in parts.items():
        with torch.no_grad():
            expected = part(**copy.deepcopy(inputs))
        _check(name, _floats(exported.runners[name](**inputs)), _floats(expected))
    exported.save_pretrained(folder)


def _inputs(model: PreTrainedModel, rows: int, length: int) -> dict[str, Any]:
    """Something that the model computes; one row of tokens is padded, so that the mask is not left out of the graph."""
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        count = rows * model.config.num_channels * height * width
        return {"pixel_values": torch.linspace(-1, 1, count, device="cpu").view(rows, -1, height, width)}
    if model.main_input_name != "input_ids":
        raise TypeError(
            f"a {type(model).__name__} takes {model.main_input_name}; ONNX files are made of tokens and images only."
        )
    tokens = torch.arange(rows * length, device="cpu").view(rows, length) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(tokens)
    mask[0, : length // 4] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _floats(outputs: Any) -> list[Tensor]:
    """The tensors of numbers in what a model returns."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _check(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
    if len(got) != len(expected):
        raise ValueError(f"{name}.onnx returns {len(got)} tensors in ONNX Runtime, and PyTorch {len(expected)}.")
    for one, other in zip(got, expected, strict=True):
        largest = other.abs().max() if other.numel() else other.new_ones(())
        difference = float((one - other).abs().max() / largest) if other.numel() else 0.0
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"{name}.onnx computes something else in ONNX Runtime than PyTorch does: outputs differ by {difference:.2g} of "
                f"the largest, more than {LARGEST_DIFFERENCE:g}."
            )
