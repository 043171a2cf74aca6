"""Other processes: of functions that run at once or are killed, and of scripts that know stock packages only."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch.multiprocessing import start_processes

# One server for each process of pytest imports the libraries, which takes longer than the tests; what it forks has no threads.
multiprocessing.set_forkserver_preload(["reparam_peft"])

STOCK_SERVER = """
import json, os, sys, traceback
import torch, transformers
from transformers import AutoModel, PreTrainedModel
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        errors = os.open(job["errors"], os.O_WRONLY | os.O_CREAT)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        sys.argv = ["script", *job["arguments"]]
        try:
            exec(job["code"], {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Ended(NamedTuple):
    """How a script ended: its exit status, and what it wrote."""

    returncode: int
    output: str


def run_in_processes(function: Callable[..., None], *args: Any, count: int = 2) -> None:
    """Call `function(rank, *args)` in each of so many processes, and wait; an error in one is raised here."""
    start_processes(function, args, nprocs=count, start_method="forkserver")


def started(function: Callable[..., None], *args: Any) -> BaseProcess:
    """A process of its own that calls `function(*args)`, to be killed or to be asked for its exit status."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    return process


def run_stock(code: str, *arguments: object) -> Ended:
    """Run a script, with arguments in `sys.argv`, in a process that has imported torch and transformers and nothing else."""
    with TemporaryDirectory() as folder:
        errors = Path(folder, "errors")
        server = _stock_server()
        assert server.stdin is not None
        assert server.stdout is not None
        job = {"code": code, "arguments": list(map(str, arguments)), "errors": str(errors)}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return Ended(int(server.stdout.readline()), errors.read_text(encoding="utf-8"))


@cache
def _stock_server() -> subprocess.Popen[str]:
    """The process that imports the libraries once and forks for each script; it ends with this one, whose pipe it reads."""
    command = [sys.executable, "-c", STOCK_SERVER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
