"""Memory, passes and hours of `compress` on models that no machine at hand holds, from formulas.

    python tests/benchmarks/costs_on_paper.py [--sequences 128] [--length 2048]

Prints the Markdown tables of docs/costs.md. Operations are counted by formulas, which tests/test_costs_on_paper.py holds
against what is counted and measured on tiny models; hours are operations divided by the rates in `RATES`, which are assumed.
Nothing here was run on a GPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from reparam_peft.numerics.grams import BLOCK, packed_shape
from reparam_peft.planning.neurons import counts

GB = 1e9
DEVICE = 80 * GB
# Operations per second that an accelerator of 80 GB is assumed to reach: of passes in bfloat16, of sums in float32, of products
# in float64, and of decompositions in float64, whose steps depend on each other.
RATES = {"passes": 3e14, "sums": 4e13, "products": 4e13, "decompositions": 5e11}
TOKENS_AT_A_TIME = 4096
COMPUTED = (0.7, 0.4, 0.1)  # of an MLP's neurons: how many are left where spectra are computed


@dataclass(frozen=True)
class Matrix:
    """Targets of one shape in a block.

    Attributes:
        out, size: (out, in).
        count: how many of them.
        share: of the tokens that each sees.
    """

    out: int
    size: int
    count: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class Input:
    """Inputs of one size in a block, each of which one matrix or several read; fields as of `Matrix`."""

    size: int
    count: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama, or of a mixture of experts of which each token reaches some.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary: as in transformers' configs.
        experts: in each block; 1: none, but an MLP.
        active: experts that a token reaches.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 1
    active: int = 1
    tied: bool = False

    @property
    def matrices(self) -> list[Matrix]:
        """The targets of a block."""
        q, kv, share = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.active / self.experts
        return [
            Matrix(q, self.hidden),
            Matrix(kv, self.hidden, 2),
            Matrix(self.hidden, q),
            Matrix(self.intermediate, self.hidden, 2 * self.experts, share),
            Matrix(self.hidden, self.intermediate, self.experts, share),
        ]

    @property
    def inputs(self) -> list[Input]:
        """What these read: q, k and v the same, gate and up the same."""
        share = self.active / self.experts
        return [
            Input(self.hidden),
            Input(self.heads * self.head_dim),
            Input(self.hidden, self.experts, share),
            Input(self.intermediate, self.experts, share),
        ]

    @property
    def block(self) -> int:
        """Parameters of the targets of a block."""
        return sum(m.count * m.out * m.size for m in self.matrices)

    @property
    def parameters(self) -> int:
        """Of the model, but for norms and routers."""
        return self.layers * self.block + (1 if self.tied else 2) * self.vocabulary * self.hidden


MODELS = {
    "1B": Model(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "8B": Model(4096, 14336, 32, 32, 8, 128, 128256),
    "70B": Model(8192, 28672, 80, 64, 8, 128, 128256),
    "30B-A3B": Model(2048, 768, 48, 32, 4, 128, 151936, experts=128, active=8),
}


@dataclass
class Operations:
    """Floating-point operations, a multiplication and an addition being two, by the rate at which they run."""

    passes: float = 0.0
    sums: float = 0.0
    products: float = 0.0
    decompositions: float = 0.0

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> Operations:
        return Operations(*(times * a for a in vars(self).values()))

    @property
    def seconds(self) -> float:
        """At the assumed rates, on one accelerator."""
        return sum(operations / RATES[name] for name, operations in vars(self).items())


# Memory, in bytes


def packed(size: int) -> int:
    """Numbers of a symmetric matrix that is kept packed."""
    return math.prod(packed_shape(size))


def statistics(model: Model, weighted: bool = True) -> int:
    """Of a block, float64: of each input two Gram matrices and sums, of each output one and two energies.

    Args:
        model: whose block it is.
        weighted: whether gradients come to its inputs, as in all blocks but the first.
    """
    of_inputs = sum(i.count * (packed(i.size) + i.size) for i in model.inputs) * (2 if weighted else 1)
    return 8 * (of_inputs + sum(m.count * (packed(m.out) + 2) for m in model.matrices))


def activations(model: Model, tokens: int, itemsize: int = 2) -> int:
    """What is kept of a calibration block by block: outputs, and gradients there, of each block."""
    return 2 * model.layers * tokens * model.hidden * itemsize


def streams(model: Model, tokens: int, itemsize: int = 2) -> int:
    """The activations of the original and of the compressed part, at the output of a block and of the one before."""
    return 4 * tokens * model.hidden * itemsize


def graph(model: Model, tokens: int, itemsize: int = 2) -> float:
    """What a block keeps of a pass forward for the one backward."""
    numbers = 6.5 * model.hidden + 2 * model.kv_heads * model.head_dim + 3 * model.intermediate * model.active
    return itemsize * tokens * numbers


def decomposing(model: Model) -> float:
    """The float64 matrices at work at a time on the matrix that needs most: to refit it to fewer neurons, four of (in, in)."""
    return max(8 * (4 * max(m.out, m.size) ** 2 + 3 * m.out * m.size) for m in model.matrices)


# Operations


def forward(model: Model, tokens: int, length: int = 0) -> Operations:
    """Of the targets of a block, and of attention among so many tokens, half of which each sees."""
    linear = sum(2 * m.count * m.share * m.out * m.size for m in model.matrices)
    return Operations(passes=tokens * (linear + 2 * length * model.heads * model.head_dim))


def gram(size: int) -> float:
    """Of a Gram matrix, for each token: the lower triangle is left out in blocks of rows."""
    blocks = 2 * math.ceil(size / 2 / BLOCK)
    return size**2 * (1 + 1 / blocks)


def sums(model: Model, tokens: int, gradients: bool = True) -> Operations:
    """Of the statistics of a block: with gradients, each input has two Gram matrices, and each output one."""
    each = sum(i.count * i.share * gram(i.size) for i in model.inputs) * (2 if gradients else 1)
    if gradients:
        each += sum(m.count * m.share * gram(m.out) for m in model.matrices)
    return Operations(sums=tokens * each)


def spectrum(out: int, size: int) -> Operations:
    """The directions of a matrix and what they cost: products, a Cholesky decomposition, eigenvalues."""
    small, large = sorted((out, size))
    return Operations(products=2 * large**2 * small + 4 * large * small**2, decompositions=5 / 3 * small**3)


def product(out: int, size: int, rank: int) -> Operations:
    """The factors of a matrix in pivot form: the same with eigenvectors, products for the rank, and an LU decomposition."""
    small = min(out, size)
    whitened = 2 * size**2 * rank if out > size else 2 * out**2 * size
    products = spectrum(out, size).products + whitened + 2 * out * size * rank + out * rank**2
    return Operations(products=products, decompositions=(9 + 1 / 3) * small**3 + 4 * out * rank**2)


def elimination(out: int, size: int, least: int, spectra: Sequence[int] = ()) -> Operations:
    """The order in which the neurons that a matrix reads are left out, and spectra of what is left, at some numbers."""
    updates = 2.2 * ((size**3 - least**3) / 3 + out * (size**2 - least**2) / 2)
    products = updates + 2 * out**2 * size + 2 * size**2 * out + sum(2 * out**2 * c for c in spectra)
    return Operations(products=products, decompositions=size**3 + len(spectra) * 4 / 3 * out**3)


def planning(model: Model) -> Operations:
    """Of a block: the spectra of its matrices, and the neurons of its MLPs with the spectra of what is left."""
    total = Operations()
    for m in model.matrices:
        total += spectrum(m.out, m.size) * m.count
    left = [round(part * model.intermediate) for part in COMPUTED]
    total += elimination(model.hidden, model.intermediate, counts(model.intermediate)[-1], left) * model.experts
    for count in left:
        total += spectrum(count, model.hidden) * (2 * model.experts)
    return total


def factorising(model: Model, keep: float = 0.5) -> Operations:
    """Of a block, all of whose matrices are kept to the same fraction; neurons are chosen again where inputs have changed."""
    total = Operations()
    for m in model.matrices:
        total += product(m.out, m.size, round(keep * m.out * m.size / (m.out + m.size))) * m.count
    return total


def one_shot(model: Model, tokens: int, length: int, passes: int, times: int = 1) -> Operations:
    """`compress`: so many passes over the data, forward or backward, in which each target is gathered once, or more times."""
    once = forward(model, tokens, length)
    return (once * passes + sums(model, tokens) * times + planning(model) + factorising(model)) * model.layers


def by_block(model: Model, tokens: int, length: int) -> Operations:
    """`compress` with `sequential`: calibration block by block, and two streams through each block.

    Of a block: a pass to keep its output, two with a graph, for planning and for factorising, then one of each stream for each
    of four groups of matrices and for the neurons, and for the outputs.
    """
    once = forward(model, tokens, length)
    passes = once * (1 + 2 * 2 + 2 * 5 + 4)
    neurons = elimination(model.hidden, model.intermediate, model.intermediate // 2) * model.experts
    inputs = Operations(sums=3 * sums(model, tokens, gradients=False).sums)  # Gram and cross product of both streams
    return (passes + sums(model, tokens) * 2 + inputs + planning(model) + factorising(model) + neurons) * model.layers


def directions(model: Model) -> int:
    """What planning keeps of all matrices for factorising, float32."""
    return 4 * model.layers * sum(m.count * min(m.out, m.size) ** 2 for m in model.matrices)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    tokens = options.sequences * options.length
    print(f"{options.sequences} × {options.length} tokens; rates {RATES}\n")
    print("| model | weights | statistics, one block | all | largest decomposition | activations kept | streams |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, model in MODELS.items():
        sizes = [
            2 * model.parameters, statistics(model), model.layers * statistics(model), decomposing(model),
            activations(model, tokens), streams(model, tokens),
        ]  # fmt: skip
        print(f"| {name} | " + " | ".join(f"{size / GB:.1f}" for size in sizes) + " |")
    print("\n| model | 80 GB | one-shot: GB on each | passes | hours | sequential: GB on each | hours |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, model in MODELS.items():
        for devices in (1, 8):
            weights = 2 * model.parameters
            of_block = graph(model, TOKENS_AT_A_TIME) + decomposing(model)
            working = of_block + graph(model, TOKENS_AT_A_TIME) * (model.layers - 1)
            least = weights + of_block + statistics(model)
            copies = least < DEVICE  # each accelerator holds the model
            spread = copies or least < devices * DEVICE
            if not spread:
                print(f"| {name} | {devices} | does not fit | | | does not fit | |")
                continue
            free = DEVICE - weights if copies else devices * DEVICE - weights
            limit = max(free / 2, statistics(model))
            fits = model.layers * statistics(model) <= limit
            share = 1 if copies else devices  # of memory
            workers = devices if copies else 1
            # Block by block it is one pass more forward, which keeps what blocks give. In one process the statistics of other
            # blocks wait on disk until they serve factorising; several gather them twice.
            times = 1 if workers == 1 or fits else 2
            forwards, backwards = times + (not fits), times
            beside = model.layers * statistics(model) if fits else min(limit, statistics(model) + directions(model))
            held = (weights + beside + (working if fits else of_block)) / share
            passes = f"{forwards}, {backwards}"
            shot = one_shot(model, tokens, options.length, forwards + backwards, times).seconds / 3600 / workers
            block = by_block(model, tokens, options.length).seconds / 3600 / workers
            of_blocks = held if fits else least / share
            where = f"{devices}" if copies else f"{devices}, split"
            print(f"| {name} | {where} | {held / GB:.0f} | {passes} | {shot:.2f} | {of_blocks / GB:.0f} | {block:.2f} |")


if __name__ == "__main__":
    main()
