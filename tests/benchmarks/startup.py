"""Processor seconds until `reparam` and `import reparam_peft` are there, with and without the packages of the extras.

    python tests/benchmarks/startup.py [--checkout .] [--repeats 5] [--commands compress,export]

Seconds are those of the process, user and system, and the median of the repeats; all start in turn, so that a busy machine
slows all of them. `--checkout` names another checkout, which may be older than this script. `hf --help` is the command line of
huggingface_hub, which is made by the same library.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

EXTRAS = ("bitsandbytes", "gguf", "lm_eval", "matplotlib", "onnx", "onnxruntime", "onnxscript", "torchao")
COMMANDS = ("compress", "plan", "evaluate", "search", "heal", "report", "export", "run")
TAB = {"_REPARAM_COMPLETE": "complete_bash", "COMP_WORDS": "reparam compress --ke", "COMP_CWORD": "2"}
HF = "from huggingface_hub.cli.hf import main; main()"


def run(code: str, words: Sequence[str], environment: dict[str, str], extras: bool) -> tuple[float, int]:
    """Processor seconds of Python with some code, and lines on stderr."""
    hidden = "" if extras else f"sys.modules.update(dict.fromkeys({EXTRAS}))\n"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", f"import sys\nsys.argv[0] = 'reparam'\n{hidden}{code}", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, len(done.stderr.splitlines())


def main() -> None:
    """Print one row for each start."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    arguments = parser.parse_args()
    root = arguments.checkout.resolve()
    module = "reparam_peft_command" if (root / "reparam_peft_command.py").exists() else "reparam_peft.cli.app"
    reparam = f"from {module} import main; main()"
    plain = {**os.environ, "PYTHONPATH": str(root)}
    starts: dict[str, tuple[str, list[str], dict[str, str]]] = {
        "`import peft`": ("import peft", [], plain),
        "`import reparam_peft`": ("import reparam_peft", [], plain),
        "`reparam --version`": (reparam, ["--version"], plain),
        "`reparam --help`": (reparam, ["--help"], plain),
        **{f"`reparam {name} --help`": (reparam, [name, "--help"], plain) for name in arguments.commands.split(",")},
        "one Tab of completion": (reparam, [], plain | TAB),
        "`hf --help`": (HF, ["--help"], plain),
    }
    results: dict[tuple[str, bool], list[tuple[float, int]]] = {}
    for _ in range(arguments.repeats):
        for name, start in starts.items():
            for extras in (False, True):
                results.setdefault((name, extras), []).append(run(*start, extras))
    print(f"{root}, Python {sys.version.split()[0]}, median of {arguments.repeats}")
    print("| | without extras, s | with extras, s | lines on stderr |")
    print("| --- | --- | --- | --- |")
    for name in starts:
        seconds = [statistics.median(second for second, _ in results[name, extras]) for extras in (False, True)]
        print(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {max(lines for _, lines in results[name, True])} |")


if __name__ == "__main__":
    main()
