"""The face of the package: public names are there when asked for, and importing it takes little beside PEFT."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
from importlib import import_module
from pathlib import Path

import pytest
from support.structure import modules_of, other_imports, own_imports

import reparam_peft
from reparam_peft.registration import register

PACKAGE = Path(reparam_peft.__file__).parent
MODULES = modules_of(PACKAGE)
FACE = ast.parse(MODULES["__init__"].read_text(encoding="utf-8"))


def test_type_checkers_see_what_is_imported_when_asked_for() -> None:
    """The imports under `TYPE_CHECKING` name the same objects as the table that is used, and `__all__` names all of them."""
    seen = {item.name: item.module for item in own_imports(FACE, "__init__", MODULES) if item.module != "registration"}
    assert sorted(seen) == sorted(reparam_peft.__all__)
    for name, module in seen.items():
        value = getattr(reparam_peft, name)
        assert value is getattr(import_module(f"reparam_peft.{module}"), name)
        assert vars(reparam_peft)[name] is value


def test_the_package_looks_as_if_all_were_imported() -> None:
    names = {*reparam_peft.__all__, "__version__", "__all__"}
    assert names <= set(dir(reparam_peft))
    assert names <= {name for name, _ in inspect.getmembers(reparam_peft)}
    everything: dict[str, object] = {}
    exec("from reparam_peft import *", everything)
    assert set(reparam_peft.__all__) <= set(everything)
    for value in (reparam_peft.compress, reparam_peft.ReparamConfig, reparam_peft.Refinement(epochs=2)):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value


def test_a_name_that_is_not_there_is_missed() -> None:
    with pytest.raises(AttributeError, match="module 'reparam_peft' has no attribute 'decompress'"):
        reparam_peft.decompress  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'decompress'"):
        exec("from reparam_peft import decompress")


def at_import(tree: ast.AST) -> ast.Module:
    """What runs when a module is imported: without bodies of functions, and what is for type checkers."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else node

    return Cut().visit(ast.parse(ast.unparse(tree)))


def test_registration_imports_what_loading_needs_only() -> None:
    """`import reparam_peft` beside PEFT; processor seconds are measured by tests/benchmarks/startup.py."""
    todo = {item.module for item in own_imports(ast.parse(inspect.getsource(register)), "registration", MODULES)}
    reached, others = {"registration"}, set()
    while todo:
        module = todo.pop()
        reached.add(module)
        tree = at_import(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        others |= other_imports(tree)
        todo |= {item.module for item in own_imports(tree, module, MODULES)} - reached
    assert not others & {"datasets", "pandas", "matplotlib", "accelerate.state", "yaml", "rich", "typer", "scipy"}
    assert {"tuner.model", "standalone.checkpoint"} <= reached
    beyond = {"blockwise", "healing", "searching", "report", "cli"}
    assert not {module.split(".")[0] for module in reached} & beyond
