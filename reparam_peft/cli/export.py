"""`reparam export`: from an adapter to a checkpoint that needs no base model, or to ONNX files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from ..standalone.onnx_export import save_onnx
from ..standalone.self_contained import save_self_contained
from .command_options import ExportOptions, Kind
from .errors import CliError
from .inputs import load_compressed
from .outputs import check_output, out, save_whole
from .statistics_file import load_statistics


def export(options: ExportOptions) -> None:
    """Do what `reparam export --help` says."""
    output, to = options.output.resolve(), options.to
    check_output(output, options.model, options.overwrite)
    quantize, quantize_tables = options.quantize, options.quantize_tables
    quantizes = quantize is not None or quantize_tables is not None
    if options.self_contained and (to is not Kind.standalone or quantize_tables is not None):
        raise CliError("--self-contained is for standalone checkpoints without quantised tables; leave one of the two out.")
    if quantizes and to is not Kind.standalone:
        option = "--quantize" if quantize else "--quantize-tables"
        raise CliError(f"{option} is for standalone checkpoints; leave it out.")
    if options.statistics is not None and quantize is None:
        raise CliError("--statistics is for --quantize; give both or neither.")
    known = None if options.statistics is None else load_statistics(options.statistics)
    # ONNX Runtime has no bfloat16 on a CPU.
    dtype = "float32" if to is Kind.onnx and options.load.dtype == "auto" else options.load.dtype
    adapter, tokenizer = load_compressed(options.model, dtype, options.load.device, keep=options.keep)
    try:
        if to is Kind.dense:
            plain = adapter.merge_and_unload(safe_merge=True)
        else:
            plain = adapter.to_standalone(
                quantize=quantize.value if quantize else None,
                quantize_tables=quantize_tables.value if quantize_tables else None,
                statistics=known,
            )
        save_whole(
            plain,
            tokenizer,
            output,
            overwrite=options.overwrite,
            save=partial(_save, to, options.self_contained),
        )
    except ImportError as error:
        raise CliError(str(error)) from error
    weights = (path for pattern in ("*.safetensors", "*.onnx*") for path in output.glob(pattern))
    written = sum(path.stat().st_size for path in weights)
    if options.as_json:
        stored = {"quantize": quantize, "quantize_tables": quantize_tables}
        bits = {name: None if value is None else value.value for name, value in stored.items()}
        print(json.dumps({"model": options.model, "output": str(output), "to": to.value, **bits, "bytes": written}))
    else:
        out.print(f"{written:,} bytes of weights saved to {output}", highlight=False, soft_wrap=True)


def _save(to: Kind, self_contained: bool, model: PreTrainedModel, folder: Path) -> None:
    """Write what is exported."""
    if to is Kind.onnx:
        save_onnx(model, folder)
    elif self_contained:
        save_self_contained(model, folder)
    else:
        model.save_pretrained(folder)
