"""The contract tests as a table: layer kind × behaviour.

    python tests/benchmarks/contract_matrix.py

Runs tests/tuner/test_peft_conformance.py and counts passed cases (over all variants of a behaviour: load routes, base dropped
or kept, dtypes). Behaviours that need a whole transformers model are listed below the table with their counts.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

KINDS = ["Linear", "Linear with bias", "Conv1D", "Conv2d", "Embedding"]


def main() -> None:
    """Run the tests and print the table."""
    suite = Path(__file__).parents[1] / "tuner" / "test_peft_conformance.py"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run([sys.executable, "-m", "pytest", "-q", str(suite), f"--junit-xml={report}"], stdout=subprocess.DEVNULL)
        cases = ElementTree.parse(report).iter("testcase")
        table: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
        for case in cases:
            name, _, variant = case.attrib["name"].partition("[")
            parts = variant.rstrip("]").split("-")
            kind = next((k for k in KINDS if k in parts), "models")
            cell = table[name.removeprefix("test_").replace("_", " ")][kind]
            cell[0] += not any(child.tag in ("failure", "error") for child in case)
            cell[1] += 1
    print("| behaviour | " + " | ".join([*KINDS, "models"]) + " |\n|" + " --- |" * (len(KINDS) + 2))
    for behaviour, row in table.items():
        cells = [f"{row[k][0]}/{row[k][1]}" if k in row else "" for k in [*KINDS, "models"]]
        print(f"| {behaviour} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
