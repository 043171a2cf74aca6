"""The packages stand on eight levels, and a file imports lower levels or its own package; and what no file may hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.structure import Imported, circle, floors, import_graph, modules_of, other_imports, own_imports

import reparam_peft
from reparam_peft.numerics.methods import METHODS

PACKAGE = Path(reparam_peft.__file__).parent
MODULES = modules_of(PACKAGE)
GRAPH = import_graph(PACKAGE)
LEVELS = [
    {"numerics", "runtime", "display", "arguments", "defaults"},
    {"config", "layers", "evaluation"},
    {"calibration", "planning", "standalone"},
    {"tuner", "blockwise"},
    {"compression", "healing"},
    {"searching", "registration"},
    {"report"},
    {"cli", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS, start=1) for name in names}
MOST_LINES = 450

modules = pytest.mark.parametrize("module", MODULES)


def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def room(module: str) -> str:
    """The package of a module."""
    return module.split(".")[0]


def test_the_table_lists_the_packages() -> None:
    assert {room(module) for module in MODULES} == set(LEVEL)


@modules
def test_imports_point_to_lower_levels_or_stay_in_the_package(module: str) -> None:
    wrong = {other for other in GRAPH[module] if room(other) != room(module) and LEVEL[room(other)] >= LEVEL[room(module)]}
    assert not wrong, f"{module} (level {LEVEL[room(module)]}) imports {wrong}"


def test_there_is_no_circle() -> None:
    assert circle(GRAPH) == []


def test_the_package_is_used_without_the_command_line() -> None:
    assert "cli" not in {room(module) for module in GRAPH["__init__"]}


@modules
def test_files_are_written_by_one_writer(module: str) -> None:
    """Whole, under unique names, never through a link: `runtime/files.py` does it, and others give it what they write."""
    exempt = {
        "runtime.files": {"write_bytes", "save_file"},
        "blockwise.activations": {"save_file"},  # in a folder of its own
        "report.page": {"savefig"},  # to memory
    }
    writers = {"write_text", "write_bytes", "save_file", "savefig", "dump", "mkstemp", "mkdtemp", "tofile"}
    assert {name.split(".")[-1] for name in called(parse(module))} & writers <= exempt.get(module, set())


@modules
def test_a_package_holds_its_docstring_only(module: str) -> None:
    if MODULES[module].name == "__init__.py" and module != "__init__":
        tree = parse(module)
        assert len(tree.body) == 1
        assert ast.get_docstring(tree)


@modules
def test_no_private_name_crosses_files(module: str) -> None:
    private = [item for item in own_imports(parse(module), module, MODULES) if (item.name or "").startswith("_")]
    assert [item for item in private if not item.name.startswith("__")] == []


@modules
def test_no_private_attribute_of_another_file_is_used(module: str) -> None:
    """A name with a leading underscore is used where it is defined, on `self`, or on objects of other libraries."""
    tree = parse(module)
    imported = {item.name or item.module.split(".")[-1] for item in own_imports(tree, module, MODULES)}
    used = [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported
        if node.attr.startswith("_") and not node.attr.startswith("__")
    ]
    assert used == []


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) == "numerics"])
def test_pure_mathematics_needs_torch_only(module: str) -> None:
    others = other_imports(parse(module))
    assert others <= {
        "__future__",
        "collections",
        "contextlib",
        "dataclasses",
        "functools",
        "heapq",
        "threading",
        "math",
        "typing",
        "torch",
    }


@modules
def test_only_their_files_know_layer_kinds(module: str) -> None:
    """Layer classes are named where their kinds are defined, and in the reader that leaves the package with a checkpoint."""
    kinds = {"Conv1D", "NonDynamicallyQuantizableLinear", "padding_idx", "embed_scale", "groups"}
    named = {node.id for node in ast.walk(parse(module)) if isinstance(node, ast.Name)}
    named |= {node.attr for node in ast.walk(parse(module)) if isinstance(node, ast.Attribute)}
    of_kinds = {f"layers.{file}" for file in ("kind", "kinds", "factorized_kinds", "convolutions")}
    assert module in {*of_kinds, "standalone.modeling_reparam"} or not named & kinds


@modules
def test_a_file_is_read_at_one_sitting(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_there_is_no_drawer_for_everything() -> None:
    assert not {part.strip("_") for module in MODULES for part in module.split(".")} & {
        *("utils", "util", "helpers", "helper", "common", "misc")
    }


def test_no_package_bears_a_public_name() -> None:
    """`from .x import search` would put the function in the place of a package of this name."""
    assert not {room(module) for module in MODULES} & set(reparam_peft.__all__)


def called(tree: ast.AST) -> set[str]:
    """Names of what is called, `torch.load` in full."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def is_drawn_elsewhere(call: ast.Call) -> bool:
    """Whether a generator draws a tensor that is made on a device which the code does not name."""

    def names_no_device(made: ast.AST) -> bool:
        is_call = isinstance(made, ast.Call) and ast.unparse(made.func).startswith("torch.")
        return is_call and not any(keyword.arg == "device" for keyword in made.keywords)

    function = call.func
    if not isinstance(function, ast.Attribute) or not any(keyword.arg == "generator" for keyword in call.keywords):
        return False
    in_place = function.attr.endswith("_")
    return names_no_device(function.value if in_place else call) and function.attr != "multinomial"


@modules
def test_what_no_file_holds(module: str) -> None:
    tree = parse(module)
    if room(module) != "cli":
        assert "print" not in called(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert not {"Exception", "BaseException", "everything"} & set(caught.strip("()").split(", ")), f"line {node.lineno}"
    assert not other_imports(tree) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert not called(tree) & {"torch.load", "torch.save", "eval", "exec", "os.system"}
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    assert {ast.unparse(node.value) for node in keywords if node.arg == "trust_remote_code"} <= {"False"}
    drawn = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call) and is_drawn_elsewhere(node)}
    assert not drawn, "draws by a generator of the processor where the default device says"
    assert ast.get_docstring(tree), "says what it is for"


TESTS = Path(__file__).parent
MIRRORS = sorted(
    path.relative_to(TESTS).as_posix()
    for path in TESTS.glob("*/*.py")
    if path.parent.name not in ("support", "benchmarks", "hosts")
)
SEVERAL_FILES = {
    "cli/test_other_devices.py",
    "tuner/test_nested.py",
    "tuner/test_peft_conformance.py",
}
# In the scripts that some tests hand to other processes, too.
IMPORTS_A_TEST = re.compile(r"^\s*(?:from|import)\s+(?:\w+\.)*(?:test_\w+|conftest)\b", re.MULTILINE)


def test_no_file_imports_from_a_test() -> None:
    """What tests share stands in tests/support, and fixtures in a conftest.py, which pytest finds by itself."""
    files = sorted(TESTS.rglob("*.py"))
    assert [file.name for file in files if IMPORTS_A_TEST.search(file.read_text(encoding="utf-8"))] == []


def test_folders_of_tests_are_packages() -> None:
    assert {path.split("/")[0] for path in MIRRORS} <= {room(module) for module in MODULES if "." in module}


def test_files_of_tests_are_those_of_the_package() -> None:
    files = {f"{folder}/test_{file}.py" for folder, _, file in (module.partition(".") for module in MODULES)}
    assert [path for path in MIRRORS if not path.endswith("/conftest.py") and path not in files | SEVERAL_FILES] == []


# Files that are tested through those that use them only; none is added.
WITHOUT_TESTS = {
    *("cli.errors", "cli.groups", "cli.options", "compression.present", "healing.counting"),
    *("searching.goal", "tuner.matrices"),
}


def test_files_of_the_package_have_tests() -> None:
    inner = {module for module in MODULES if "." in module}
    untested = {module for module in inner if f"{room(module)}/test_{module.partition('.')[2]}.py" not in MIRRORS}
    assert untested == WITHOUT_TESTS


@modules
def test_only_one_file_lists_methods(module: str) -> None:
    """No collection elsewhere holds the names of two methods."""
    collections = (node for node in ast.walk(parse(module)) if isinstance(node, ast.Tuple | ast.List | ast.Set))
    constants = [[item.value for item in node.elts if isinstance(item, ast.Constant)] for node in collections]
    assert module == "numerics.methods" or not any(len({*values} & {*METHODS}) > 1 for values in constants)


@pytest.mark.parametrize("line", ["from test_x import y", "    import conftest", "from tests.cli.test_x import y"])
def test_the_check_itself_sees_imports_from_tests(line: str) -> None:
    assert IMPORTS_A_TEST.search(f"x = 1\n{line}\n")
    assert not IMPORTS_A_TEST.search("from support.models import test_case  # conftest\n")


KNOWN = {"__init__", "config", "config.fields", "tuner", "tuner.layer", "cli", "cli.app"}


@pytest.mark.parametrize(
    ("source", "own", "others"),
    [
        ("import torch\nfrom .fields import X", [("config.fields", "X")], {"torch"}),
        ("def f():\n    from ..tuner.layer import X", [("tuner.layer", "X")], set()),
        ("from . import fields", [("config.fields", None)], set()),
        ("from ..tuner import layer as x", [("tuner.layer", None)], set()),
        ("from .. import VERSION", [("__init__", "VERSION")], set()),
        (
            "from reparam_peft.cli import app\nimport reparam_peft.tuner.layer",
            [("tuner.layer", None), ("cli.app", None)],
            set(),
        ),
        ("from reparam_peft import ReparamConfig", [("__init__", "ReparamConfig")], set()),
        ("if TYPE_CHECKING:\n    from .fields import X", [("config.fields", "X")], set()),
        ("try:\n    import os.path\nexcept ImportError:\n    from .fields import _x", [("config.fields", "_x")], {"os"}),
    ],
)
def test_the_check_itself_sees_every_form_of_import(source: str, own: list[tuple[str, str]], others: set[str]) -> None:
    tree = ast.parse(source)
    assert sorted(own_imports(tree, "config.checks", KNOWN), key=str) == sorted((Imported(*item) for item in own), key=str)
    assert other_imports(tree) == others


def test_the_check_itself_sees_circles_and_floors() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert floors({"a": {"b"}, "b": {"c"}, "c": set()}) == [["c"], ["b"], ["a"]]
    assert set(circle({"a": {"b"}, "b": {"a"}})) == {"a", "b"}
