"""The versions of other libraries that setup.cfg asks for, those that are tried, and what the documents say of them."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from reparam_peft.runtime.hosts import NEWEST_TRIED

ROOT = Path(__file__).parents[1]
LOWEST = ROOT / ".ci" / "lowest.txt"
HOSTS = ("transformers", "peft", "torchao", "bitsandbytes")  # whose private names, or whose newest functions, are in use


@pytest.fixture(scope="module")
def required() -> dict[str, Requirement]:
    """What setup.cfg asks for: the package's requirements, and those of its quantisation."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup["options"]["install_requires"] + setup["options.extras_require"]["quantization"]
    requirements = [Requirement(line) for line in lines.split("\n") if line.strip()]
    return {requirement.name: requirement for requirement in requirements}


def bounds(requirement: Requirement) -> dict[str, Version]:
    return {each.operator: Version(each.version) for each in requirement.specifier}


def test_the_lowest_pins_are_the_lower_bounds(required: dict[str, Requirement]) -> None:
    pins = {requirement.name: requirement for requirement in map(Requirement, LOWEST.read_text(encoding="utf-8").split())}
    # PyTorch's builds for a CPU of that age are not on PyPI; the workflow tries them.
    assert pins.keys() == required.keys() - {"torch"}
    for name, pin in pins.items():
        assert bounds(pin) == {"==": bounds(required[name])[">="]}, f"{name}: .ci/lowest.txt and setup.cfg differ"


@pytest.mark.parametrize("name", HOSTS)
def test_versions_are_bounded_by_the_next_major_one(name: str, required: dict[str, Requirement]) -> None:
    lowest = bounds(required[name])
    assert lowest.keys() == {">=", "<"}
    assert lowest["<"] == Version(str(lowest[">="].major + 1))


def test_the_newest_that_were_tried_are_allowed(required: dict[str, Requirement]) -> None:
    for name, version in NEWEST_TRIED.items():
        assert required[name].specifier.contains(version)


def test_documents_say_what_setup_says(required: dict[str, Requirement]) -> None:
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| ≥ ([\d.]+) \|", page, re.MULTILINE))
    assert rows == {name: str(bounds(required[name])[">="]) for name in ("torch", *HOSTS)}
    for name, version in NEWEST_TRIED.items():
        assert re.search(rf"^\|.*\b{re.escape(version)}", page, re.MULTILINE), f"{name} {version} is missing in the table"
