"""A language model's table of embeddings: in 8 bits, and as a product.

    python tests/benchmarks/tables.py MODEL CALIBRATION TEST [--windows 8] [--keep 0.9]

MODEL has tied embeddings. Of each variant: bytes of the table, perplexity on the first windows of TEST, and the mean KL
divergence of its predictions from the model's, in nats per token. The product is the best one for the final hidden states of
CALIBRATION (whitened by their Gram matrix), in place of the head alone, and in place of both ends; and what `compress` makes of
both ends with `ensure_weight_tying=True`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from reparam_peft import ReparamConfig, compress
from reparam_peft.evaluation.text import text_batches
from reparam_peft.numerics.decompositions import factorize
from reparam_peft.numerics.storage import Storage, uniform_rank
from reparam_peft.standalone.tables import quantize_tables, tables_of

Batches = list[dict[str, Tensor]]


def hidden_gram(model: PreTrainedModel, batches: Batches) -> Tensor:
    """Of what the head reads, float64."""
    states = [model.model(**batch).last_hidden_state.flatten(0, 1).double() for batch in batches]
    rows = torch.cat(states)
    return rows.mT @ rows


def compared(model: PreTrainedModel, batches: Batches, expected: list[Tensor]) -> tuple[float, float]:
    """Perplexity, and the mean KL divergence from what was expected."""
    losses, divergences = [], []
    for batch, dense in zip(batches, expected, strict=True):
        predicted = model(**batch).logits.log_softmax(-1)
        losses.append(-predicted[:, :-1].gather(-1, batch["input_ids"][:, 1:, None]).mean())
        divergences.append((dense.exp() * (dense - predicted)).sum(-1).mean())
    return float(torch.stack(losses).mean().exp()), float(torch.stack(divergences).mean())


@torch.no_grad()
def main() -> None:
    """Print one line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--keep", type=float, default=0.9)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    seen, test = (
        text_batches(tokenizer, path.read_text(encoding="utf-8"), batch_size=1, limit=arguments.windows)
        for path in (arguments.calibration, arguments.test)
    )
    expected = [model(**batch).logits.log_softmax(-1) for batch in test]
    table = model.get_input_embeddings().weight
    rank = uniform_rank(arguments.keep, Storage(*table.shape))
    if rank is None:
        parser.error("--keep leaves the table as it is")

    def show(name: str, size: int) -> None:
        perplexity, divergence = compared(model, test, expected)
        print(f"{name:28} {size:>12,} bytes  perplexity {perplexity:8.3f}  KL {divergence:.5f}", flush=True)

    show("as it is", table.numel() * table.element_size())
    A, B = factorize(table, rank, hidden_gram(model, seen))
    product, size = nn.Parameter(A @ B), (A.numel() + B.numel()) * table.element_size()
    head = model.get_output_embeddings()
    head.weight = product
    show(f"product of rank {rank}, head", size)
    model.get_input_embeddings().weight = product
    show(f"product of rank {rank}, both", size)
    head.weight = model.get_input_embeddings().weight = table
    quantize_tables(model, tables_of(model))
    show("int8, both", table.numel() + 4 * len(table))
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    config = ReparamConfig(target_modules=["lm_head"], keep=arguments.keep, ensure_weight_tying=True)
    model = compress(model, config, seen, progress=False).eval()
    (stored,) = model.size_report().matrices
    show("ensure_weight_tying, both", stored.stored_bytes)


if __name__ == "__main__":
    main()
