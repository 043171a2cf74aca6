"""Peak anonymous memory and time of `compress_checkpoint`, beside the route through memory, each in a process of its own.

    python tests/benchmarks/streaming.py MODEL [--keep 0.8] [--synthetic LAYERS] [--calibrated HOW] [--windows 8]

MODEL is a folder with safetensors, or `demo`. `--synthetic` writes a Llama-shaped bf16 checkpoint of that many layers of 100
million parameters, or of other `--hidden` sizes, in place of it, with spectra that decay, and runs the streamed route only.
`--calibrated` is `one-shot`, `sequential` or `refined`: the streamed route alone, with so many windows of 512 random tokens,
activations on disk, and an end after `--blocks` blocks. Anonymous memory is what the system cannot drop: pages of mapped files,
such as the weights of the source, are not part of it. Prints a Markdown table, that memory over time, and the seconds of each
block, which are the processor's where it is calibrated.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reparam_peft.cli.demo import demo_folder

ROUTES = {
    "import only": "from reparam_peft import ReparamConfig, compress_checkpoint",
    "streamed": """
from reparam_peft import ReparamConfig, compress_checkpoint
from reparam_peft.runtime.run_folder import RunFolder
finish = RunFolder.finish
def told(self, entry, tensors):
    print(entry["seconds"])
    finish(self, entry, tensors)
RunFolder.finish = told
compress_checkpoint(source, out, ReparamConfig(target_modules="all-linear", keep=keep), progress=False)
""",
    "calibrated": """
import time
import torch
from reparam_peft import ReparamConfig, compress_checkpoint
from reparam_peft.compression.job import Job
from reparam_peft.runtime.run_folder import RunFolder
finish, plan, times = RunFolder.finish, Job.plan, [time.process_time()]
def spent():
    times.append(time.process_time())
    return round(times[-1] - times[-2], 1)
def planned(self):
    made = plan(self)
    print("planning", spent(), flush=True)
    return made
def told(self, entry, tensors):
    finish(self, entry, tensors)
    print(spent(), flush=True)
    if len(self.finished) == blocks:
        raise SystemExit(0)
RunFolder.finish, Job.plan = told, planned
tokens = torch.randint(0, 32000, (windows, 1, 512), generator=torch.Generator().manual_seed(0))
compress_checkpoint(
    source, out, ReparamConfig(target_modules="all-linear", keep=keep), [{"input_ids": ids} for ids in tokens],
    sequential=how != "one-shot", refine=how == "refined", progress=False, offload_folder=str(out) + "-activations",
    max_memory=max_memory)
""",
    "in memory": """
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from reparam_peft import ReparamConfig
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
get_peft_model(model, ReparamConfig(target_modules="all-linear", keep=keep)).to_standalone().save_pretrained(out)
""",
}


def watched(code: str, **values: object) -> tuple[list[tuple[float, float]], float, str]:
    """Run a piece of code in a process of its own, with these values as its variables.

    Returns:
        Its anonymous and its resident memory every 5 ms in MB, the seconds that it took, and what it printed.
    """
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    head = "".join(f"{name} = {value!r}\n" for name, value in plain.items())
    start = time.perf_counter()
    running = subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True)
    memory: list[tuple[float, float]] = []

    def watch() -> None:
        status = Path(f"/proc/{running.pid}/status")
        while running.poll() is None:
            found = dict(re.findall(r"(VmRSS|RssAnon):\s+(\d+)", status.read_text(encoding="utf-8")))
            memory.append((int(found.get("RssAnon", 0)) / 1e3, int(found.get("VmRSS", 0)) / 1e3))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, _ = running.communicate()
    watcher.join()
    if running.returncode:
        raise SystemExit("the run failed")
    return memory, time.perf_counter() - start, printed


def decaying(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random numbers whose rows and columns become smaller as 1/√i, in random order, with a root mean square of 0.02."""
    tensor = torch.randn(shape, generator=generator)
    for dim, size in enumerate(shape if tensor.ndim == 2 else ()):
        scales = torch.arange(1, size + 1).rsqrt()[torch.randperm(size, generator=generator)]
        tensor *= (scales / scales.square().mean().sqrt()).unsqueeze(1 - dim)
    return tensor.mul_(0.02) if tensor.ndim == 2 else torch.ones(shape)


def synthetic(folder: Path, layers: int, hidden: int) -> None:
    """A checkpoint with shards of one layer, written without holding more than that."""
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_attention_heads": hidden // 128}
    sizes["num_key_value_heads"] = hidden // 384
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, vocab_size=32000, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        parts.setdefault(".".join(name.split(".")[:3]), {})[name] = shape
    index = {}
    for number, part in enumerate(parts.values()):
        file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {name: decaying(shape, generator).bfloat16() for name, shape in part.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    listing = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing), encoding="utf-8")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--synthetic", type=int, metavar="LAYERS")
    parser.add_argument("--hidden", type=int, default=3072, help="of the synthetic model, a multiple of 384")
    parser.add_argument("--calibrated", choices=["one-shot", "sequential", "refined"])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=-1)
    parser.add_argument("--max-memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = demo_folder() if options.model == "demo" else Path(options.model)
        routes = ["import only", "streamed", "in memory"]
        if options.synthetic:
            source, routes = work / "dense", routes[:2]
            synthetic(source, options.synthetic, options.hidden)
        if options.calibrated:
            routes = ["import only", "calibrated"]
        size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors")) / 1e6
        print(f"dense: {size:.0f} MB, {torch.get_num_threads()} threads")
        print("\n| route | peak anonymous MB | seconds |\n| --- | --- | --- |")
        for route in routes:
            out = work / route.replace(" ", "-")
            both, seconds, printed = watched(
                ROUTES[route], source=source, out=out, keep=options.keep, how=options.calibrated, windows=options.windows,
                blocks=options.blocks, max_memory=options.max_memory,
            )  # fmt: skip
            memory = [anonymous for anonymous, _ in both]
            print(f"| {route} | {max(memory):.0f} | {seconds:.1f} |", flush=True)
            if route != "import only" and route != "in memory":
                step = len(memory) // 20 + 1
                curve = [round(max(memory[i : i + step])) for i in range(0, len(memory), step)]
                blocks = printed.split()
        print(f"\nMB over time: {curve}\nseconds per block: {', '.join(blocks)}")
        if "in memory" in routes:
            files = [(work / route / "model.safetensors").read_bytes() for route in ("streamed", "in-memory")]
            print(f"\nthe same bytes: {files[0] == files[1]}")


if __name__ == "__main__":
    main()
