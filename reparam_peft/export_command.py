"""`reparam export`: from an adapter to a checkpoint that needs no base model."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console

from .model import ReparamModel
from .options import DeviceOption, DtypeOption, JsonOption, ModelArgument, OutputArgument, OverwriteOption
from .outputs import check_output, save_whole
from .sources import CliError, load_model
from .standalone import save_self_contained


class Kind(str, Enum):
    """What can be exported."""

    standalone = "standalone"
    dense = "dense"


def export(
    model: ModelArgument,
    output: OutputArgument,
    to: Annotated[Kind, typer.Option(help="With factors, to load after `import reparam_peft`, or dense, of the old size.")] = (
        Kind.standalone
    ),
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="With the code that it needs, for `trust_remote_code=True`.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the compressed MODEL to OUT as a checkpoint that `AutoModel…` loads without the dense one."""
    output = output.resolve()
    check_output(output, model, overwrite)
    adapter, tokenizer = load_model(model, dtype, device)
    if not isinstance(getattr(adapter, "base_model", None), ReparamModel):
        raise CliError(f"{model} is no compressed adapter; make one with `reparam compress`.")
    if self_contained and to is Kind.dense:
        raise CliError("a dense checkpoint needs no code; leave out --self-contained.")
    plain = adapter.to_standalone() if to is Kind.standalone else adapter.merge_and_unload(safe_merge=True)
    save_whole(plain, tokenizer, output, save_self_contained if self_contained else None)
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    if as_json:
        print(json.dumps({"model": model, "output": str(output), "to": to.value, "bytes": written}))
    else:
        Console().print(f"{written:,} bytes of weights saved to {output}", highlight=False)
