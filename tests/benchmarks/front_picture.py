"""The picture of docs/choosing.md: excess loss over bytes, of the figures that `front.py` has measured.

    python tests/benchmarks/front_picture.py FIGURES PICTURE [--test wiki_test] [--label "1 − cosine"]

FIGURES is `figures.json` of `front.py --folder`; PICTURE an SVG or another file that matplotlib writes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    """Draw a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--test", help="which text; without it the first")
    parser.add_argument("--label", default="excess loss, nats per token", help="of what is lost")
    arguments = parser.parse_args()
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in json.loads(arguments.figures.read_text(encoding="utf-8")):
        tests = entry["tests"]
        excess = tests[arguments.test or next(iter(tests))][1]
        lines.setdefault(entry["method"].rpartition(" at ")[0] or entry["method"], []).append((entry["bytes"], excess))
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "front"}  # small, and the same each time
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=method)
    axes.set(xlabel="bytes of the targets over bfloat16", ylabel=arguments.label, yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(arguments.picture, metadata={"Date": None} if arguments.picture.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
