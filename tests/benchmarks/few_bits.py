"""Factors in 8 and 4 bits: each number to the nearest, and rounded with the statistics of calibration.

    python tests/benchmarks/few_bits.py MODEL STATISTICS TEST [--keep 0.9 0.8] [--forms factors pivot] [--windows 16]

STATISTICS is a file that `reparam compress --statistics` or `Statistics.save` wrote, of all linear layers. Of each variant:
bytes of its file, perplexity on the first windows of TEST, its excess loss over factors in the model's dtype in nats per
token, and the share of that excess that rounding with statistics leaves.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from reparam_peft import ReparamConfig, Statistics, compress, perplexity
from reparam_peft.evaluation.text import text_batches


def file_size(model: PreTrainedModel) -> int:
    """Bytes of the weights that `save_pretrained` writes."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def main() -> None:
    """Print one line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("statistics", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8])
    parser.add_argument("--forms", nargs="+", default=["factors", "pivot"])
    parser.add_argument("--bits", nargs="+", default=["int8", "int4"])
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    statistics = Statistics.load(arguments.statistics)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.test.read_text(encoding="utf-8")
    test = text_batches(tokenizer, text, batch_size=1, limit=arguments.windows)
    print("| form | keep | factors | bytes | perplexity | excess | share |\n|---|---|---|---|---|---|---|", flush=True)
    for form in arguments.forms:
        for keep in arguments.keep:
            config = ReparamConfig(target_modules="all-linear", keep=keep, form=form)
            small = compress(AutoModelForCausalLM.from_pretrained(arguments.model), config, statistics, progress=False).eval()
            plain = small.to_standalone()
            whole = perplexity(plain, test)
            print(f"| {form} | {keep} | as they are | {file_size(plain):,} | {whole:.3f} | | |", flush=True)
            for bits in arguments.bits:
                excess: dict[str, float] = {}
                for rounding, known in (("nearest", None), ("with statistics", statistics)):
                    quantised = small.to_standalone(quantize=bits, statistics=known)
                    value = perplexity(quantised, test)
                    excess[rounding] = math.log(value / whole)
                    share = "" if known is None else f"{excess[rounding] / excess['nearest']:.2f}"
                    line = f"{file_size(quantised):,} | {value:.3f} | {excess[rounding]:.4f} | {share}"
                    print(f"| {form} | {keep} | {bits}, {rounding} | {line} |", flush=True)


if __name__ == "__main__":
    main()
