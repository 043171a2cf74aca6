"""Where the memory and the time of `compress` go: peak above the loaded model and processor seconds of each phase.

    python tests/benchmarks/memory.py MODEL CALIBRATION [--windows 48] [--batch 4] [--neurons no] [--max-memory 1GB]
    python tests/benchmarks/memory.py 576x4 [--windows 8]
    python tests/benchmarks/memory.py 576x4 --save factors.safetensors
    python tests/benchmarks/memory.py 576x4 --against factors.safetensors

MODEL is a folder that `from_pretrained` opens, or `demo`; or WIDTHxDEPTH for a Llama of random weights with the vocabulary of
SmolLM2, fed random tokens. `--save` keeps the products, to which `--against` compares those of another run.

Batches, statistics, planning, factorising and installing are told apart by what `Job` calls; where one phase calls another, its
time is its own, and its peak that of its own parts. Memory is resident: VmHWM, reset between phases. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compress_model import memory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from reparam_peft import ReparamConfig, compress, text_batches
from reparam_peft.blockwise.gathering import BlockwiseGatherer
from reparam_peft.calibration.gather import gather_statistics
from reparam_peft.cli.demo import demo_folder
from reparam_peft.compression import job
from reparam_peft.layers.wrapper import Wrapper

LENGTH = 512  # tokens of a window


class Phases:
    """Peaks and processor seconds of phases that may be nested."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.process_time()
        gc.collect()
        self.before = memory("VmRSS")

    def _note(self) -> None:
        """Count what was used since the last call to the innermost phase that runs."""
        if self._running:
            name = self._running[-1]
            self.peaks[name] = max(self.peaks[name], memory("VmHWM") - self.before)
            self.seconds[name] += time.process_time() - self._since
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._since = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within this block time and memory are those of the phase."""
        self._note()
        self._running.append(name)
        try:
            yield
        finally:
            self._note()
            self._running.pop()

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are a phase."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return run


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path, nargs="?")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--neurons", choices=("yes", "no"), default="yes")
    parser.add_argument("--max-memory", type=in_bytes)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = read(options.model)
    config = ReparamConfig(target_modules="all-linear", keep=options.keep, neurons=options.neurons == "yes")
    phases = Phases()
    parts = {"plan": "planning", "products": "factorising"}
    start = time.perf_counter()
    with ExitStack() as stack:
        for name, phase in parts.items():
            method = getattr(job.Job, name)
            stack.enter_context(mock.patch.object(job.Job, name, phases.counted(phase, method)))
        gather = BlockwiseGatherer.gather
        stack.enter_context(mock.patch.object(job, "gather_statistics", phases.counted("statistics", gather_statistics)))
        stack.enter_context(mock.patch.object(BlockwiseGatherer, "gather", phases.counted("statistics", gather)))
        with phases.phase("batches"):
            batches = read_batches(tokenizer, options.calibration, model, options.windows, options.batch)
        with phases.phase("installing and all else"):
            compressed = compress(model, config, batches, max_memory=options.max_memory, progress=False)
    wall = time.perf_counter() - start
    print(f"{options}\n{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| phase | peak above the loaded model, MB | processor seconds |\n| --- | --- | --- |")
    for name, peak in phases.peaks.items():
        print(f"| {name} | {peak / 1e6:,.0f} | {phases.seconds[name]:.1f} |")
    print(f"| all | {max(phases.peaks.values()) / 1e6:,.0f} | {sum(phases.seconds.values()):.1f} |")
    print(
        f"{wall:.0f} s of wall time; the model holds {memory('VmRSS') / 1e6 - phases.before / 1e6:+,.0f} MB afterwards",
        flush=True,
    )
    compare(compressed, options.save, options.against)


def in_bytes(text: str) -> int:
    """A number of bytes, such as 1GB or 500MB."""
    match = re.fullmatch(r"([\d.]+)\s*(GB|MB|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a number of bytes such as 1GB, got {text!r}")
    return int(float(match[1]) * {"GB": 1e9, "MB": 1e6, "": 1}[match[2]])


def read(name: str) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer, where it has one."""
    if re.fullmatch(r"\d+x\d+", name):
        width, depth = map(int, name.split("x"))
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 192}
        sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": depth, "vocab_size": 49152}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval(), None
    source = str(demo_folder()) if name == "demo" else name
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the memory-mapped file
    return model, AutoTokenizer.from_pretrained(source)


def read_batches(tokenizer: Any, text: Path | None, model: Any, windows: int, size: int) -> list[dict[str, Any]]:
    """Batches of so many windows."""
    if tokenizer is None:
        ids = torch.randint(model.config.vocab_size, (windows, LENGTH), generator=torch.Generator().manual_seed(1))
        return [{"input_ids": part} for part in ids.split(size)]
    if text is None:
        raise SystemExit("give a text to calibrate on")
    return text_batches(tokenizer, text.read_text(encoding="utf-8"), length=LENGTH, limit=windows, batch_size=size)


def compare(model: Any, save: Path | None, against: Path | None) -> None:
    """Keep the products of a model, or print how far they are from those that were kept, relative to their norms."""
    if save is None and against is None:
        return
    products = {
        name: module.computed_matrix().detach().float().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, Wrapper)
    }
    if save is not None:
        save_file(products, save)
    if against is not None:
        others = load_file(against)
        if products.keys() != others.keys():
            print(f"other modules are factorised: {sorted(products.keys() ^ others.keys())}")
        shared = products.keys() & others.keys()
        away = {name: float((products[name] - others[name]).norm() / others[name].norm()) for name in shared}
        worst = max(away, key=lambda name: away[name])
        print(f"products differ from those of {against} by {max(away.values()):.1e} at most, at {worst}, and by "
              f"{sum(away.values()) / len(away):.1e} on average")  # fmt: skip


if __name__ == "__main__":
    main()
