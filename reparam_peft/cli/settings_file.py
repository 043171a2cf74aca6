"""Options of a command from a YAML file: what `--config` reads. The command line wins over it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .errors import CliError

# Options that take names separated by commas, and in a file a list of names, too.
LISTS = ("target_modules", "exclude_modules", "methods")


class Command(TyperCommand):
    """A command with the option `--config`, for `@app.command(cls=Command)`; the function behind it need not know."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_CONFIG)


def _use(context: typer.Context, path: Path | None) -> None:
    """Let the file's values be the defaults of the command, once each of them is known to be one that it takes."""
    if path is None or context.resilient_parsing:
        return
    from .yaml_file import read_settings

    allowed = {_key(parameter): parameter for parameter in context.command.params if parameter is not _CONFIG}
    defaults: dict[str, Any] = {}
    for key, value in read_settings(path).items():
        name = str(key).replace("-", "_")
        if name not in allowed:
            command = context.command_path
            raise CliError(f"{path}: `{key}` is not a setting of `{command}`; those are {', '.join(allowed)}.")
        parameter = allowed[name]
        if parameter.name in defaults:
            raise CliError(f"{path}: `{name}` is there twice.")
        try:
            defaults[parameter.name] = _as_typed(name, value, getattr(parameter, "is_flag", False))
            if value is not None:
                processed = parameter.process_value(context, defaults[parameter.name])
                if isinstance(processed, float) and not math.isfinite(processed):
                    raise ValueError("must be a finite number")
        except (ValueError, typer.BadParameter) as error:
            rule = error.message.removeprefix("Value error, ") if isinstance(error, typer.BadParameter) else str(error)
            raise CliError(f"{path}: `{key}`: {rule.rstrip('.')}, got {value!r:.100}.") from error
    context.default_map = {name: value for name, value in defaults.items() if value is not None}


def _key(parameter: Any) -> str:
    """The long option's name, with underscores, or the argument's."""
    long = [option for option in parameter.opts if option.startswith("--")]
    return (long[0][2:] if long else parameter.name).replace("-", "_")


def _as_typed(name: str, value: Any, is_flag: bool) -> Any:
    """A value as the command line would get it: text, or true or false. None stays, for the default."""
    if value is None or (is_flag and isinstance(value, bool)):
        return value
    if is_flag:
        raise ValueError("must be true or false")
    if isinstance(value, list) and name in LISTS:
        # Of several regular expressions, joined by commas, another one would come.
        if not value or not all(isinstance(word, str) and word.replace("_", "").replace(".", "").isalnum() for word in value):
            raise ValueError("must be a list of names, or one text")
        return ",".join(value)
    if isinstance(value, bool):  # which YAML also makes of yes, no, on and off
        raise ValueError("must be text or a number (put quotes around yes, no, on and off)")
    if not isinstance(value, str):
        names = " or a list of names" if name in LISTS else ""
        raise ValueError(f"must be text or a number{names}")
    return value


def _config(
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_use,
            is_eager=True,
            expose_value=False,
            help="YAML file with values of the options, for example `keep: 0.8`; the command line wins over it.",
        ),
    ] = None,
) -> None:
    """Holds the option, which typer makes of a function's signature only."""


_holder = typer.Typer(add_completion=False)
_holder.command()(_config)
(_CONFIG,) = typer.main.get_command(_holder).params
