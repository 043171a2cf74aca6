"""Build the package for the place where it is published: `python .ci/build.py https://…/reparam_peft [FOLDER]`.

What is committed knows no address. In a copy of it setup.cfg gets the project's URLs, and the README, which PyPI shows by
itself, links into the repository in place of those that lead from one file of it to another; `python -m build` makes both
archives.
"""

from __future__ import annotations

import argparse
import configparser
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {"Source": "", "Documentation": "/blob/main/docs/index.md", "Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues"}


def main() -> None:
    """Build from what is committed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", help="the address where the package is published")
    parser.add_argument("folder", nargs="?", default="dist", help="for the archives")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as copied:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", copied], input=archive, check=True)
        publish(Path(copied), options.repository)
        subprocess.run([sys.executable, "-m", "build", "--outdir", options.folder, copied], check=True)


def publish(copied: Path, repository: str) -> None:
    """Write the address of the repository into a copy of the checkout."""
    address = repository.rstrip("/")
    setup = configparser.ConfigParser()
    setup.read(copied / "setup.cfg", encoding="utf-8")
    setup["metadata"]["url"] = address
    setup["metadata"]["project_urls"] = "".join(f"\n{name} = {address}{page}" for name, page in PAGES.items())
    with open(copied / "setup.cfg", "w", encoding="utf-8") as file:
        setup.write(file)
    readme = copied / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(re.sub(r"\]\((?!https?:|#)", f"]({address}/blob/main/", text), encoding="utf-8")


if __name__ == "__main__":
    main()
