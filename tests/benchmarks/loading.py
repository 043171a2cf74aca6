"""What it takes to load and to start: dense, adapter, standalone and quantised checkpoints side by side.

    python tests/benchmarks/loading.py MODEL [--keep 0.6] [--repeat 3]

MODEL is a folder with a dense causal language model, or `demo`. It is compressed without data; ranks, and with them sizes, are
those that calibrated compression has at this `keep`. Each route runs in a process of its own, `--repeat` times in turn: medians
of the seconds to load, the peaks of anonymous and of resident memory, with pages of mapped files, from the imports to the last
token, and the latency of the first token (a prompt of 32) and of a later one. The files are in the system's cache. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from streaming import watched
from transformers import AutoModelForCausalLM

from reparam_peft import ReparamConfig
from reparam_peft.cli.demo import demo_folder

START = r"""
import json, time, re
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import reparam_peft
status = dict(re.findall(r"(VmRSS|RssAnon):\s+(\d+)", Path("/proc/self/status").read_text()))
imported, start = [int(status[name]) / 1e3 for name in ("RssAnon", "VmRSS")], time.perf_counter()
"""
END = """
loaded = time.perf_counter()
model.eval()
with torch.inference_mode():
    prompt = torch.arange(100, 132)[None]
    past = model(prompt, logits_to_keep=1).past_key_values
    first = time.perf_counter()
    for _ in range(8):
        past = model(prompt[:, -1:], past_key_values=past).past_key_values
    later = (time.perf_counter() - first) / 8
print(json.dumps([loaded - start, first - loaded, later, *imported]))
"""
ROUTES = {
    "dense": 'model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype="auto")',
    "adapter": """
model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype="auto")
model = PeftModel.from_pretrained(model, folder / "adapter", low_cpu_mem_usage=True)
""",
    "standalone": 'model = AutoModelForCausalLM.from_pretrained(folder / "standalone", dtype="auto")',
    "int8": 'model = AutoModelForCausalLM.from_pretrained(folder / "int8", dtype="auto")',
    "int4": 'model = AutoModelForCausalLM.from_pretrained(folder / "int4", dtype="auto")',
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = demo_folder() if options.model == "demo" else options.model
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        model.save_pretrained(folder / "dense")
        small = get_peft_model(model, ReparamConfig(target_modules="all-linear", keep=options.keep, form="pivot"))
        small.save_pretrained(folder / "adapter")
        small.to_standalone().save_pretrained(folder / "standalone")
        for scheme in ("int8", "int4"):
            small.to_standalone(quantize=scheme).save_pretrained(folder / scheme)
        del model, small
        found: dict[str, list[list[float]]] = {route: [] for route in ROUTES}
        for _ in range(options.repeat):
            for route, code in ROUTES.items():
                text = f"{START}folder = Path(folder)\n{code}\n{END}"
                memory, _, printed = watched(text, folder=folder)
                *seconds, anonymous, resident = json.loads(printed.splitlines()[-1])
                peaks = [max(column) for column in zip(*memory, strict=True)]
                found[route].append([*seconds, peaks[0] - anonymous, peaks[1] - resident])
        print(f"{torch.get_num_threads()} threads, keep {options.keep}, {options.repeat} times")
        head = "| route | files MB | load s | peak anonymous MB | peak resident MB | first token ms | later token ms |"
        print(f"\n{head}\n{'| --- ' * 7}|")
        for route, rows in found.items():
            load, first, later, anonymous, resident = (statistics.median(column) for column in zip(*rows, strict=True))
            needed = ["dense", "adapter"] if route == "adapter" else [route]
            size = sum(file.stat().st_size for name in needed for file in (folder / name).glob("*.safetensors")) / 1e6
            cells = [
                f"{size:.0f}",
                f"{load:.2f}",
                f"{anonymous:.0f}",
                f"{resident:.0f}",
                f"{1e3 * first:.0f}",
                f"{1e3 * later:.1f}",
            ]
            print(f"| {route} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
