from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import reparam_peft
from reparam_peft.arguments import ReparamWarning
from reparam_peft.compression.loading import CompressingLoader
from reparam_peft.healing.trainer import HealingTrainer
from reparam_peft.registration import register
from reparam_peft.runtime import hosts as hosts
from reparam_peft.runtime.hosts import PRIVATE_NAMES, PrivateName, extend, names_that_went
from reparam_peft.tuner.layer import ReparamLayer
from reparam_peft.tuner.model import ReparamModel

PACKAGE = Path(reparam_peft.__file__).parent
PRIVATE = re.compile(r"_[a-zA-Z][a-zA-Z0-9_]*(?<!_)")
# Not names of another library: endings of names, and an attribute, of ours.
OWN = {"_bias", "_is_called", "_token_id"}


class Host:
    def method(self, x: int, *, y: int = 0) -> int:
        """Its own words."""
        return x + y

    @classmethod
    def made(cls, x: int) -> tuple[type, int]:
        return cls, x


def test_a_method_and_a_class_method_are_extended_once() -> None:
    for _ in range(2):
        extend(Host, "method", lambda original: lambda self, *args, **kwargs: 10 * original(self, *args, **kwargs))
        extend(Host, "made", lambda original: lambda cls, x: original(cls, x + 1))

    class Derived(Host):
        pass

    assert Derived().method(1, y=2) == 30
    assert Derived.made(1) == (Derived, 2)
    assert Host.method.__doc__ == "Its own words."


def test_private_names_of_other_libraries_are_there() -> None:
    went = names_that_went()
    assert not went, " ".join(went)


def test_private_names_in_use_are_listed() -> None:
    """Every private name that the package does not define itself stands in the table, with its reason."""
    trees = [
        ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py") if path.name != "modeling_reparam.py"
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    defined |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    listed = {private.name for private in PRIVATE_NAMES}
    used = set(filter(PRIVATE.fullmatch, (name for node in nodes for name in _names(node))))
    missing, idle = used - defined - listed - OWN, listed - used - defined
    assert not missing, "add them to PRIVATE_NAMES in runtime/hosts.py"
    assert not idle, "take them out of PRIVATE_NAMES in runtime/hosts.py"


def test_private_methods_that_are_overridden_are_listed() -> None:
    assert not _overridden() - {private.name for private in PRIVATE_NAMES}, "add them to PRIVATE_NAMES in runtime/hosts.py"


def _names(node: ast.AST) -> Iterator[str]:
    """Attributes, names that are imported with those of their modules, and texts, which `getattr` and `vars` take."""
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.ImportFrom):
        yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def _overridden() -> set[str]:
    """Private methods of other libraries in the place of which classes of the package have their own."""
    made = {one for cls in (ReparamModel, ReparamLayer, CompressingLoader, HealingTrainer) for one in cls.__mro__}
    own = {cls for cls in made if cls.__module__.startswith("reparam_peft.")}
    names = {name for cls in own for name in vars(cls) if PRIVATE.fullmatch(name)}
    return {name for name in names if any(name in vars(cls) for cls in made - own) and not name.startswith("_abc")}


def test_of_newer_libraries_what_went_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = PrivateName("peft:PeftModel", "_no_such_name", "an example")
    later = PrivateName("peft:PeftModel", "_no_such_name", "an example", since="99")
    monkeypatch.setattr(hosts, "PRIVATE_NAMES", (later, gone, PrivateName("peft.no_such_module", "_name", "another")))
    assert len(names_that_went()) == 2
    register()  # the libraries have been tried: nothing is looked for
    monkeypatch.setattr(hosts, "NEWEST_TRIED", {"peft": "0.1"})
    with pytest.warns(ReparamWarning, match=r"has no `_no_such_name` in peft.PeftModel any more.*: an example\."):
        register()
