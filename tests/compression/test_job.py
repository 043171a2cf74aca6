"""One call of `compress` or `plan`: its plan, its passes over the data, its processes, and errors in the middle."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from support.batches import Batch, pairs, read, text
from support.compressing import ALL, IMAGES, ROWS, TEXT, Q, batches_of, compressed, layers, planned
from support.model_state import assert_same_model, state_of
from support.models import Case, Net, bert, byte_tokenizer, convnet, gpt2, llama, mixture, net, t5
from support.processes import run_in_processes
from support.tolerances import relative_error
from torch import Tensor, nn

import reparam_peft.compression.job
from reparam_peft import Plan, ReparamConfig, Statistics, compress, plan, self_written
from reparam_peft.arguments import ReparamWarning
from reparam_peft.blockwise.gathering import BlockwiseGatherer
from reparam_peft.calibration.self_written import SelfWritten
from reparam_peft.compression import grouping
from reparam_peft.numerics.storage import uniform_rank
from reparam_peft.tuner.matrices import matrix_storage


@pytest.mark.parametrize("allocation", ["uniform", "loss"])
@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_a_plan_gives_the_model_that_was_planned(case: Case, form: str, allocation: str, tmp_path: Path) -> None:
    options = {"target_modules": case.target_modules, "form": form, "allocation": allocation}
    model = case.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = planned(model, batches_of(case), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not layers(model)
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == made
    assert str(loaded) == str(made)
    expected = compressed(case.model(), batches_of(case), **options)
    for one in (made, loaded):
        assert_same_model(compressed(case.model(), batches_of(case), arguments={"plan": one}, **options), expected)
    config = expected.peft_config["default"]
    assert made.ranks == config.rank_pattern
    assert sorted(made.dense_modules) == config.dense_modules
    assert made.stored_parameters == config.stored_parameters
    assert made.dense_parameters == config.dense_parameters
    assert made.predicted_loss == pytest.approx(config.predicted_loss)
    for module in made.modules:
        assert len(module.spectrum) == min(module.shape)
        assert module.predicted_loss == pytest.approx(sum(module.spectrum[module.rank :]) if module.rank else 0.0, abs=1e-12)
        assert f"{module.stored_parameters:,}" in str(made)


def test_a_plan_that_was_changed_by_hand_is_obeyed() -> None:
    made = planned(llama(), TEXT, target_modules=["q_proj", "v_proj"])
    fields = made.to_dict()
    fields["modules"] = [{**entry, "rank": 5} for entry in fields["modules"]]
    small = compressed(llama(), TEXT, target_modules=["q_proj", "v_proj"], arguments={"plan": Plan.from_dict(fields)})
    assert set(small.peft_config["default"].rank_pattern.values()) == {5}
    assert {layer.r["default"] for layer in layers(small).values()} == {5}


def test_a_plan_fills_in_what_the_config_leaves_open() -> None:
    made = planned(llama(), TEXT, **Q, method="svd", allocation="uniform", form="factors", keep=0.4)
    small = compress(llama(), ReparamConfig(**Q), TEXT, plan=made, progress=False)
    config = small.peft_config["default"]
    assert (config.method, config.allocation, config.form, config.keep) == ("svd", "uniform", "factors", 0.4)
    assert config.rank_pattern == made.ranks


def test_uniform_ranks_without_gradients_are_planned_without_reading_the_data() -> None:
    made = planned(llama(), read(TEXT), **Q, allocation="uniform", output_metric="none")
    assert (made.calibration_tokens, made.gradient_tokens, made.predicted_loss) == (0, 0, None)
    assert made.ranks


@pytest.mark.parametrize(
    ("build", "targets", "batches", "memory"),
    [
        (llama, "all-linear", TEXT, 4 * 3 * 160 * 161),
        (bert, ["query", "key", "value", "dense"], TEXT, 4 * 4 * 96 * 97),
        (t5, ["q", "k", "v", "o", "wi_0", "wi_1", "wo"], [pairs([8, 3], [6, 2], (8, 6))], 4 * 3 * 48 * 49),
        (convnet, ["conv0", "conv1"], IMAGES, 4 * (2 * 72 * 73 + 16 * 17)),
    ],
    ids=["Llama", "BERT", "T5", "Conv2d"],
)
def test_several_passes_give_what_one_gives(
    build: Callable[[], nn.Module], targets: Any, batches: list[Batch], memory: int
) -> None:
    whole = compressed(build(), iter(batches), target_modules=targets)
    model = build()
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    parts = compressed(model, iter(batches), target_modules=targets, arguments={"max_memory": memory})
    handle.remove()
    assert len(calls) >= 2 * len(batches), "several groups"
    assert_same_model(parts, whole, tolerance=1e-5)  # rows that are run by themselves are rounded in another way
    one = {k: v for k, v in vars(whole.peft_config["default"]).items() if k not in ("predicted_loss",)}
    assert {k: v for k, v in vars(parts.peft_config["default"]).items() if k not in ("predicted_loss",)} == one
    first, second = (
        planned(build(), batches, target_modules=targets),
        planned(build(), batches, target_modules=targets, arguments={"max_memory": memory}),
    )
    assert first.ranks == second.ranks
    assert first.predicted_loss == pytest.approx(second.predicted_loss)


@pytest.mark.parametrize(
    ("owner", "name", "refused"),
    [(BlockwiseGatherer, "gather", []), (reparam_peft.compression.job, "gather_statistics", ["course_of"])],
    ids=["by block", "in groups"],
)
def test_memory_holds_the_statistics_of_one_pass_at_a_time(
    owner: Any, name: str, refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = getattr(owner, name), []

    def gather(*args: Any, **options: Any) -> Statistics:
        assert all(earlier() is None for earlier in made), "the statistics of an earlier pass are still held"
        statistics = real(*args, **options)
        made.append(weakref.ref(statistics))
        return statistics

    monkeypatch.setattr(owner, name, gather)
    for function in refused:
        monkeypatch.setattr(grouping, function, lambda *args: None)
    compressed(llama(), TEXT, target_modules="all-linear", arguments={"max_memory": 4 * 3 * 160 * 161})
    assert len(made) > 2


def test_an_error_while_factorising_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import reparam_peft.numerics.decompositions as module

    real, count = module.factorize, iter(range(100))

    def fails(*args: Any) -> Any:
        if next(count) == 5:
            raise ValueError("no memory left")
        return real(*args)

    monkeypatch.setattr(module, "factorize", fails)
    model = llama()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"model\.layers\.\d.*_proj: no memory left"):
        compressed(model, TEXT, **ALL)
    assert state_of(model) == before
    assert not layers(model)


def test_a_target_that_no_gradient_reaches_gets_a_uniform_rank() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x), "other": self.unused(x)}

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="unused: no gradient reaches its output, so that its rank is uniform"):
        small = compressed(Two(), ROWS, target_modules=["first", "second", "unused"])
    ranks = small.peft_config["default"].rank_pattern
    assert ranks["unused"] == uniform_rank(0.5, matrix_storage(Two().unused, "unused", small.peft_config["default"]))
    assert small.size_report().keep <= 0.5


SHARED: dict[str, tuple[Callable[[], nn.Module], list[Batch], dict[str, Any]]] = {
    "pivot": (llama, [*TEXT, text([6, 6], 6, seed=3)], ALL),
    "factors": (bert, TEXT, {"target_modules": ["query", "key", "value", "dense"], "form": "factors"}),
    "uniform": (gpt2, TEXT, {"target_modules": ["c_attn", "c_fc"], "allocation": "uniform", "output_metric": "none"}),
    "autoencoder": (net, ROWS, {"target_modules": ["first", "second"], "method": "autoencoder"}),
    "embedding": (llama, TEXT, {"target_modules": ["embed_tokens"]}),
    "by block": (llama, TEXT, {"target_modules": "all-linear", "arguments": {"max_memory": 400_000}}),
    "many sizes": (gpt2, TEXT, {"target_modules": ["c_attn", "c_fc"], "form": "factors", "ceiling": 0.99, "keep": 0.9}),
    "fewer batches": (llama, TEXT[:1], ALL),
}


def run_process(rank: int, folder: str) -> None:
    """What each of two processes does: every entry of `SHARED`, its state and its plan written to files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for key, (build, batches, options) in SHARED.items():
        torch.manual_seed(rank)
        made = planned(build(), batches, **options)
        small = compressed(build(), iter(batches), **options)
        torch.save((small.state_dict(), small.peft_config["default"].to_dict(), made.to_dict()), f"{folder}/{key}.{rank}")
    written = SelfWritten(llama(), byte_tokenizer(), 3, 8, 0, False, Path(folder) / "run").batches()
    torch.save([batch["input_ids"] for batch in written], f"{folder}/text.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    run_in_processes(run_process, str(folder))
    return folder


@pytest.mark.parametrize("key", SHARED)
def test_two_processes_give_what_one_gives(key: str, shared: Path) -> None:
    build, batches, options = SHARED[key]
    small, made = compressed(build(), batches, **options), planned(build(), batches, **options)
    tolerance = 1e-5 if key == "autoencoder" else 1e-6  # whose steps enlarge the rounding of sums
    (state, config, first), (other, config_of_other, second) = (
        torch.load(shared / f"{key}.{rank}", weights_only=False) for rank in (0, 1)
    )
    assert config == config_of_other
    assert first == second
    assert state.keys() == other.keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        assert torch.equal(state[name], other[name]), name
        if tensor.is_floating_point():
            assert relative_error(state[name], tensor) < tolerance, name
        else:
            assert torch.equal(state[name], tensor), name
    assert Plan.from_dict(first).ranks == made.ranks == small.peft_config["default"].rank_pattern
    if options.get("output_metric") != "none":  # which needs no gradients
        assert Plan.from_dict(first).predicted_loss == pytest.approx(made.predicted_loss, rel=1e-6)
    assert config["calibration_tokens"] == small.peft_config["default"].calibration_tokens


def test_two_processes_write_the_text_that_one_writes(shared: Path) -> None:
    expected = [batch["input_ids"] for batch in self_written(llama(), byte_tokenizer(), 3, 8, batch_size=2, progress=False)]
    for rank in (0, 1):
        assert all(map(torch.equal, torch.load(shared / f"text.{rank}"), expected))


TOKENS = [{"x": torch.randn(8, 30, 16, generator=torch.Generator().manual_seed(0))}]
LEFT_OUT = {"target_modules": "all-linear", "keep": 0.6}


@pytest.mark.parametrize("max_memory", [None, 21_000])
@pytest.mark.parametrize("allocation", ["loss", "uniform"])
def test_targets_that_no_batch_reaches_stay_dense_where_they_were_not_named(allocation: str, max_memory: int | None) -> None:
    config = ReparamConfig(**LEFT_OUT, allocation=allocation)
    with pytest.warns(ReparamWarning, match=r"No batch reached 2 targets, beside 7 others.*experts\.3\.\* \(2\)"):
        chosen = plan(mixture(), config, TOKENS, max_memory=max_memory, progress=False)
    assert chosen.unreached == ("experts.3.0", "experts.3.2")
    tokens = {module.name: module.tokens or 0 for module in chosen.modules}
    assert sum(tokens[f"experts.{expert}.0"] for expert in range(3)) == tokens["router"] == 240
    assert str(chosen).splitlines()[1].split()[-1] == "240"
    assert Plan.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    small = compress(mixture(), config, TOKENS, plan=chosen, progress=False)
    assert not any("experts.3" in name for name in small.peft_config["default"].rank_pattern)
    assert small.size_report().keep <= 0.6
    with pytest.warns(ReparamWarning, match="No batch reached"):
        again = compress(mixture(), config, TOKENS, progress=False)
    assert again.peft_config["default"].rank_pattern == small.peft_config["default"].rank_pattern


def test_where_targets_were_named_all_that_are_not_reached_are_listed() -> None:
    named = {"target_modules": r"experts\.\d\.(0|2)", "keep": 0.6}
    with pytest.raises(ValueError, match=r"no batch reached these 2 of 8 targets: experts\.3\.\* \(2\).*unreached='dense'"):
        compress(mixture(), ReparamConfig(**named), TOKENS, progress=False)
    with pytest.raises(ValueError, match="no batch reached these 2 of 9 targets"):
        compress(mixture(), ReparamConfig(**LEFT_OUT, unreached="error"), TOKENS, progress=False)
    with pytest.warns(ReparamWarning, match="No batch reached 2 targets, beside 6"):
        compress(mixture(), ReparamConfig(**named, unreached="dense"), TOKENS, progress=False)
    with pytest.raises(ValueError, match="`unreached` has an effect with calibration data only"):
        get_peft_model(mixture(), ReparamConfig(**named, unreached="dense"))


def test_where_nothing_is_reached_nothing_is_left_out() -> None:
    with pytest.raises(ValueError, match="unused: no batch reached this module"):
        compress(net(), ReparamConfig(target_modules=["unused"], unreached="dense"), ROWS, progress=False)


@pytest.mark.parametrize(
    "options",
    [{"budget": "bytes", "keep": 0.13}, {"budget": "bytes", "keep": 0.3, "bits": [16, 8]}, {"form": "corrected", "r": 16}],
    ids=str,
)
def test_numbers_in_few_bits_take_the_bytes_and_lose_about_what_is_planned(options: dict[str, Any], tmp_path: Path) -> None:
    dense, small = llama(attention_bias=True), llama(attention_bias=True)
    targets = {"target_modules": "all-linear", "rank_multiple": None}
    made = planned(dense, TEXT, **targets, **options)
    made.save(tmp_path / "plan.json")
    assert str(Plan.load(tmp_path / "plan.json")) == str(made)
    small = compressed(small, TEXT, arguments={"plan": made}, **targets, keep=made.keep)
    at_once = compressed(llama(attention_bias=True), TEXT, **targets, **options)
    for name, tensor in at_once.state_dict().items():  # what planning found serves factorising, and changes nothing
        torch.testing.assert_close(tensor, small.state_dict()[name], msg=name)
    sizes = small.size_report().to_dict()["targets"]
    assert sizes["stored_bytes"] == made.stored_bytes
    assert sizes["dense_bytes"] == made.dense_bytes
    if options.get("budget"):
        assert made.stored_bytes <= options["keep"] * sizes["dense_bytes"]
        assert len({*small.peft_config["default"].bit_pattern.values()} & set(options.get("bits", [8, 4]))) > 0
    else:
        assert set(made.ranks.values()) == {16}
    assert made.bits == small.peft_config["default"].bit_pattern
    with torch.no_grad():
        outputs = [model(**TEXT[0]).logits.double().log_softmax(-1) for model in (dense, small)]
    divergence = float((outputs[0].exp() * (outputs[0] - outputs[1])).sum(-1).mean())
    assert made.predicted_loss is not None
    assert 0.2 * made.predicted_loss < divergence < 5 * made.predicted_loss + 1e-6
