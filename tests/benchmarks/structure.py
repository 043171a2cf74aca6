"""Print how a checkout is built: folders, files, import floors and circles; of any version, to compare before and after.

    python tests/benchmarks/structure.py [CHECKOUT/reparam_peft]

Imports under `TYPE_CHECKING` and inside of functions count. A circle is a group of files each of which reaches the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.structure import circle, floors, import_graph  # noqa: E402  the tests' own reading of imports


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which reaches all others of its group."""
    reached = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for other in graph.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        reached[start] = seen
    groups = {frozenset({a, *(b for b in reached[a] if a in reached.get(b, ()))}) for a in graph if a in reached[a]}
    return sorted(map(sorted, groups))


def main() -> None:
    """Print one line for each figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("package", type=Path, nargs="?", default=ROOT / "reparam_peft")
    package = parser.parse_args().package
    graph = import_graph(package)
    folders = sorted({path.parent for path in package.rglob("*.py")} - {package})
    files = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    lines = {path.relative_to(package).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    print(f"packages: {len(folders)}")
    print(f"files: {len(files)}, at most {max(map(len, _by_folder(files).values()))} in one folder")
    print(f"lines: {sum(lines.values())}, the longest {max(lines, key=lines.get)} with {max(lines.values())}")
    tangled = circles(graph)
    print(f"import circles: {len(tangled)}" + "".join(f"\n  {len(group)} files: {', '.join(group)}" for group in tangled))
    if not circle(graph):
        print(f"import floors of files: {len(floors(graph))}")
    rooms = {}
    for module, imported in graph.items():
        room = module.split(".")[0]
        rooms.setdefault(room, set()).update({other.split(".")[0] for other in imported} - {room})
    if folders and not circle(rooms):
        for level, names in enumerate(floors(rooms), start=1):
            print(f"level {level}: {', '.join(names)}")


def _by_folder(files: list[Path]) -> dict[Path, list[Path]]:
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    return folders


if __name__ == "__main__":
    main()
