"""Imports point to lower levels of DESIGN.md's table, local imports too; and what no file of the package may hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import reparam_peft

PACKAGE = Path(reparam_peft.__file__).parent
FILES = sorted(PACKAGE.glob("**/*.py"))
LEVELS = {
    1: [
        "plotting",
        "modeling_reparam",
        "metrics",
        "allocation",
        "evaluation",
        "target_modules",
        "model_card",
        "sampling",
        "distributed",
    ],
    2: ["decompositions", "config", "blocks", "distillation", "harness"],
    3: ["pivoting", "autoencoder", "planning", "refinement", "measures"],
    4: ["products", "run_folder"],
    5: ["factorized", "quantization"],
    6: ["layer", "checkpoint"],
    7: ["targets", "adapter_state", "statistics", "standalone", "onnx_export", "angles"],
    8: ["model", "calibration", "inner_lora"],
    9: ["pipeline", "healing", "loading", "demo"],
    10: ["registration", "anchoring", "truncation", "sources", "options"],
    11: ["sequential", "outputs", "settings_file"],
    12: ["compression", "export_command"],
    13: ["preparation", "streaming", "searching"],
    14: ["records"],
    15: ["report", "search_command", "heal_command"],
    16: ["report_command"],
    17: ["cli", "__init__"],
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}
TORCH_ONLY = {"metrics", "decompositions", "allocation", "pivoting", "autoencoder"}
MOST_LINES = 450


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes outside `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from walk(other)
        else:
            yield child
            yield from walk(child)


def imports(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The package's own modules that are imported, and the top-level names of others."""
    own, others = set(), set()
    for node in walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            own.update([node.module.split(".")[0]] if node.module else [alias.name for alias in node.names])
            continue
        elif isinstance(node, ast.ImportFrom):
            from_package = node.module == "reparam_peft"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if from_package else [node.module]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top == "reparam_peft":
                own.add(rest[0] if rest and rest[0] in LEVEL else "__init__")
            else:
                others.add(top)
    return own, others


def test_the_table_lists_the_files_of_the_package() -> None:
    assert {path.stem for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_to_lower_levels(path: Path) -> None:
    own, _ = imports(parse(path))
    wrong = {name for name in own if LEVEL[name] >= LEVEL[path.stem]}
    assert not wrong, f"{path.stem} (level {LEVEL[path.stem]}) imports {wrong}"
    if path.stem == "__init__":
        assert "cli" not in own, "the command line's dependencies are not needed to use the package"


@pytest.mark.parametrize("name", sorted(TORCH_ONLY))
def test_pure_mathematics_needs_torch_only(name: str) -> None:
    _, others = imports(parse(PACKAGE / f"{name}.py"))
    assert others <= {"__future__", "collections", "dataclasses", "functools", "heapq", "math", "typing", "torch"}


def test_only_one_file_knows_layer_kinds() -> None:
    """Layer classes are named where their kinds are defined, and in the reader that leaves the package with a checkpoint."""
    kinds = {"Conv1D", "NonDynamicallyQuantizableLinear", "padding_idx", "embed_scale", "groups"}
    for path in FILES:
        named = {node.id for node in walk(parse(path)) if isinstance(node, ast.Name)}
        named |= {node.attr for node in walk(parse(path)) if isinstance(node, ast.Attribute)}
        assert path.stem in ("factorized", "modeling_reparam") or not named & kinds, path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_read_at_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_there_is_no_drawer_for_everything() -> None:
    assert not {path.stem.strip("_") for path in FILES} & {"utils", "util", "helpers", "helper", "common", "misc"}


def called(tree: ast.AST) -> set[str]:
    """Names of what is called, `torch.load` in full."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_no_file_holds(path: Path) -> None:
    tree = parse(path)
    if path.stem != "cli" and not path.stem.endswith("_command"):
        assert "print" not in called(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert not {"Exception", "BaseException", "everything"} & set(caught.strip("()").split(", ")), f"line {node.lineno}"
    _, others = imports(tree)
    assert not others & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert not called(tree) & {"torch.load", "torch.save", "eval", "exec", "os.system"}
    assert "trust_remote_code" not in {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert ast.get_docstring(tree), "says what it is for"


@pytest.mark.parametrize(
    ("source", "own", "others"),
    [
        ("import torch\nfrom .config import X", {"config"}, {"torch"}),
        ("def f():\n    from .model import X", {"model"}, set()),
        ("from . import layer", {"layer"}, set()),
        ("from reparam_peft.cli import app\nimport reparam_peft.model", {"cli", "model"}, set()),
        ("from reparam_peft import ReparamConfig", {"__init__"}, set()),
        ("if TYPE_CHECKING:\n    from .model import X\nelse:\n    from .layer import Y", {"layer"}, set()),
        ("try:\n    import os.path\nexcept ImportError:\n    from .demo import X", {"demo"}, {"os"}),
    ],
)
def test_the_check_itself_sees_every_form_of_import(source: str, own: set[str], others: set[str]) -> None:
    assert imports(ast.parse(source)) == (own, others)
