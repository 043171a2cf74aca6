"""YAML as `--config` reads it: text, true, false and null, nothing twice, and nothing that refers to another part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import CliError

LARGEST = 1 << 20  # characters of a file


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, to which all but true, false and null is text, as on a command line, and nothing refers to another.

    It would let the last of two equal keys win.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rows if tag.endswith((":bool", ":null"))]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of which may stand for any number of values
            raise yaml.YAMLError("it refers to another part of itself by `*`, which is not read; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"`{twice}` is there twice.")
        return super().construct_mapping(node, deep)


def read_settings(path: Path) -> dict[Any, Any]:
    """What a file sets, not yet looked at.

    Raises:
        CliError: it cannot be read, or holds no settings.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        with path.open(encoding="utf-8") as file:
            settings = yaml.load(file.read(LARGEST), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CliError(f"--config {path} cannot be read: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise CliError(f"--config {path} must hold lines such as `keep: 0.8`, got a {type(settings).__name__}.")
    return settings
