"""Each ingredient of `compress` added one at a time: perplexity at the same stored parameters.

    python tests/benchmarks/ablation.py MODEL CALIBRATION TEST [--keep 0.9 0.8 0.6] [--seeds 0 1 2] [--statistics FOLDER]

MODEL is a folder that `from_pretrained` opens, or `demo`; CALIBRATION and TEST are text files. Calibration takes the first 48
windows of 512 tokens, the test the first 16 of its text. Seeds change the sampled labels, from which the Fisher matrices
come; rows that do not use them are run once. `--held-out N` tests on N later windows of the calibration text instead: what
constants are tuned on. Prints a Markdown table, median over the seeds and their range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from reparam_peft import ReparamConfig, Statistics, calibrate, compress, perplexity, text_batches
from reparam_peft.cli.demo import demo_folder

FACTORS = {"form": "factors", "allocation": "uniform"}
ROWS: dict[str, tuple[dict[str, Any], bool]] = {  # name → fields of the config, whether they use sampled labels
    "plain SVD, uniform, factors": ({"method": "svd", **FACTORS}, False),
    "whitened (SVD-LLM)": ({"output_metric": "none", **FACTORS}, False),
    "+ pivot form": ({"output_metric": "none", "allocation": "uniform"}, False),
    "+ loss allocation": ({"output_metric": "none", "neurons": False}, True),
    "+ two-sided metric": ({"neurons": False}, True),
    "+ neurons: `compress`": ({}, True),
    "diagonal input metric (ASVD), uniform": ({"input_metric": "diagonal", "output_metric": "none", **FACTORS}, False),
    "diagonal output metric (FWSVD), uniform": ({"input_metric": "none", "output_metric": "diagonal", **FACTORS}, True),
    "without the pivot form": ({"form": "factors"}, True),
    "without loss allocation": ({"allocation": "uniform"}, True),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="beginnings of the rows' names")
    parser.add_argument("--held-out", type=int, default=0)
    parser.add_argument("--statistics", type=Path, help="folder to keep statistics in, from one run to the next")
    options = parser.parse_args()
    source = str(demo_folder()) if options.model == "demo" else options.model
    tokenizer = AutoTokenizer.from_pretrained(source)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def windows(path: Path, count: int, skip: int = 0) -> list[dict[str, torch.Tensor]]:
        batches = text_batches(tokenizer, path.read_text(encoding="utf-8"), length=512, limit=count + skip, batch_size=1)
        return [
            {key: torch.cat([b[key] for b in batches[i : i + 2]]) for key in batches[0]} for i in range(skip, len(batches), 2)
        ]

    def known(seed: int) -> Statistics:
        path = None if options.statistics is None else options.statistics / f"seed-{seed}.safetensors"
        if path is not None and path.exists():
            return Statistics.load(path)
        start = time.perf_counter()
        batches = windows(options.calibration, 48)
        found = calibrate(base(), ReparamConfig(target_modules="all-linear"), batches, seed=seed, progress=False)
        print(f"statistics of seed {seed}: {time.perf_counter() - start:.0f} s, {found.nbytes / 2**20:.0f} MiB", flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            found.save(path)
        return found

    test = windows(options.calibration, options.held_out, 200) if options.held_out else windows(options.test, 16)
    print(f"{torch.get_num_threads()} threads; dense perplexity {perplexity(base(), test):.3f}", flush=True)
    results: dict[tuple[str, float], list[float]] = {}
    rows = [name for name in ROWS if any(name.startswith(beginning) for beginning in options.rows)]
    for number, seed in enumerate(options.seeds):
        gathered = known(seed)
        for name in rows:
            fields, sampled = ROWS[name]
            for keep in options.keep if sampled or number == 0 else ():
                config = ReparamConfig(target_modules="all-linear", keep=keep, **fields)
                model, start = base(), time.perf_counter()
                data_free = fields.get("method") == "svd"
                small = get_peft_model(model, config) if data_free else compress(model, config, gathered, progress=False)
                seconds = time.perf_counter() - start
                stored = stored_parameters(small) / small.peft_config["default"].dense_parameters
                assert stored <= keep, f"{stored} of the parameters stored"
                results.setdefault((name, keep), []).append(perplexity(small, test))
                dense = len(small.peft_config["default"].dense_modules)
                print(
                    f"seed {seed}, {name}, keep {keep}: perplexity {results[name, keep][-1]:.3f}, stored {stored:.5f}, "
                    f"{dense} dense, {seconds:.0f} s",
                    flush=True,
                )
    print("\n| | " + " | ".join(f"keep {keep}" for keep in options.keep) + " |\n" + "| --- " * (1 + len(options.keep)) + "|")
    for name in rows:
        print(f"| {name} | " + " | ".join(cell(results[name, keep]) for keep in options.keep) + " |")


def stored_parameters(model: Any) -> int:
    """Numbers in the tensors that a checkpoint would hold, and those of the targets that stay dense."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model)
    assert save({key: tensor.contiguous() for key, tensor in tensors.items()})
    modules = dict(model.get_base_model().named_modules())
    dense = sum(modules[name].weight.numel() for name in model.peft_config["default"].dense_modules)
    return sum(tensor.numel() for tensor in tensors.values()) + dense


def cell(values: list[float]) -> str:
    """The median and, of several values, the range."""
    middle = statistics.median(values)
    shown = f"{middle:,.0f}" if middle > 1000 else f"{middle:.2f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.2f}–{max(values):.2f})"


if __name__ == "__main__":
    main()
