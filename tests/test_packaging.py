"""What the built package says of itself, which depends on where it is published."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def metadata(monkeypatch: pytest.MonkeyPatch, repository: str) -> Any:
    """What setup.py and setup.cfg give."""
    import_module("setuptools")  # which brings distutils along
    run_setup = import_module("distutils.core").run_setup
    monkeypatch.setenv("REPARAM_REPOSITORY", repository)
    monkeypatch.chdir(ROOT)
    return run_setup("setup.py", stop_after="config").metadata


def test_links_lead_to_the_repository_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    built = metadata(monkeypatch, "https://example.org/some/where/")
    assert built.project_urls["Source"] == built.url == "https://example.org/some/where"
    links = re.findall(r"\]\(([^)#]+)", built.long_description)
    assert len(links) > 10
    for link in links:
        inside = link.removeprefix("https://example.org/some/where/blob/main/")
        assert link.startswith("https://")
        assert inside == link or (ROOT / inside).exists()


def test_without_a_repository_the_description_is_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    built = metadata(monkeypatch, "")
    assert not built.project_urls
    assert built.long_description == (ROOT / "README.md").read_text(encoding="utf-8")
