"""Print which MLPs of many architectures can give up neurons, and that they can: cut off, and set to zero, the outputs agree.

    python tests/benchmarks/neuron_groups.py [ARCHITECTURE …]

Tiny models with random weights; about a minute for all. A folder of a model in place of a name is read.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402
from support.architectures import ARCHITECTURES  # noqa: E402  the tests' own models
from support.neurons import difference_when_cut  # noqa: E402

from reparam_peft.calibration.neuron_groups import find_groups, is_linear  # noqa: E402


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("| architecture | groups | MLPs | layouts | producers | seconds | largest difference |\n" + "| --- " * 7 + "|")
    for name in sys.argv[1:] or ARCHITECTURES:
        if Path(name).is_dir():
            model, batch, mlps = transformers.AutoModelForCausalLM.from_pretrained(name), None, "?"
            batch = {"input_ids": torch.arange(5, 517)[None]}
        else:
            architecture = ARCHITECTURES[name]
            model, batch, mlps = architecture.build(), architecture.batch(), str(architecture.mlps)
        targets = {layer: module for layer, module in model.named_modules() if is_linear(module)}
        start = time.perf_counter()
        groups = find_groups(model, targets, batch)
        seconds = time.perf_counter() - start
        layouts = sorted({producer.layout for group in groups for producer in group.producers})
        numbers = sorted({len(group.producers) for group in groups})
        difference = difference_when_cut(model, groups, batch)
        print(
            f"| {name} | {len(groups)} | {mlps} | {', '.join(layouts)} | {numbers} | {seconds:.2f} | {difference:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
