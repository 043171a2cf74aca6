"""Would a joint factorisation of matrices that share an input, [W_q; W_k; W_v] ≈ [A_q; A_k; A_v] B, pay?

    python tests/benchmarks/joint.py MODEL STATISTICS [--keep 0.9 0.8 0.6]

MODEL is a folder that `from_pretrained` opens, or `demo`; STATISTICS a file that `reparam plan --statistics` wrote. For each
group of matrices with the same input the allocator may take the separate curves or the joint one, in the two-sided metric with
a block-diagonal F. Prints the predicted loss at the same stored parameters with and without the joint candidates.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from transformers import AutoModelForCausalLM

from reparam_peft import Statistics
from reparam_peft.cli.demo import demo_folder
from reparam_peft.compression.weighing import input_shrinkage, output_shrinkage
from reparam_peft.numerics.decompositions import direction_losses
from reparam_peft.numerics.metrics import shrink
from reparam_peft.numerics.storage import Storage
from reparam_peft.planning.allocation import Point, points


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("statistics")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    options = parser.parse_args()
    source = str(demo_folder()) if options.model == "demo" else options.model
    modules = dict(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).named_modules())
    known = Statistics.load(options.statistics)
    groups: dict[str, list[str]] = defaultdict(list)
    for name, leader in known.reads.items():
        groups[leader].append(name)
    separate: dict[str, list[list[Point]]] = {}
    joint: dict[str, list[Point]] = {}
    for leader, names in groups.items():
        weights = [modules[name].weight.detach() for name in names]
        gram = shrink(known.gram(leader), input_shrinkage(known.input_rows(leader), weights[0].shape[1]))
        fishers = [
            shrink(known.fisher(name), output_shrinkage(known.output_rows(name), len(weight))) * known.loss_scale(name)
            for name, weight in zip(names, weights, strict=True)
        ]
        separate[leader] = [curve(weight, gram, fisher) for weight, fisher in zip(weights, fishers, strict=True)]
        joint[leader] = curve(torch.cat(weights), gram, torch.block_diag(*fishers)) if len(names) > 1 else []
    dense = sum(points[-1].cost for curves in separate.values() for points in curves)
    print("| keep | predicted loss, separate | with joint candidates | joint groups taken |\n| --- | --- | --- | --- |")
    for keep in options.keep:
        alone, _ = solve(separate, {}, keep * dense)
        both, taken = solve(separate, joint, keep * dense)
        print(f"| {keep} | {alone:.4f} | {both:.4f} | {taken} of {sum(map(bool, joint.values()))} |", flush=True)


def curve(weight: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor) -> list[Point]:
    """The points of a matrix in pivot form."""
    return points(direction_losses(weight, gram, fisher, gram, fisher), Storage(*weight.shape, "pivot"))


def solve(separate: dict[str, list[list[Point]]], joint: dict[str, list[Point]], budget: float) -> tuple[float, int]:
    """Predicted loss under the budget, by one multiplier, and how many groups are joint."""
    low, high = 1e-15, 1.0
    for _ in range(100):
        price = (low * high) ** 0.5
        loss = cost = taken = 0
        for leader, curves in separate.items():
            best = [min(points, key=lambda p: p.loss + price * p.cost) for points in curves]
            if joint.get(leader):
                shared = min(joint[leader], key=lambda p: p.loss + price * p.cost)
                if shared.loss + price * shared.cost < sum(p.loss + price * p.cost for p in best):
                    best, taken = [shared], taken + 1
            loss += sum(point.loss for point in best)
            cost += sum(point.cost for point in best)
        low, high = (price, high) if cost > budget else (low, price)
    return loss, taken


if __name__ == "__main__":
    main()
