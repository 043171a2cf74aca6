"""Damaged files given to every loader, and what comes of it.

    python tests/benchmarks/fuzz_files.py --count 6000 --seed 0

Each file is damaged at random: bytes, values and types of JSON, nesting, names, shapes and dtypes of tensors, truncation. A
loader must refuse it with `ValueError`, `TypeError` or `OSError` that names the file, load what computes as before, or warn.
Numbers within tensors are left alone, since no loader can tell one weight from another, but for NaN and inf; of files that hold
their own digests any bytes are damaged, and a warning does not excuse another result. Errors that PEFT, transformers or
safetensors raise before they ask this package are counted by themselves, and so is what becomes of self-contained checkpoints,
which are read without this package; it is printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # for copies of the code of self-contained checkpoints
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
import typer
import yaml
from peft import PeftConfig, PeftModel
from safetensors.torch import load, save
from support.healing import small as factorized
from support.healing import stacked, trainer
from support.models import llama
from support.narrow import narrowed
from torch import Tensor
from transformers import AutoModelForCausalLM

import reparam_peft
from reparam_peft import Plan, Record, ReparamConfig, SearchResult, Statistics, calibrate, compress, plan
from reparam_peft.cli import app as command_line
from reparam_peft.healing.teacher_cache import TeacherCache
from reparam_peft.report.record import read_record
from reparam_peft.runtime.files import LOCK
from reparam_peft.runtime.json_files import read_json
from reparam_peft.standalone.self_contained import save_self_contained

PACKAGE = str(Path(reparam_peft.__file__).parent)
TOKENS = torch.arange(3, 27).view(2, 12)
SECONDS = 20
ODD = [None, True, False, -1, 0, 1, 1.5, 2**62, 2**70, 10**400, 1e308, float("nan"), "", "x", "\x1b[2J", "([a-z.]+)+!", [], {}]
ODD += ["/etc/passwd", "../..", [1], ["a"], {"a": 1}, [[[]]], "9" * 5000]
KINDS = ("wrong type", "unnamed", "silently wrong", "hang")


class Hang(BaseException):
    """Time is up."""


@dataclass
class Loader:
    """Files, and what reads them: it gives numbers to be compared, or None.

    `digests` says whether the files hold their own, and `foreign` whether others than this package read them.
    """

    files: dict[str, bytes]
    load: Callable[[Path], Tensor | None]
    damaged: list[str]
    share: int = 1
    digests: bool = False
    foreign: bool = False


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(TOKENS).logits.float()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def loaders(folder: Path) -> dict[str, Loader]:
    """Every loader with whole files, made anew."""
    config = ReparamConfig(target_modules="all-linear", keep=0.6)
    batches = [{"input_ids": TOKENS}]
    statistics = calibrate(llama(), config, batches, progress=False)
    made = plan(llama(), config, statistics, progress=False)
    small = compress(llama(), config, statistics, plan=made, progress=False)
    compress(llama(), config, batches, refine=True, run_folder=folder / "run", progress=False)
    small.save_pretrained(folder / "adapter")
    small.to_standalone().save_pretrained(folder / "standalone")
    fewer_neurons = narrowed(llama())
    fewer_neurons.save_pretrained(folder / "narrow")
    fewer_neurons.to_standalone().save_pretrained(folder / "narrow-standalone")
    found = reparam_peft.search(
        llama(), config, statistics, evaluation=batches, tolerance="90%", max_trials=2, build=False, progress=False
    )
    (folder / "files").mkdir()
    made.save(folder / "files" / "plan.json")
    statistics.save(folder / "files" / "statistics.safetensors")
    (folder / "files" / "search.json").write_text(json.dumps(found.to_dict()))
    Record.of(small, plan=made, search=found, evaluation={"perplexity": 2.0}).save(folder / "files" / "record.json")
    files, adapter = contents(folder / "files"), contents(folder / "adapter")
    settings = b"keep: 0.5\ntarget-modules: [q_proj, k_proj]\nseed: 3\nlength: 64\njson: true\n"
    command = typer.main.get_command(command_line.app).commands["plan"]

    def read_plan(at: Path) -> None:
        loaded = Plan.load(at / "plan.json")
        print(loaded, loaded.to_dict(), loaded._repr_html_(), [m.effective_rank for m in loaded.resistant()])

    def read_statistics(at: Path) -> None:
        loaded = Statistics.load(at / "statistics.safetensors")
        for name in loaded.outputs:
            loaded.moments(name, centred=False), loaded.fisher(name), loaded.loss_scale(name), loaded.weighted_gram(name)
        loaded.save(at / "again")

    def read_search(at: Path) -> None:
        path = at / "search.json"
        parts = read_json(path)
        try:
            loaded = SearchResult.from_dict(parts)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        print(loaded, loaded.front, loaded._repr_html_())

    def show(record: Record | None, at: Path) -> None:
        if record is not None:
            print(record.predictions, record.excess_loss, record.plan)
            record.save(at / "again")

    def read_settings(at: Path) -> None:
        with command.make_context("plan", ["--config", str(at / "settings.yaml"), "MODEL"]):
            pass

    def load_adapter(at: Path) -> Tensor:
        model = PeftModel.from_pretrained(llama(), whole, adapter_name="first")
        model.load_adapter(str(at), adapter_name="other")
        model.set_adapter("other")
        return logits(model)

    rows = [{"input_ids": row} for row in TOKENS]
    options = {"rows": rows, "max_steps": 2, "per_device_train_batch_size": 2}
    healing = trainer(folder / "healing", factorized(), save_strategy="steps", save_steps=1, **options)
    healing.train()
    cached = trainer(folder, factorized(), rows, teacher_cache=folder / "cache", top_k=8)
    cached.model.eval()
    cached.compute_loss(cached.model, stacked(rows))
    saved_row = min((folder / "cache").iterdir()).name
    compress(llama(), config, batches, sequential=True, run_folder=folder / "sequential", progress=False)
    save_self_contained(small.to_standalone(), folder / "self-contained")

    def teach(at: Path) -> Tensor:
        cached.cache = TeacherCache(at, cached.cache.top_k, cached.cache.teacher)
        return cached.compute_loss(cached.model, stacked(rows)).detach()

    def heal(at: Path) -> Tensor:
        made = trainer(folder / "again", factorized(), **options)
        made.train(resume_from_checkpoint=str(at / "checkpoint-2"))
        return logits(made.model)

    def go_on(at: Path) -> Tensor:
        return logits(compress(llama(), config, batches, sequential=True, run_folder=at, progress=False))

    def read_by_its_own_code(at: Path) -> Tensor:
        model, told = AutoModelForCausalLM.from_pretrained(at, trust_remote_code=True, output_loading_info=True)
        if any(told.values()):
            warnings.warn(f"{at}: { {key: sorted(names)[:1] for key, names in told.items() if names} }", stacklevel=2)
        return logits(model)

    whole = folder / "adapter"
    both = ["adapter_config.json", "adapter_model.safetensors"]
    plain = {name: data for name, data in adapter.items() if name != "README.md"}
    narrow = {name: data for name, data in contents(folder / "narrow").items() if name != "README.md"}
    standalone = contents(folder / "standalone")
    checkpoints, run = contents(folder / "healing"), contents(folder / "sequential")
    parts = [name for name in checkpoints if name.startswith("checkpoint-2/")]
    return {
        "plan": Loader(files, read_plan, ["plan.json"], 6),
        "statistics": Loader(files, read_statistics, ["statistics.safetensors"], 6),
        "search": Loader(files, read_search, ["search.json"], 4),
        "record": Loader(files, lambda at: show(Record.load(at / "record.json"), at), ["record.json"], 6),
        "run folder": Loader(
            contents(folder / "run"), lambda at: show(read_record(at), at), ["run.json", "plan.json", "log.jsonl"], 6
        ),
        "settings": Loader({"settings.yaml": settings}, read_settings, ["settings.yaml"], 6),
        "adapter's config": Loader(
            plain, lambda at: print(PeftConfig.from_pretrained(at), ReparamConfig.from_pretrained(at)), both, 6
        ),
        "adapter": Loader(plain, lambda at: logits(PeftModel.from_pretrained(llama(), at)), both, 4),
        "fewer neurons": Loader(narrow, lambda at: logits(PeftModel.from_pretrained(llama(), at)), both, 2),
        "load_adapter": Loader(plain, load_adapter, both, 2),
        "standalone": Loader(
            standalone, lambda at: logits(AutoModelForCausalLM.from_pretrained(at)), ["config.json", "model.safetensors"], 4
        ),
        "narrow standalone": Loader(
            contents(folder / "narrow-standalone"),
            lambda at: logits(AutoModelForCausalLM.from_pretrained(at)),
            ["config.json", "model.safetensors"],
            2,
        ),
        "self-contained": Loader(
            contents(folder / "self-contained"), read_by_its_own_code, ["config.json", "model.safetensors"], 2, foreign=True
        ),
        "teacher cache": Loader(contents(folder / "cache"), teach, [saved_row], 4, digests=True),
        "healing": Loader(checkpoints, heal, [*parts, *["checkpoint-2/healing.json"] * len(parts)], 2, digests=True),
        "resumed run": Loader(run, go_on, [name for name in run if name != LOCK], 2, digests=True),
    }


def damage_bytes(data: bytes, dice: random.Random, limit: int | None = None) -> bytes:
    """Some bytes, up to a limit, flipped, taken out or put in, or the end cut off."""
    place, length = dice.randrange((limit or len(data)) or 1), dice.choice((1, 1, 2, 8))
    odd = (b"\xff\xfe", b"\x00", b"[" * 5000, b"&a *a", b"!!python/object:os.system x", b"1" * 5000)
    junk = dice.choice((dice.randbytes(length), *odd))
    return dice.choice(
        (
            lambda: data[:place] + dice.randbytes(length) + data[place + length :],
            lambda: data[:place] + data[place + length :],
            lambda: data[:place] + junk + data[place:],
            lambda: data[: dice.randrange(len(data) + 1)],
            lambda: dice.choice((b"", b"{}", b"[]", b"null", b"\xff" * 9, b"[" * 100_000)),
        )
    )()


def damage_json(value: Any, dice: random.Random) -> Any:
    """One value, anywhere within, replaced, taken out, renamed or nested."""
    if not isinstance(value, (dict, list)) or not value or dice.random() < 0.12:
        deep: Any = value
        for _ in range(dice.choice((1, 50, 400))):
            deep = [deep] if dice.random() < 0.5 else {"a": deep}
        return dice.choice((dice.choice(ODD), deep))
    if isinstance(value, list):
        place = dice.randrange(len(value))
        return [*value[:place], *([] if dice.random() < 0.1 else [damage_json(value[place], dice)]), *value[place + 1 :]]
    key = dice.choice(sorted(value))
    rest = {name: item for name, item in value.items() if name != key}
    if dice.random() < 0.15:
        return dice.choice((rest, {**rest, str(dice.choice(ODD))[:20]: value[key]}))
    return {**value, key: damage_json(value[key], dice)}


def damage_tensors(data: bytes, dice: random.Random) -> bytes:
    """One tensor of a safetensors file renamed, taken out, reshaped, of another dtype or not finite; or its header damaged."""
    size = struct.unpack("<Q", data[:8])[0]
    if dice.random() < 0.4:
        header = json.loads(data[8 : 8 + size])
        if dice.random() < 0.5 and "statistics" in header.get("__metadata__", {}):
            inner = damage_json(json.loads(header["__metadata__"]["statistics"]), dice)
            header["__metadata__"]["statistics"] = json.dumps(inner)
        else:
            header = damage_json(header, dice)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]
    if dice.random() < 0.3:
        return damage_bytes(data, dice, limit=8 + size)[: dice.choice((len(data), 8 + size, len(data) - 1, 10**9))]
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__")
    tensors = load(data)
    name = dice.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = dice.randrange(7)
    if kind == 1:
        tensors[name + dice.choice(("x", "/", ".weight"))] = tensor
    elif kind == 2:
        tensors[name] = tensor.flatten()
    elif kind == 3:
        tensors[name] = tensor[:-1].clone()
    elif kind == 4:
        filling = dice.choice((float("nan"), float("inf")))
        tensors[name] = torch.full_like(tensor, filling) if tensor.is_floating_point() else tensor
    elif kind == 5:
        tensors[name] = tensor.to(dice.choice((torch.int32, torch.bool, torch.float64)))
    elif kind == 6:
        tensors[name] = tensor.new_zeros((0, *tensor.shape[1:]))
    return save(tensors, metadata)


def damage(name: str, data: bytes, dice: random.Random, digests: bool = False) -> bytes:
    if (digests and dice.random() < 0.3) or name.endswith((".pt", ".pth", ".bin")):
        return damage_bytes(data, dice)
    if name.endswith(".safetensors"):
        return damage_tensors(data, dice)
    if name == "config.json":  # of which one part is read here, and the rest is transformers'
        fields = json.loads(data)
        (part,) = {"quantization_config", "reparam_layers"} & fields.keys()
        return json.dumps({**fields, part: damage_json(fields[part], dice)}).encode()
    if name.endswith(".json") and dice.random() < 0.7:
        return json.dumps(damage_json(json.loads(data), dice)).encode()
    if name.endswith(".jsonl") and dice.random() < 0.7:
        first, *rest = data.splitlines()
        return b"\n".join([json.dumps(damage_json(json.loads(first), dice)).encode(), *rest])
    if name.endswith(".yaml") and dice.random() < 0.7:
        return json.dumps(damage_json(yaml.safe_load(data), dice)).encode()  # which is YAML, too
    return damage_bytes(data, dice)


def judge(loader: Loader, at: Path, name: str, expected: Tensor | None) -> tuple[str, str]:
    """What becomes of a damaged file: a kind of outcome, and what is to be said of it."""

    def ring(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            got = loader.load(at)
    except Hang:
        return "hang", ""
    except BaseException as error:
        signal.alarm(0)
        message = getattr(error, "message", None) or str(error)
        ours = any(PACKAGE in frame.filename for frame in traceback.extract_tb(error.__traceback__))
        told = f"{type(error).__name__}: {message[:150]}"
        if not isinstance(error, (ValueError, TypeError, OSError, command_line.CliError, typer.BadParameter)):
            return ("wrong type" if ours else "foreign"), told
        named = any(part in message for part in (name, at.name, "config.json", "checkpoint"))
        told = f"{told} (named: {named})" if loader.foreign else told
        return "refused" if named else "unnamed" if ours else "foreign", told
    finally:
        signal.alarm(0)
    warned = next((str(one.message) for one in given if at.name in str(one.message)), None)
    same = expected is None or got is None or torch.allclose(got, expected, atol=1e-3, equal_nan=False)
    if not same and (warned is None or loader.digests):
        return "silently wrong", f"numbers differ by {(got - expected).abs().max().item():.2g}"
    return "loaded" if warned is None else "warned", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one loader")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    dice = random.Random(arguments.seed)
    out, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115  what loaded objects print is not to be read
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        every = loaders(folder)
        chosen = {name: loader for name, loader in every.items() if arguments.only in (None, name)}
        expected = {}
        for name, loader in chosen.items():
            at = folder / f"whole {name}"
            write(at, loader.files)
            expected[name] = loader.load(at)
        total = sum(loader.share for loader in chosen.values())
        counts: dict[str, Counter[str]] = {name: Counter() for name in chosen}
        for name, loader in chosen.items():
            for number in range(-(-arguments.count * loader.share // total)):
                at = folder / f"damaged-{name.replace(' ', '-')}"
                write(at, loader.files)
                file = dice.choice(loader.damaged)
                data = damage(file, loader.files[file], dice, loader.digests)
                (at / file).write_bytes(data)
                kind, told = ("unchanged", "")
                if data != loader.files[file]:
                    kind, told = judge(loader, at, file, expected[name])
                if loader.foreign and kind in (*KINDS, "refused", "foreign"):
                    print(f"{name} {number}: {file}: {kind}: {told}", file=sys.stderr)
                    kind = "foreign"
                counts[name][kind] += 1
                if kind in KINDS:
                    print(f"{name} {number}: {file}: {kind}: {told}", file=sys.stderr)
    shutil.rmtree(os.environ["HF_MODULES_CACHE"])
    sys.stdout = out
    kinds = ("refused", "loaded", "warned", "unchanged", "foreign", *KINDS)
    print("loader".ljust(18), *(kind.rjust(15) for kind in kinds))
    for name, count in {**counts, "total": sum(counts.values(), Counter())}.items():
        print(name.ljust(18), *(str(count[kind]).rjust(15) for kind in kinds))
    sys.exit(any(count[kind] for count in counts.values() for kind in KINDS))


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
