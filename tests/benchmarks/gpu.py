"""Everything that is worth measuring on a GPU, in one run: speed, calibration, memory, several processes and devices.

    python tests/benchmarks/gpu.py [--sections speed large compiled experts calibration memory processes devices]
        [--model 2048x12] [--windows 16]
    python tests/benchmarks/gpu.py --device cpu --model 64x2 --layers 2 --windows 4 --repeats 1

The first line needs one GPU, and some minutes; the last two sections need two, and say so where there is one. The second line
tries the script itself without any: what needs two devices is left out. The model of all sections but the first is a Llama of
random weights, WIDTHxDEPTH, that is fed random tokens in windows of 512. What is printed:

- speed: prefill and decoding of whole models as ratios to the dense one, in bfloat16 and float16, as they are, and recorded as
  CUDA graphs (`models_speed.py`);
- large: the same of two blocks of Llama 3 70B in bfloat16, with a prompt of 2048 tokens and a batch of 64;
- compiled: the same in bfloat16 of models of two layers, compiled, with and without CUDA graphs;
- experts: layers of experts, one after the other and together, beside those of transformers (`expert_speed.py`);
- calibration: time of gathering statistics beside bare passes (`calibration.py`);
- memory: peak above the model and seconds of `compress`, without and with `max_memory`;
- processes: seconds of `compress` in one process and in two, a device each, and how far their products are apart;
- devices: the same for a model that `device_map="balanced"` splits over all devices.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from calibration import read, time_passes
from expert_speed import parser_of_options as parser_of_experts
from expert_speed import print_table as print_experts
from models_speed import parser_of_options as parser_of_models
from models_speed import print_tables
from safetensors.torch import load_file, save_file
from torch import Tensor

from reparam_peft import ReparamConfig, compress
from reparam_peft.tuner.selection import select_targets

CONFIG = {"target_modules": "all-linear", "keep": 0.8}
FEW = "64MiB"  # for statistics, on a model that is only to try the script
SECTIONS = ("speed", "large", "compiled", "experts", "calibration", "memory", "processes", "devices")


def main() -> None:
    """Print the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="2048x12", help="WIDTHxDEPTH")
    parser.add_argument("--layers", type=int, help="of the models whose speed is measured")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-memory", default="2GB", help="of the second row of the section on memory")
    parser.add_argument("--products", type=Path, help=argparse.SUPPRESS)  # where a worker of the section on processes writes
    options = parser.parse_args()
    if not re.fullmatch(r"\d+x\d+", options.model):
        parser.error(f"--model must be WIDTHxDEPTH, got {options.model}")
    if options.products:
        work(options)
        return
    on = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"torch {torch.__version__}, {on}, {torch.cuda.device_count()} GPUs")
    for section in options.sections:
        print(f"\n## {section}\n", flush=True)
        globals()[section](options)


def speed(options: argparse.Namespace) -> None:
    """Whole models beside the dense one."""
    layers = ["--layers", str(options.layers)] if options.layers else []
    print_with_and_without_graphs(options, "--dtypes", "bfloat16", "float16", *layers)


def large(options: argparse.Namespace) -> None:
    """Blocks of which the products take the time."""
    if options.device == "cpu":
        print("needs a GPU")
        return
    work = ["--prompt", "2048", "--batches", "1", "64"]
    print_with_and_without_graphs(options, "--dtypes", "bfloat16", "--shapes", "large", *work)


def compiled(options: argparse.Namespace) -> None:
    """The same of small models that are compiled: each block of each is, for each kind of work."""
    for mode in ("reduce-overhead", "default"):
        print(f"mode: {mode}", flush=True)
        print_whole_models(options, "--dtypes", "bfloat16", "--layers", "2", "--compile", mode)


def print_with_and_without_graphs(options: argparse.Namespace, *arguments: str) -> None:
    """The table of `models_speed.py`, and on a GPU that of whole passes recorded."""
    for graphs in ([], ["--graphs"]) if options.device == "cuda" else ([],):
        print(f"CUDA graphs: {'yes' if graphs else 'no'}", flush=True)
        print_whole_models(options, *arguments, *graphs)


def print_whole_models(options: argparse.Namespace, *arguments: str) -> None:
    """The table of `models_speed.py`."""
    models = ["--forms", "factors", "pivot", "neurons", "--multiple", "64", "--threads", str(torch.get_num_threads())]
    work = ["--prompt", "512", "--repeats", str(options.repeats), "--device", options.device]
    print_tables(parser_of_models().parse_args([*models, *work, *arguments]))


def experts(options: argparse.Namespace) -> None:
    """Layers of experts."""
    arguments = ["--tokens", "4096", "512", "1", "--multiple", "8", "--rounds", str(options.repeats), "--dtype", "bfloat16"]
    shapes = [] if options.device == "cuda" else ["--shapes", "8x48x64x2"]
    print_experts(parser_of_experts().parse_args([*arguments, *shapes, "--device", options.device]))


def calibration(options: argparse.Namespace) -> None:
    """Statistics beside bare passes."""
    model, batches = loaded(options)
    targets = select_targets(model, ReparamConfig(**CONFIG), "default")
    time_passes(model, {name: target.module for name, target in targets.items()}, batches, options.repeats)


def memory(options: argparse.Namespace) -> None:
    """Peaks and seconds of `compress`."""
    print("| max_memory | seconds | peak above the model, MiB |\n| --- | --- | --- |")
    for most in (None, options.max_memory if options.device == "cuda" else FEW):
        model, batches = loaded(options)
        seconds, peak, _ = compressed(model, batches, max_memory=most)
        print(f"| {most or 'by itself'} | {seconds:.1f} | {'' if peak is None else f'{peak / 2**20:.0f}'} |", flush=True)


def processes(options: argparse.Namespace) -> None:
    """One process beside two."""
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        print("needs two GPUs")
        return
    with tempfile.TemporaryDirectory() as folder:
        products = {}
        for count in (1, 2):
            path = Path(folder, f"{count}.safetensors")
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), __file__]
            command += ["--device", options.device, "--model", options.model, "--windows", str(options.windows)]
            subprocess.run([*command, "--products", str(path)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            products[count] = load_file(path)
        print(f"largest relative difference of the products: {difference(products[1], products[2]):.1e}")


def work(options: argparse.Namespace) -> None:
    """What a process of the section on processes does."""
    rank = int(os.environ["LOCAL_RANK"])
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    model, batches = loaded(options)
    seconds, peak, products = compressed(model, batches)
    if rank == 0:
        shown = "" if peak is None else f", peak above the model {peak / 2**20:.0f} MiB"
        print(f"{dist.get_world_size()} processes: {seconds:.1f} s{shown}", flush=True)
        save_file(products, options.products)
    dist.destroy_process_group()


def devices(options: argparse.Namespace) -> None:
    """One device beside all of them."""
    if options.device != "cuda" or torch.cuda.device_count() < 2:
        print("needs two GPUs")
        return
    model, batches = loaded(options)
    alone, _, expected = compressed(model, batches)
    model, batches = loaded(options, split)
    seconds, _, products = compressed(model, batches)
    print(f"on one device {alone:.1f} s, on {torch.cuda.device_count()} {seconds:.1f} s")
    print(f"largest relative difference of the products: {difference(expected, products):.1e}")


def split(model: Any) -> Any:
    """The model, its blocks shared out among all devices."""
    whole = [type(model.model.layers[0]).__name__]
    most = get_balanced_memory(model, no_split_module_classes=whole)
    return dispatch_model(model, infer_auto_device_map(model, max_memory=most, no_split_module_classes=whole))


def loaded(options: argparse.Namespace, place: Callable[[Any], Any] | None = None) -> tuple[Any, list[dict[str, Tensor]]]:
    """The model and its batches, the same each time; on one device, or where a function puts the model."""
    torch.manual_seed(0)
    model, batches = read(options.model, None, options.windows)
    model = model.to(options.device) if place is None else place(model)
    return model, [{name: tensor.to(options.device) for name, tensor in batch.items()} for batch in batches]


def compressed(
    model: Any, batches: list[dict[str, Tensor]], max_memory: str | None = None
) -> tuple[float, int | None, dict[str, Tensor]]:
    """Seconds of `compress`, its peak above the model in bytes (on GPUs alone), and the products by the names of the layers."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated() if on_gpu else 0, time.perf_counter()
    small = compress(model, ReparamConfig(**CONFIG), batches, max_memory=max_memory, progress=False)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
    merged = small.merge_and_unload()
    blocks = merged.model.layers.named_parameters()
    return seconds, peak, {name: weight.detach().float().cpu().contiguous() for name, weight in blocks if weight.dim() == 2}


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest norm of a difference over the norm of what it is of."""
    assert left.keys() == right.keys(), "not the same layers"
    return max(float((left[name] - right[name]).norm() / left[name].norm()) for name in left)


if __name__ == "__main__":
    main()
