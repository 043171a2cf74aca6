"""What is built for the place where the package is published."""

from __future__ import annotations

import configparser
import re
import runpy
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/some/where"


def test_urls_and_links_lead_to_the_repository_that_is_named(tmp_path: Path) -> None:
    for name in ("setup.cfg", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    runpy.run_path(str(ROOT / ".ci" / "build.py"))["publish"](tmp_path, f"{ADDRESS}/")
    before, after = configparser.ConfigParser(), configparser.ConfigParser()
    before.read(ROOT / "setup.cfg", encoding="utf-8")
    after.read(tmp_path / "setup.cfg", encoding="utf-8")
    assert after["metadata"].pop("url") == ADDRESS
    urls = dict(line.split(" = ") for line in after["metadata"].pop("project_urls").strip().splitlines())
    assert urls["Source"] == ADDRESS
    assert after == before

    links = re.findall(r"\]\(([^)#]+)", (tmp_path / "README.md").read_text(encoding="utf-8"))
    inside = [link.removeprefix(f"{ADDRESS}/blob/main/") for link in links]
    assert all(link.startswith("https://") for link in links)
    assert [link for link in inside if not link.startswith("https://")]
    assert all(link.startswith("https://") or (ROOT / link).exists() for link in inside)
