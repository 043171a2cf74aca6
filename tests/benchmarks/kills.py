"""Kill long operations before each file operation, or fill the disk there, run them again, and compare with undisturbed runs.

    python tests/benchmarks/kills.py                     # all operations, at most 10 places in each
    python tests/benchmarks/kills.py heal search --most 1000

Each run is a forked process. An audit hook sees what it does to files within a temporary folder (opening for writing, making
folders, renaming, deleting, changing permissions), and before one of these it ends the process as `kill -9` does, or lets that
and all that follow fail as on a full disk. What libraries write in their own code, without Python, is seen before and after.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.batches import text
from support.healing import trainer
from support.models import llama

from reparam_peft import (
    Plan,
    Record,
    Refinement,
    ReparamConfig,
    Statistics,
    calibrate,
    compress,
    compress_checkpoint,
    plan,
    search,
    write_report,
)
from reparam_peft.runtime.files import is_ours

CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "shutil.rmtree",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
}
TAKE_SPACE = {"open", "os.mkdir", "os.rename", "os.link", "os.symlink"}
KILLED, FULL, WRONG = 137, 28, 1
TEXT = [text([12, 12], 12, seed=seed) for seed in range(2)]


def config(**options: Any) -> ReparamConfig:
    return ReparamConfig(**{"target_modules": "all-linear", "keep": 0.6, **options})


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digest_of_files(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(map(is_ours, path.parents)):  # what is left unfinished, for an hour at most
            total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def sequential(folder: Path) -> str:
    options = {"run_folder": folder / "run", "offload_folder": folder / "offload", "progress": False}
    return digest(compress(llama(), config(), TEXT, sequential=True, **options).state_dict())


def refine(folder: Path) -> str:
    refinement = Refinement(epochs=1, batch_size=2, autocast=None)
    small = compress(llama(), config(), TEXT, refine=refinement, run_folder=folder / "run", progress=False)
    return digest(small.state_dict())


def searched(folder: Path) -> str:
    options = {"evaluation": TEXT, "keeps": [0.4, 0.6, 0.8], "tolerance": "50%", "run_folder": folder / "run"}
    result = search(llama(), ReparamConfig(target_modules="all-linear"), TEXT, **options, build=False, progress=False)
    return repr([(trial.keep, trial.metric, trial.within) for trial in result.trials])


def heal(folder: Path) -> str:
    steps = folder / "steps"
    made = trainer(steps, save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=1, teacher_cache=folder / "cache")
    from reparam_peft.healing.checkpoints import last_whole

    made.train(resume_from_checkpoint=last_whole(steps, made.identity))
    return digest(dict(made.student.named_parameters()))


def checkpoint(folder: Path) -> str:
    source = folder.parent / "source"
    if not source.exists():
        llama().save_pretrained(source)
    with suppress(FileExistsError):  # it was killed when all was done
        compress_checkpoint(source, folder / "small", config(), TEXT, progress=False)
    return digest_of_files(folder / "small")


def saved(folder: Path) -> str:
    """Plan, statistics, record and report, the first three over earlier ones; each that is there can be loaded at any time."""
    loaders = {"plan.json": Plan.load, "statistics": Statistics.load, "record.json": Record.load}
    for statistics, made in earlier_and_later():
        for name, load in loaders.items():
            if (folder / name).exists():
                load(folder / name)
        made.save(folder / "plan.json")
        statistics.save(folder / "statistics")
        Record(made).save(folder / "record.json")
    write_report(Record(made), folder / "report")
    whole = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in loaders]
    return " ".join([digest_of_files(folder / "report"), *whole])


@cache
def earlier_and_later() -> list[tuple[Statistics, Plan]]:
    """Statistics and plans of two runs, which the processes that are forked share."""
    parts = [calibrate(llama(), config(), TEXT[:count], progress=False) for count in (1, 2)]
    return [(statistics, plan(llama(), config(), statistics, progress=False)) for statistics in parts]


OPERATIONS: dict[str, Callable[[Path], str]] = {
    "sequential": sequential,
    "refine": refine,
    "search": searched,
    "heal": heal,
    "checkpoint": checkpoint,
    "saved": saved,
}


def is_change(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an event of the audit hook is about to change a file within the folder."""
    if event == "open":
        path, _, flags = arguments
        wanted = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        path, wanted = (arguments or (None,))[0], event in CHANGES
    return wanted and isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(folder)


def run(operation: Callable[[Path], str], folder: Path, place: int | None = None, full: bool = False) -> tuple[int, str, int]:
    """Run an operation in a forked process, disturbed at a place.

    Returns:
        The exit status; the digest of the result, or the error; and how many places there were.
    """
    reading, telling = os.pipe()
    if (child := os.fork()) == 0:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if is_change(event, arguments, str(folder)):
                count += 1
                if place is not None and count == place and not full:
                    os._exit(KILLED)
                if place is not None and count >= place and full and event in TAKE_SPACE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        sys.addaudithook(hook)
        status = 0
        try:
            said = operation(folder)
        except OSError as error:
            status, said = (FULL, str(error)) if full else (WRONG, repr(error))
        except BaseException as error:
            status, said = WRONG, repr(error)
        os.write(telling, f"{count} {said[:3000]}".encode())
        os._exit(status)
    os.close(telling)
    with os.fdopen(reading, "rb") as told:
        message = told.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    places, _, said = message.partition(" ")
    return status, said, int(places or 0)


def litter(folder: Path) -> list[str]:
    """What is left unfinished in folders that a run works in alone."""
    return [
        str(path) for path in folder.rglob("*.unfinished") if path.parent != folder and path.parent.name in ("run", "steps")
    ]


def attack(name: str, root: Path, most: int, rng: random.Random) -> list[str]:
    """Disturb an operation at up to so many places, in both ways; returns what has failed."""
    operation, failures = OPERATIONS[name], []
    (root / "undisturbed").mkdir()
    status, expected, places = run(operation, root / "undisturbed")
    if status:
        return [f"{name}, undisturbed: {expected}"]
    chosen = sorted(rng.sample(range(1, places + 1), min(most, places)))
    for full in (False, True):
        for place in chosen:
            folder = root / f"{'full' if full else 'kill'}-{place}"
            folder.mkdir()
            where = f"{name}, {'disk full' if full else 'killed'} before file operation {place} of {places}"
            status, said, _ = run(operation, folder, place, full)
            if status not in ((0, FULL) if full else (0, KILLED)):
                failures.append(f"{where}: {said}")
            elif status == FULL and str(folder) not in said:
                failures.append(f"{where}: no file is named: {said}")
            status, said, _ = run(operation, folder)
            if status or said != expected:
                failures.append(f"{where}, then run again: {said if status else 'another result'}")
            failures += [f"{where}: {path} is left" for path in litter(folder)]
            shutil.rmtree(folder)
    print(f"{name}: {places} file operations, {2 * len(chosen)} disturbed runs, {len(failures)} failures", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", default=list(OPERATIONS), help=", ".join(OPERATIONS))
    parser.add_argument("--most", type=int, default=10, help="places at which each operation is disturbed in each way")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of places")
    options = parser.parse_args()
    earlier_and_later()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng, failures = random.Random(options.seed), []
    for name in options.operations:
        with tempfile.TemporaryDirectory() as root:
            failures += attack(name, Path(root).resolve(), options.most, rng)
    print(*failures, f"{len(failures)} failures", sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
