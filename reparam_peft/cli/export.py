"""`reparam export`: from an adapter to a checkpoint that needs no base model, or to ONNX files."""

from __future__ import annotations

import json
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from ..config.model_card import write_standalone_card
from ..config.reparam_config import ReparamConfig
from ..standalone.onnx_export import save_onnx
from ..standalone.self_contained import auto_class, save_self_contained
from .errors import CliError
from .inputs import load_compressed
from .options import JsonOption, LoadOptions, ModelArgument, OutputArgument, OverwriteOption, SmallerOption
from .outputs import check_output, out, save_whole
from .statistics_file import load_statistics


class Kind(str, Enum):
    """What can be exported."""

    standalone = "standalone"
    dense = "dense"
    onnx = "onnx"


class Bits(str, Enum):
    """How factors are stored."""

    int8 = "int8"
    int4 = "int4"


class TableBits(str, Enum):
    """How tables of embeddings are stored."""

    int8 = "int8"


def export(
    model: ModelArgument,
    output: OutputArgument,
    *,
    keep: SmallerOption = None,
    to: Annotated[
        Kind, typer.Option(help="With factors, to load after `import reparam_peft`; dense, of the old size; or ONNX files.")
    ] = Kind.standalone,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="With the code that it needs, for `trust_remote_code=True`.")
    ] = False,
    quantize: Annotated[
        Bits | None, typer.Option(help="Factors in 8 bits (needs torchao) or 4 bits (needs bitsandbytes).")
    ] = None,
    quantize_tables: Annotated[
        TableBits | None, typer.Option(help="Tables of embeddings that are not factorised in 8 bits (needs torchao).")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="File that `compress --statistics` wrote, with which --quantize loses much less.")
    ] = None,
    load: LoadOptions,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the compressed MODEL to OUT as a checkpoint that `AutoModel…` loads without the dense one, or as ONNX files."""
    output = output.resolve()
    check_output(output, model, overwrite)
    quantizes = quantize is not None or quantize_tables is not None
    if self_contained and (to is not Kind.standalone or quantizes):
        raise CliError("--self-contained is for standalone checkpoints that are not quantised; leave one of the two out.")
    if quantizes and to is not Kind.standalone:
        option = "--quantize" if quantize else "--quantize-tables"
        raise CliError(f"{option} is for standalone checkpoints; leave it out.")
    if statistics is not None and quantize is None:
        raise CliError("--statistics is for --quantize; give both or neither.")
    known = None if statistics is None else load_statistics(statistics)
    # ONNX Runtime has no bfloat16 on a CPU.
    dtype = "float32" if to is Kind.onnx and load.dtype == "auto" else load.dtype
    adapter, tokenizer = load_compressed(model, dtype, load.device, keep=keep)
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
            overwrite=overwrite,
            save=partial(_save, adapter.peft_config["default"], to, self_contained),
        )
    except ImportError as error:
        raise CliError(str(error)) from error
    weights = (path for pattern in ("*.safetensors", "*.onnx*") for path in output.glob(pattern))
    written = sum(path.stat().st_size for path in weights)
    if as_json:
        stored = {"quantize": quantize, "quantize_tables": quantize_tables}
        bits = {name: None if value is None else value.value for name, value in stored.items()}
        print(json.dumps({"model": model, "output": str(output), "to": to.value, **bits, "bytes": written}))
    else:
        out.print(f"{written:,} bytes of weights saved to {output}", highlight=False, soft_wrap=True)


def _save(config: ReparamConfig, to: Kind, self_contained: bool, model: PreTrainedModel, folder: Path) -> None:
    """Write what is exported, with a card where it is a standalone checkpoint."""
    if to is Kind.onnx:
        save_onnx(model, folder)
    elif self_contained:
        save_self_contained(model, folder)
    else:
        model.save_pretrained(folder)
    if to is Kind.standalone:
        write_standalone_card(folder, config, auto_class(model), self_contained)
