"""The formulas of tests/benchmarks/costs_on_paper.py, held against what is counted and measured on tiny models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.gathering import linear_layers
from support.models import llama
from support.versions import unless
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reparam_peft.blockwise.gathering import BlockwiseGatherer
from reparam_peft.calibration.gather import gather_statistics
from reparam_peft.numerics.decompositions import direction_losses, factorize
from reparam_peft.numerics.neurons import eliminate
from reparam_peft.numerics.pivoting import pivot
from reparam_peft.runtime.blocks import find_blocks

SCRIPT = Path(__file__).parent / "benchmarks" / "costs_on_paper.py"
LENGTH, SEQUENCES = 24, 2


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("costs_on_paper", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["costs_on_paper"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


paper = loaded()


def sizes(model: Any) -> Any:
    config = model.config
    return paper.Model(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
    )


def counted(run: Any) -> int:
    """Multiplications and additions of matrix products."""
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops()


def of_one_block(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in linear_layers(model).items() if ".layers.1." in name}


@unless("torch", "2.8", "counts operations of attention that later ones do not")
def test_bytes_and_operations_of_a_calibration() -> None:
    model = llama()
    on_paper, tokens = sizes(model), LENGTH * SEQUENCES
    batches = [{"input_ids": torch.randint(3, 100, (1, LENGTH))} for _ in range(SEQUENCES)]
    modules, starts = of_one_block(model), linear_layers(model).values()
    with BlockwiseGatherer(find_blocks(model)) as gatherer:

        def gather() -> Any:
            return gatherer.gather(model, modules, batches, starts=starts, progress=False)

        statistics = gather()
        records = [*statistics.inputs.values(), *statistics.outputs.values()]
        assert sum(tensor.nbytes for record in records for _, tensor in record.tensors()) == paper.statistics(on_paper)
        again = counted(gather)
        kept = [leaf for value in gatherer.store.kept.values() for leaf in (value if isinstance(value, list) else [value])]
        held = sum(tensor.nbytes for tensor in kept if isinstance(tensor, Tensor))
        assert held == paper.activations(on_paper, tokens, itemsize=4)
    passes = 2 * paper.forward(on_paper, tokens).passes
    assert again == pytest.approx(passes + paper.sums(on_paper, tokens).sums, rel=0.02)
    bare = counted(lambda: gather_statistics(model, modules, batches, gradients=False, progress=False))
    of_all = 2 * paper.forward(on_paper, tokens).passes + paper.sums(on_paper, tokens, gradients=False).sums
    assert bare == pytest.approx(of_all, rel=0.02)
    assert on_paper.parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)


def test_the_graph_of_a_block() -> None:
    model = llama().requires_grad_(False)
    on_paper, kept = sizes(model), dict[int, int]()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    x = torch.randn(1, 64, on_paper.hidden, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    positions = model.model.rotary_emb(x, torch.arange(64)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers[0](x.clone(), position_embeddings=positions)
    assert paper.graph(on_paper, 64, itemsize=4) == pytest.approx(sum(kept.values()), rel=0.2)


@pytest.mark.parametrize("shape", [(48, 48), (96, 48), (48, 96)])
def test_operations_of_factorising(shape: tuple[int, int]) -> None:
    out, size = shape

    def metric(n: int) -> Tensor:
        X = torch.randn(n, 2 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        return X @ X.mT / n

    W, G, F = torch.randn(shape), metric(size), metric(out)
    rank, least, spectra = 20, size // 4, [size * 7 // 8, size * 5 // 8]
    assert counted(lambda: direction_losses(W, G, F, G, F)) == pytest.approx(paper.spectrum(out, size).products, rel=0.02)
    made = counted(lambda: pivot(factorize(W, rank, G, F), G, torch.float32))
    assert made == pytest.approx(paper.product(out, size, rank).products, rel=0.05)
    chosen = counted(lambda: eliminate(W, G, F, least, block=1, spectra_at=spectra))
    assert chosen == pytest.approx(paper.elimination(out, size, least, spectra).products, rel=0.15)


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["costs_on_paper.py"])
    paper.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1B", "| 8B", "| 70B", "| 30B-A3B"))]
    page = (Path(__file__).parents[1] / "docs" / "costs.md").read_text(encoding="utf-8")
    assert len(rows) == 12
    assert all(row in page for row in rows), "docs/costs.md has other figures: run the script"
