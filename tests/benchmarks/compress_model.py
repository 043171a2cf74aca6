"""Data-free compression of a model: seconds, memory, bytes, and decompositions on each load route.

    python tests/benchmarks/compress_model.py MODEL [--keep 0.8]

MODEL is a folder that `from_pretrained` opens, or `demo`. The work runs in a process of its own, so that the peak of its
resident memory (VmHWM) is that of compressing; Linux only.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import reparam_peft.numerics.methods
import reparam_peft.tuner.arrivals
from reparam_peft import ReparamConfig, factorize
from reparam_peft.cli.demo import demo_folder


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--keep", type=float, default=0.8)
    options = parser.parse_args()
    source = str(demo_folder()) if options.model == "demo" else options.model

    def base(**kwargs: object) -> AutoModelForCausalLM:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs)

    model = base()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the memory-mapped file
    dense_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    start = time.perf_counter()
    small = get_peft_model(model, ReparamConfig(target_modules="all-linear", keep=options.keep))
    seconds = time.perf_counter() - start
    peak = memory("VmHWM") - before
    sizes = small.size_report()
    largest = max(matrix.dense_bytes for matrix in sizes.matrices)
    factors = sizes.to_dict()["targets"]["stored_bytes"]
    print(f"compressed in {seconds:.1f} s on {torch.get_num_threads()} threads")
    print(f"peak above the loaded model: {peak / 2**20:.0f} MiB = factors {factors / 2**20:.0f} MiB + "
          f"{(peak - factors) / largest:.1f} × the largest matrix ({largest / 2**20:.1f} MiB)")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model.config._name_or_path = source
        small.peft_config["default"].base_model_name_or_path = source
        small.save_pretrained(folder)
        checkpoint = (Path(folder) / "adapter_model.safetensors").stat().st_size
        rest = sizes.other_bytes
        print(f"checkpoint {checkpoint:,} bytes; the targeted matrices were {sizes.to_dict()['targets']['dense_bytes']:,}")
        print(
            f"dense model {dense_bytes:,} bytes; compressed, with {rest:,} bytes that are not targeted: {checkpoint + rest:,}"
        )
        tokens = AutoTokenizer.from_pretrained(source)("The capital of France is", return_tensors="pt")
        expected = small.eval()(**tokens).logits

        def skeleton() -> AutoModelForCausalLM:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(model.config)

        def transformers_route() -> AutoModelForCausalLM:
            loaded = base()
            loaded.load_adapter(folder)
            return loaded

        routes = {
            "PeftModel.from_pretrained": lambda: PeftModel.from_pretrained(base(), folder),
            "… low_cpu_mem_usage=True": lambda: PeftModel.from_pretrained(base(), folder, low_cpu_mem_usage=True),
            "… is_trainable=True": lambda: PeftModel.from_pretrained(base(), folder, is_trainable=True),
            "AutoPeftModelForCausalLM": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
            "transformers load_adapter": transformers_route,
            "base on meta": lambda: PeftModel.from_pretrained(skeleton(), folder, low_cpu_mem_usage=True),
        }
        print("| route | decompositions | largest difference of the logits |\n| --- | --- | --- |")
        for name, load in routes.items():
            counter = mock.Mock(side_effect=factorize)
            with (
                mock.patch.object(reparam_peft.numerics.decompositions, "factorize", counter),
                mock.patch.object(reparam_peft.layers.nearest, "factorize", counter),
            ):
                loaded = load()
                difference = "–"
                if not any(p.is_meta for p in loaded.parameters()):
                    difference = f"{(loaded.eval()(**tokens).logits - expected).abs().max():.1e}"
            print(f"| {name} | {counter.call_count} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
