"""Options and help of the commands need neither PyTorch nor PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import reparam_peft

# Every help, and what a Tab asks for; then which modules that took.
SCRIPT = """
import json, os, sys
import typer.main
from reparam_peft_command import main
from reparam_peft.cli.app import app

def call(*words):
    sys.argv = ["reparam", *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words

call("--version")
call("--help")
for name in typer.main.get_command(app).commands:
    call(name, "--help")
os.environ |= {"_REPARAM_COMPLETE": "complete_bash", "COMP_WORDS": "reparam compress --ke", "COMP_CWORD": "2"}
call()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_help_and_completion_import_nothing_that_is_heavy_and_say_nothing_on_stderr() -> None:
    root = Path(reparam_peft.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    version, *lines, modules = done.stdout.splitlines()
    assert version == reparam_peft.__version__
    assert lines[-1] == "--keep"
    heavy = {"torch", "transformers", "peft", "datasets", "accelerate", "numpy", "huggingface_hub", "yaml"}
    assert heavy & set(json.loads(modules)) == set()
