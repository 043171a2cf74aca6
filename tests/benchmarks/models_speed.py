"""Speed of whole models in each form, beside the dense one: prefill, and decoding of one sequence and of a batch.

    python tests/benchmarks/models_speed.py [--shapes small wide large] [--forms factors pivot] [--threads 1 2]
        [--dtypes float32] [--keep 0.6] [--multiple 8] [--prompt 256] [--batches 1 8] [--repeats 7] [--adapter]
        [--compile [MODE]] [--device cuda] [--graphs]

Llamas of random weights with a small vocabulary, so that their blocks are what takes the time; `small` has the shapes of
SmolLM2-135M, and `large`, which takes 3.5 GB in 16 bits, those of two blocks of Llama 3 70B. All linear layers of the blocks
keep the same share of their numbers, or a little less, since ranks are multiples of 8, as those that `compress` chooses: as
plain factors, in the pivot form with pivots spread over the outputs, or, as `neurons`, in pivot form but for the MLPs, which
keep that share of their neurons and stay matrices. `dense-8`, `factors-4` and so on have numbers in 8 or 4 bits, `corrected-4`
whole matrices in 4 with a correction in 8 beside. `--adapter` adds the pivot form inside of PEFT's wrappers, `--compile`
blocks compiled by `torch.compile` in a mode of it, such as `reduce-overhead`, which uses CUDA graphs, and `--graphs`, on a
GPU, whole passes as they are, recorded as one CUDA graph each and played back.

A step of decoding follows a cached prompt of 32 tokens. Weights come from memory, since a model is larger than the caches and
reads all of itself in each run. The models of a row take turns in one process; printed are ratios of medians to the dense
model: above 1 is faster. `wall` is time passed; with one thread `cpu` is time of the processor, which other programs disturb
less, and `least` the least of that, which they disturb least.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from reparam_peft import ReparamConfig
from reparam_peft.layers.pivot_expansion import PivotExpansion
from reparam_peft.numerics.storage import Storage
from reparam_peft.standalone.checkpoint import CheckpointConfig
from reparam_peft.standalone.from_config import factorized

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "wide": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "large": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = 1000
CACHED = 32  # tokens before the one that is decoded
CORRECTED = 16  # rank of a correction
Step = Callable[[], object]


def main() -> None:
    """Print a table for each number of threads."""
    parser = parser_of_options()
    options = parser.parse_args()
    if options.graphs and options.device == "cpu":
        parser.error("--graphs needs a GPU")
    print_tables(options)


def parser_of_options() -> argparse.ArgumentParser:
    """What the script is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "wide"])
    parser.add_argument("--layers", type=int, help="of each model, in place of 30, 6 and 2")
    parser.add_argument("--forms", nargs="+", default=["factors", "pivot"], help="factors, pivot, neurons; or in bits: pivot-4")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--multiple", type=int, default=8, help="of ranks and numbers of neurons, rounded down")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--adapter", action="store_true")
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graphs", action="store_true")
    return parser


def print_tables(options: argparse.Namespace) -> None:
    """Print one table of all shapes, data types and numbers of threads."""
    print(f"torch {torch.__version__}, keep {options.keep:g}; dense / form, above 1 is faster\n")
    works = [f"prefill of {options.prompt}", *(f"decode, batch of {batch}" for batch in options.batches)]
    print("| shape | dtype | threads | model | time | " + " | ".join(works) + " |\n" + "| --- " * (5 + len(works)) + "|")
    for shape in options.shapes:
        for dtype in options.dtypes:
            models = models_of(shape, options, getattr(torch, dtype))
            for threads in options.threads:
                torch.set_num_threads(threads)
                print_rows(f"{shape} | {dtype} | {threads}", models, options, with_cpu=threads == 1 and options.device == "cpu")
            del models


def models_of(shape: str, options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Models by what they are called in the table, the dense one first."""
    sizes = SHAPES[shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    with torch.device(options.device):
        dense = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).to(dtype).eval()
    models: dict[str, Any] = {"dense": dense}
    for form in options.forms:
        layers = layers_of(dense, form, options)
        models[form] = factorized(copy.deepcopy(dense), CheckpointConfig(layers)).to(dtype).eval()
        spread_pivots(models[form])
    if options.adapter:
        ranks = {name: layer["rank"] for name, layer in layers_of(dense, "pivot", options).items()}
        config = ReparamConfig(r=1, rank_pattern=ranks, form="pivot", init_weights=False)
        models["pivot, as an adapter"] = get_peft_model(copy.deepcopy(dense), config).eval()
        spread_pivots(models["pivot, as an adapter"])
    if options.compile:
        models |= {
            f"{name}, compiled": compiled(model, options.compile) for name, model in models.items() if "adapter" not in name
        }
    return models


def layers_of(dense: Any, form: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What `config.json` says of a model that keeps a share of each matrix: in a form, or, of MLPs, "neurons" as they are.

    With bits behind it, numbers are in 8 or 4; "dense-4" and "corrected-4" are whole matrices, the latter with a correction.
    """
    layers = {}
    for name, module in dense.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        rows, columns = module.weight.shape
        kind, _, bits = form.partition("-")
        if form == "neurons" and ".mlp." in name:
            left = [aligned(options.keep * features, options.multiple) for features in (rows, columns)]
            rows, columns = (rows, left[1]) if name.endswith("down_proj") else (left[0], columns)
            layers[name] = {"rank": min(rows, columns), "form": "dense", "bias": False, "out": rows, "in": columns}
        else:
            stored = "pivot" if kind == "neurons" else kind
            rank = {"dense": min(rows, columns), "corrected": CORRECTED}.get(stored)
            if rank is None:
                rank = aligned(Storage(rows, columns, stored).largest_rank(options.keep * rows * columns), options.multiple)
            layers[name] = {"rank": rank, "form": stored, "bias": False} | ({"bits": int(bits)} if bits else {})
            layers[name] |= {"correction_bits": 8} if stored == "corrected" else {}
    return layers


def aligned(number: float, multiple: int) -> int:
    """The largest multiple of a number that is at most another."""
    return int(number) // multiple * multiple


def compiled(model: Any, mode: str) -> Any:
    """The same model, sharing its tensors, with blocks that `torch.compile` has compiled."""
    torch._dynamo.config.recompile_limit = 1000  # a block is compiled anew for its number, by which it knows its cache
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, memo)
    for block in model.model.layers:
        block.compile(mode=mode)
    return model


def spread_pivots(model: Any) -> None:
    """Have pivots spread over the outputs at random, as of real matrices."""
    for module in model.modules():
        if isinstance(module, PivotExpansion):
            module.set_pivots(torch.randperm(len(module.order))[: module.rank].sort().values)


def print_rows(head: str, models: dict[str, Any], options: argparse.Namespace, with_cpu: bool) -> None:
    """Time all models at all work in turn, and print their ratios to the dense one."""
    works = [prefill(options.prompt, options.device), *(decode(batch, options.device) for batch in options.batches)]
    clocks = {"wall": time.perf_counter} | ({"cpu": time.process_time} if with_cpu else {})
    figures: dict[str, tuple[str, Callable[[list[float]], float]]] = {clock: (clock, statistics.median) for clock in clocks}
    figures |= {"least": ("cpu", min)} if with_cpu else {}
    columns: dict[tuple[str, str], list[str]] = {(figure, name): [] for figure in figures for name in models}
    with torch.inference_mode():
        for prepare in works:
            steps = {name: prepare(model) for name, model in models.items()}
            if options.graphs:
                steps = {name: recorded(step) for name, step in steps.items()}
            seconds = timed(steps, options.repeats, clocks, options.device)
            for figure, (clock, typical) in figures.items():
                times = {name: typical(seconds[clock, name]) for name in models}
                for name, of_model in times.items():
                    is_dense = name == "dense"
                    columns[figure, name].append(
                        f"{1000 * of_model:.1f} ms" if is_dense else f"{times['dense'] / of_model:.2f}"
                    )
    for clock in figures:
        for name in models:
            print(f"| {head} | {name} | {clock} | {' | '.join(columns[clock, name])} |", flush=True)


def prefill(tokens: int, device: str) -> Callable[[Any], Step]:
    """What makes a step of a model that reads a prompt."""
    ids = torch.arange(tokens, device=device)[None] % VOCABULARY
    return lambda model: lambda: model(input_ids=ids, use_cache=False)


def decode(batch: int, device: str) -> Callable[[Any], Step]:
    """What makes a step of a model that decodes a token of each of several sequences after a cached prompt."""
    prompt = torch.arange(batch * CACHED, device=device).view(batch, -1) % VOCABULARY
    token = torch.ones(batch, 1, dtype=torch.long, device=device)

    def prepare(model: Any) -> Step:
        cache = DynamicCache()
        model(input_ids=prompt, past_key_values=cache)
        of_prompt = [(layer.keys, layer.values) for layer in cache.layers]

        def step() -> Tensor:
            logits: Tensor = model(input_ids=token, past_key_values=cache).logits
            for layer, kept in zip(cache.layers, of_prompt, strict=True):
                layer.keys, layer.values = kept
            return logits

        return step

    return prepare


def recorded(step: Step) -> Step:
    """A step that plays back the kernels of another, without what Python takes to start them."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    return partial(play, graph, step)


def play(graph: torch.cuda.CUDAGraph, step: Step) -> None:
    """Play back a graph, which reads and writes the tensors of the step that it was recorded of."""
    graph.replay()


def timed(
    steps: dict[str, Step], repeats: int, clocks: dict[str, Callable[[], float]], device: str
) -> dict[tuple[str, str], list[float]]:
    """Seconds by each clock of each step; steps take turns, and the first turn warms up."""
    seconds: dict[tuple[str, str], list[float]] = {(clock, name): [] for clock in clocks for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            starts = {clock: read() for clock, read in clocks.items()}
            step()
            if device != "cpu":
                torch.accelerator.synchronize()
            for clock, read in clocks.items():
                if repeat:
                    seconds[clock, name].append(read() - starts[clock])
    return seconds


if __name__ == "__main__":
    main()
