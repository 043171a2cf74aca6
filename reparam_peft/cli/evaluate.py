"""`reparam evaluate`: how good, how large and how fast a model is."""

from __future__ import annotations

import json
from typing import Any

from ..evaluation.perplexity import perplexity
from ..evaluation.speed import benchmark
from ..standalone.checkpoint import CheckpointLoader
from .command_options import EvaluateOptions
from .inputs import held_out, is_compressed, load_model
from .outputs import check_language_model, figures_table, out, size_table


def evaluate(options: EvaluateOptions) -> None:
    """Do what `reparam evaluate --help` says."""
    loaded, tokenizer = load_model(options.model, options.load.dtype, options.load.device, keep=options.keep)
    check_language_model(loaded, options.model, "")
    batches = held_out(tokenizer, options.text)
    figures: dict[str, Any] = {"perplexity": perplexity(loaded, batches, progress=True)}
    sizes = loaded.size_report() if is_compressed(loaded) else None
    whole = sizes.to_dict()["model"] if sizes else {}
    figures["parameters"] = whole.get("stored_parameters", sum(p.numel() for p in loaded.parameters()))
    figures["bytes"] = whole.get("stored_bytes", _bytes(loaded))
    if options.speed:
        timing = benchmark(loaded, prompt_length=options.text.length)
        figures |= {name.replace("_", " "): value for name, value in timing.to_dict().items() if value is not None}
    if options.as_json:
        print(json.dumps({"model": options.model, **figures, **({"size": sizes.to_dict()} if sizes else {})}))
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
