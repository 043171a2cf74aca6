"""Blocks of every sort of model, and the inputs that are replayed for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.batches import images, pairs, text
from support.models import Skipping, bert, gpt2, llama, skipping, t5, vit
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from reparam_peft.blockwise.blocks import Replay, hollowed, main_tensor
from reparam_peft.runtime.blocks import find_blocks

TEXT = [text([12, 9, 12, 5], 12), text([10, 10, 3], 10, seed=1)]
PAIRS = [pairs([8, 3], [6, 2], (8, 6)), pairs([5, 5], [4, 1], (5, 4))]
ROWS = [{"x": torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)]
MODELS: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Tensor]], list[str]]] = {
    "llama": (llama, TEXT, ["model.layers.0", "model.layers.1"]),
    "gpt2": (gpt2, TEXT, ["transformer.h.0", "transformer.h.1"]),
    "bert": (bert, TEXT, ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]),
    "t5": (t5, PAIRS, ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
    "vit": (vit, [images(4, (3, 16, 16), "pixel_values")], ["vit.embeddings", "vit.layers.0", "vit.layers.1"]),
    "plain": (skipping, ROWS, [f"stages.{i}" for i in range(4)]),
}


@pytest.fixture(params=MODELS)
def replay(request: pytest.FixtureRequest) -> Replay:
    build, batches, _ = MODELS[request.param]
    model = build()
    return Replay(model, find_blocks(model), batches)


@pytest.mark.parametrize("key", MODELS)
def test_blocks_are_found_and_put_in_the_order_of_the_data_flow(key: str) -> None:
    build, batches, expected = MODELS[key]
    model = build()
    blocks = find_blocks(model)
    assert [name for name in blocks if name in expected] == expected
    assert Replay(model, dict(reversed(blocks.items())), batches).order == expected


def real_calls(replay: Replay, batch: int) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs of the blocks in a pass of the model itself."""
    calls, outputs = [], []
    handles = []
    for name in replay.order:
        block = replay.blocks[name]
        keep = lambda module, args, kwargs: calls.append([t.clone() for t in tensors((args, kwargs))])  # noqa: E731
        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
        clone = lambda module, args, output: outputs.append(cloned(output))  # noqa: E731
        handles.append(block.register_forward_hook(clone))
    options = {"use_cache": False} if hasattr(getattr(replay.model, "config", None), "use_cache") else {}
    with torch.no_grad():
        replay.model(**replay.batches[batch], **options)
    for handle in handles:
        handle.remove()
    return calls, outputs


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def cloned(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def test_inputs_are_replayed_to_the_bit_from_the_outputs_they_depend_on(replay: Replay) -> None:
    for batch in range(len(replay.batches)):
        calls, outputs = real_calls(replay, batch)
        for position in range(len(replay.order)):
            kept = replay.depends[position]
            given = {j: cloned(outputs[j]) if j in kept else hollowed(outputs[j]) for j in range(position)}
            got = tensors(replay.inputs(position, batch, given))
            assert len(got) == len(calls[position])
            assert all(torch.equal(a, b) for a, b in zip(got, calls[position], strict=True)), replay.order[position]


def test_dependencies_are_those_of_the_data_flow() -> None:
    depends = {key: Replay(m := MODELS[key][0](), find_blocks(m), MODELS[key][1]) for key in ("llama", "t5", "plain")}
    assert depends["llama"].depends == {0: set(), 1: {0}}
    assert depends["t5"].depends == {0: set(), 1: {0}, 2: {1}, 3: {1, 2}}
    assert depends["t5"].last_use == {0: 1, 1: 3, 2: 3, 3: 3}
    assert depends["plain"].depends == {0: set(), 1: {0}, 2: {1}, 3: {0, 2}}


def test_the_model_is_as_it_was(replay: Replay) -> None:
    model = replay.model
    caches = [module.config.use_cache for module in model.modules() if hasattr(getattr(module, "config", None), "use_cache")]
    with pytest.raises(ValueError, match=r"the model does not accept batch 0 \(\['nonsense'\]\)"):
        Replay(model, replay.blocks, [{"nonsense": torch.zeros(1)}])
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in replay.blocks.values())
    assert caches == [
        module.config.use_cache for module in model.modules() if hasattr(getattr(module, "config", None), "use_cache")
    ]


def test_a_block_that_runs_twice_is_refused() -> None:
    class Twice(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model = Twice()
    with pytest.raises(ValueError, match=r"^stages\.0: this block runs more than once in a pass"):
        Replay(model, find_blocks(model), ROWS)


def test_a_block_that_does_not_run_is_passed_by() -> None:
    class Short(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            return self.stages[0](x)

    model = Short(2)
    replay = Replay(model, find_blocks(model), ROWS)
    assert (replay.order, replay.unreached) == (["stages.0"], ["stages.1"])


def test_a_model_may_write_into_the_object_that_a_block_returns() -> None:
    class Splitting(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            output = {"hidden": x}
            for stage in self.stages:
                output = stage(output)
                output["hidden"] = output["hidden"].split(2)  # fails on what was written there before
                output = {"hidden": torch.cat(output["hidden"])}
            return output["hidden"]

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: dict[str, Tensor]) -> dict[str, Any]:
            return {"hidden": self.linear(x["hidden"])}

    model = Splitting(4)
    model.stages = nn.ModuleList(Stage() for _ in range(4))
    replay = Replay(model, find_blocks(model), ROWS)
    assert replay.depends == {0: set(), 1: {0}, 2: {1}, 3: {2}}


def test_what_happens_at_random_between_blocks_is_refused() -> None:
    class Noisy(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            return self.stages[1](self.stages[0](x) + torch.rand(1))

    model = Noisy(2)
    with pytest.raises(ValueError, match=r"stages\.1: the inputs of this block are not reproduced"):
        Replay(model, find_blocks(model), ROWS)


def test_hollow_outputs_have_shapes_and_no_numbers() -> None:
    output = hollowed((torch.ones(2, 3), torch.ones(4, dtype=torch.int64), "text"))
    assert output[0].isnan().all()
    assert output[0].shape == (2, 3)
    assert output[0].untyped_storage().nbytes() == 4
    assert output[1].tolist() == [0, 0, 0, 0]
    assert output[2] == "text"
    assert main_tensor((output[1], output[0])) is output[0]
    with pytest.raises(ValueError, match="returns no floating-point tensor to compare"):
        main_tensor(output[1])


def test_activations_of_nan_are_called_that_and_their_place_is_named() -> None:
    model = skipping()
    model.stages[1].linear.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^stages\.2: the inputs of this block hold NaN in batch 0"):
        Replay(model, find_blocks(model), [{"x": torch.ones(2, 8)}])
