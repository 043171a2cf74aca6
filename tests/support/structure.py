"""The files of a package and what each imports: under `TYPE_CHECKING` and inside of functions too."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple


class Imported(NamedTuple):
    """One imported name: `from .fields import METHODS` in `config/checks.py` is ("config.fields", "METHODS")."""

    module: str
    name: str | None


def modules_of(package: Path) -> dict[str, Path]:
    """The files of a package by dotted name below it: "config.fields"; "__init__" is its face, "config" that of a folder."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        modules[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return modules


def own_imports(tree: ast.AST, module: str, modules: Collection[str], package: str = "reparam_peft") -> list[Imported]:
    """What a module imports of its own package.

    Args:
        tree: of the module.
        module: its dotted name below the package.
        modules: dotted names of all modules.
        package: name of the package.
    """
    imported = []
    folder = module.split(".") if any(other.startswith(f"{module}.") for other in modules) else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name.split("."), None) for alias in node.names]
            imported += [Imported(".".join(path[1:]) or "__init__", None) for path, _ in names if path[0] == package]
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".") if node.module else []
            if node.level:
                path = [*folder[: len(folder) - node.level + 1], *path]
            elif path[:1] == [package]:
                path = path[1:]
            else:
                continue
            for alias in node.names:
                whole = ".".join([*path, alias.name])
                imported.append(
                    Imported(whole, None) if whole in modules else Imported(".".join(path) or "__init__", alias.name)
                )
    return imported


def other_imports(tree: ast.AST, package: str = "reparam_peft") -> set[str]:
    """Top-level names of the other packages that a module imports."""
    names = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    sources = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level)
    return (names | {(node.module or "").split(".")[0] for node in sources}) - {package}


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module → modules of the same package that it imports."""
    modules = modules_of(package)
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in modules.items()}
    return {
        module: {imported.module for imported in own_imports(tree, module, modules)} - {module}
        for module, tree in trees.items()
    }


def circle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """The modules of one import circle, the first again at the end; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def floors(graph: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Modules that import nothing of the package, those that import these only, and so on.

    Raises:
        graphlib.CycleError: there is a circle.
    """
    sorter = graphlib.TopologicalSorter(graph)
    sorter.prepare()
    found = []
    while sorter.is_active():
        ready = sorter.get_ready()
        found.append(sorted(ready))
        sorter.done(*ready)
    return found
