"""`reparam evaluate`: how good, how large and how fast a model is."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..evaluation.perplexity import perplexity
from ..evaluation.speed import benchmark
from ..standalone.checkpoint import CheckpointLoader
from .inputs import held_out, is_compressed, load_model
from .options import JsonOption, LoadOptions, ModelArgument, SmallerOption, TextOptions
from .outputs import check_language_model, figures_table, out, size_table


def evaluate(
    model: ModelArgument,
    *,
    keep: SmallerOption = None,
    text: TextOptions,
    speed: Annotated[bool, typer.Option(help="Also measure latency and peak memory.")] = False,
    load: LoadOptions,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of MODEL on a text, its size, and on request its speed."""
    loaded, tokenizer = load_model(model, load.dtype, load.device, keep=keep)
    check_language_model(loaded, model, "")
    batches = held_out(tokenizer, text)
    figures: dict[str, Any] = {"perplexity": perplexity(loaded, batches, progress=True)}
    sizes = loaded.size_report() if is_compressed(loaded) else None
    whole = sizes.to_dict()["model"] if sizes else {}
    figures["parameters"] = whole.get("stored_parameters", sum(p.numel() for p in loaded.parameters()))
    figures["bytes"] = whole.get("stored_bytes", _bytes(loaded))
    if speed:
        timing = benchmark(loaded, prompt_length=text.length)
        figures |= {name.replace("_", " "): value for name, value in timing.to_dict().items() if value is not None}
    if as_json:
        print(json.dumps({"model": model, **figures, **({"size": sizes.to_dict()} if sizes else {})}))
        return
    out.print(figures_table(figures))
    if sizes:
        out.print(size_table(sizes))


def _bytes(model: Any) -> int:
    """What a model stores; quantised factors as they are in a checkpoint. Shared tensors count once."""
    loader = getattr(model, "hf_quantizer", None)
    state = loader.get_state_dict_and_metadata(model)[0] if isinstance(loader, CheckpointLoader) else None
    tensors = model.parameters() if state is None else {tensor.data_ptr(): tensor for tensor in state.values()}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
