"""Run PEFT's own test suite for custom models against `ReparamConfig`.

    python tests/run_peft_suite.py [pytest arguments]

Downloads the source distribution of the installed PEFT (its tests are not in the wheel), puts our cases in the place of
its own, and runs them. Exits with pytest's code. Needs a package index, diffusers and parameterized.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# One line per model of PEFT's suite and set of targets; each runs at full rank with the base kept (identity at the start,
# as PEFT's tests of disabling and unloading assume) and at a low rank with the base dropped.
MODELS = [
    ("MLP", ["lin0"]),
    ("MLP", ["lin0", "lin1"]),
    ("MLP", r".*lin0"),
    ("EmbConv1D", ["emb"]),
    ("EmbConv1D", ["emb", "conv1d"]),
    ("Conv2d", ["conv2d"]),
    ("Conv2d", ["conv2d", "lin0"]),
    ("Conv2d2", ["conv2d"]),
    ("Conv2d1x1", ["conv2d"]),
]
CASES = """
import reparam_peft
from reparam_peft import ReparamConfig
def _cases(models):
    for number, (model, targets) in enumerate(models):
        ranks = {"MLP": 1, "DeepMLP": 2}.get(model, 1)
        for name, kwargs in (("kept", {"r": "full", "keep_base": True}), ("dropped", {"r": ranks})):
            yield f"{model} {number} {name}", model, ReparamConfig, {"target_modules": targets, **kwargs}
TEST_CASES = list(_cases(MODELS))
_same = {"target_modules": ["lin0"], "init_weights": False, "r": "full", "keep_base": True}
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    ("Reparam Same", "reparam", ReparamConfig, _same, _same),
    ("Reparam Different", "reparam", ReparamConfig, _same, {**_same, "target_modules": ["lin1"]}),
]
"""


def main() -> int:
    """Fetch, patch, run."""
    version = importlib.metadata.version("peft")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*command, f"peft=={version}"], check=True)
        with tarfile.open(Path(folder, f"peft-{version}.tar.gz")) as archive:
            archive.extractall(folder, filter="data")
        tests = Path(folder, f"peft-{version}", "tests")
        (tests / "__init__.py").touch()
        (tests / "reparam_cases.py").write_text(f"MODELS = {MODELS!r}\n{CASES}")
        suite = tests / "test_custom_models.py"
        text = suite.read_text()
        for name in ("TEST_CASES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"):
            ours = f"from tests.reparam_cases import {name}\n_UPSTREAM_{name} = ["
            text, replaced = re.subn(rf"^{name} = \[", ours, text, flags=re.MULTILINE)
            assert replaced == 1, f"PEFT {version} no longer defines {name}"
        suite.write_text(text)
        selected = ["-k", "reparam or kept or dropped", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
        arguments = [sys.executable, "-m", "pytest", "tests/test_custom_models.py", *selected, *sys.argv[1:]]
        return subprocess.run(arguments, cwd=tests.parent, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
