"""What the metadata say of where the package is published; all else is in setup.cfg.

With `REPARAM_REPOSITORY=https://…/reparam_peft` in the environment a build has project URLs, and its description, which PyPI
shows by itself, has links into that repository in place of those that lead from one file of it to another.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import setup

repository = os.environ.get("REPARAM_REPOSITORY", "").rstrip("/")
published = {}
if repository:
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    pages = {"Source": "", "Documentation": "/blob/main/docs/index.md", "Changelog": "/blob/main/CHANGELOG.md"}
    published = {
        "url": repository,
        "project_urls": {**{name: repository + page for name, page in pages.items()}, "Issues": f"{repository}/issues"},
        "long_description": re.sub(r"\]\((?!https?:|#)", f"]({repository}/blob/main/", readme),
    }
setup(**published)
