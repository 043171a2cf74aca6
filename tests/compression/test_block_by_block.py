"""`compress` block by block: every sort of model, both forms, killed and resumed, and what is refused."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM, PeftModel
from support.batches import Batch, images, pairs, text
from support.block_by_block import ALL, REFINE, TEXT, WAYS, by_block
from support.compressing import config_of, layers
from support.model_state import assert_same_model, state_of
from support.models import bert, convnet, gpt2, llama, qwen_moe, t5, vit
from support.processes import run_in_processes, started
from support.tolerances import assert_close
from torch import Tensor, nn

from reparam_peft import Anchoring, Refinement, ReparamConfig, calibrate, compress, plan, retruncate
from reparam_peft.blockwise import gathering
from reparam_peft.calibration.statistics import Statistics
from reparam_peft.runtime.run_folder import RunFolder

PAIRS = [pairs([20, 13, 20, 20], [16, 12, 16, 16], (20, 16), seed=seed) for seed in range(8)]
IMAGES = [images(8, (3, 16, 16), "pixel_values", seed=seed) for seed in range(8)]
MODELS: dict[str, tuple[Callable[[], nn.Module], list[Batch], Any]] = {
    "llama": (llama, TEXT, "all-linear"),
    "gpt2": (gpt2, TEXT, ["c_attn", "c_proj", "c_fc"]),
    "bert": (bert, TEXT, ["query", "key", "value", "dense"]),
    "t5": (t5, PAIRS, ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]),
    "vit": (vit, IMAGES, "all-linear"),
    "qwen moe": (qwen_moe, TEXT, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    "embedding, too": (llama, TEXT, ["embed_tokens", "q_proj", "o_proj", "up_proj", "down_proj"]),
}

# Every way in every form with one model, and every model with "both", which goes through the others; some pairs beside.
SORTS = [("llama", way, form) for way in WAYS for form in ("factors", "pivot")]
SORTS += [(key, "both", ("factors", "pivot")[number % 2]) for number, key in enumerate(MODELS) if key != "llama"]
SORTS += [("gpt2", "residual", "pivot"), ("bert", "sequential", "factors"), ("qwen moe", "refined", "factors")]


def outputs(model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**batch)[0] for batch in batches]


def deviation(model: nn.Module, build: Callable[[], nn.Module], batches: list[Batch]) -> float:
    got, expected = outputs(model, batches), outputs(build(), batches)
    return sum(float((a - b).square().sum() / b.square().sum()) for a, b in zip(got, expected, strict=True))


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("key", "way", "form"), SORTS)
def test_models_of_every_sort(key: str, way: str, form: str, tmp_path: Path) -> None:
    build, batches, targets = MODELS[key]
    options = {"target_modules": targets, "form": form, "keep": 0.5}
    model = build().train()
    arguments = {**WAYS[way], "run_folder": tmp_path / "run"}
    if key == "gpt2" and "refine" in arguments:
        arguments["refine"] = replace(REFINE, epochs=3)  # two do not improve a random GPT-2
    small = by_block(model, batches, arguments, **options)
    one_shot = by_block(build(), batches, **options)
    assert small.size_report().keep == one_shot.size_report().keep <= 0.5
    assert small.peft_config["default"].rank_pattern == one_shot.peft_config["default"].rank_pattern
    entries = [entry for entry in log_of(tmp_path / "run") if "before" in entry]
    assert entries
    for entry in entries:
        assert entry["after"] <= entry["before"]
        assert entry["original"] <= entry["before"] or entry["position"] > 0
        assert entry["after"] == pytest.approx(min([entry["before"], *entry.get("epochs", [])]))
    if "refine" in WAYS[way]:
        # The blocks of a random BERT hardly depend on their matrices.
        assert key == "bert" or any(entry["after"] < entry["before"] for entry in entries)
    if key == "llama":
        assert deviation(small, build, batches) < deviation(one_shot, build, batches)
    got = outputs(small, batches)
    small.save_pretrained(tmp_path / "saved")
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(build(), tmp_path / "saved", low_cpu_mem_usage=low_memory).eval()
        assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, batches), got, strict=True))
        assert loaded.size_report() == small.size_report()
    for merged, expected in zip(outputs(loaded.merge_and_unload(), batches), got, strict=True):
        assert_close(merged, expected)


def test_every_route_loads_what_was_refined(tmp_path: Path) -> None:
    base, saved = tmp_path / "base", tmp_path / "saved"
    llama().save_pretrained(base)
    small = by_block(llama().from_pretrained(base), TEXT, WAYS["both"], keep=0.7)
    assert set(small.peft_config["default"].dense_modules) & set(small.peft_config["default"].modules_to_save)
    small.save_pretrained(saved)
    expected = outputs(small, TEXT)
    loaded = AutoPeftModelForCausalLM.from_pretrained(saved).eval()
    other = llama()
    other.load_adapter(str(saved))
    two = PeftModel.from_pretrained(llama(), saved)
    two.load_adapter(saved, "second")
    two.set_adapter("second")
    for model in (loaded, other.eval(), two.eval()):
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, TEXT), expected, strict=True))
    two.delete_adapter("default")
    assert all(torch.equal(a, b) for a, b in zip(outputs(two, TEXT), expected, strict=True))


def test_the_original_is_there_with_keep_base() -> None:
    small = by_block(llama(), TEXT, WAYS["both"], keep_base=True)
    assert small.peft_config["default"].modules_to_save
    with small.disable_adapter():
        got = outputs(small, TEXT)
    assert all(torch.equal(a, b) for a, b in zip(got, outputs(llama(), TEXT), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(small.unload().state_dict().values(), llama().state_dict().values(), strict=True)
    )


def test_later_layers_make_up_for_what_earlier_ones_became() -> None:
    """Anchoring fits the outputs of the original better than products that see the original's inputs only."""
    batches = [text([24] * 8, 24, seed=seed) for seed in range(8)]
    errors = {}
    for name, arguments in {"one-shot": {}, "sequential": {"sequential": Anchoring(1.0, 0.0)}}.items():
        small = by_block(llama(), batches, arguments, keep=0.4, output_metric="none", allocation="uniform")
        errors[name] = deviation(small, llama, batches)
    assert errors["sequential"] < errors["one-shot"]


def test_without_anchor_and_drift_the_first_block_is_that_of_one_shot() -> None:
    small = by_block(llama(), TEXT, {"sequential": Anchoring(0.0, 0.0)}, allocation="uniform", output_metric="none")
    one_shot = by_block(llama(), TEXT, allocation="uniform", output_metric="none")
    mine, theirs = layers(small), layers(one_shot)
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}"
        assert_close(mine[name].dense_matrix("default"), theirs[name].dense_matrix("default"), torch.bfloat16)


@pytest.mark.parametrize("arguments", [{"offload_folder": "off", "max_memory": 720_000}, {"device": "cpu", "statistics": True}])
def test_where_things_are_kept_makes_no_difference(arguments: dict[str, Any], tmp_path: Path) -> None:
    given = dict(arguments)
    if "offload_folder" in given:
        given["offload_folder"] = tmp_path / "off"
    if "statistics" in given:
        given["statistics"] = calibrate(llama(), config_of(**ALL), TEXT, progress=False)
    expected = by_block(llama(), TEXT, WAYS["both"])
    tolerance = 1e-4 if "max_memory" in given else 0.0  # rows that are run by themselves are rounded in another way
    assert_same_model(by_block(llama(), iter(TEXT), {**WAYS["both"], **given}), expected, tolerance)
    assert not list(tmp_path.rglob("activations-*"))


def test_a_plan_is_obeyed() -> None:
    ranks = plan(llama(), config_of(**ALL, keep=0.4), TEXT, progress=False)
    small = by_block(llama(), TEXT, {**WAYS["both"], "plan": ranks}, keep=0.4)
    assert small.peft_config["default"].rank_pattern == ranks.ranks


class Twice(nn.Module):
    """Two lists of blocks, of which the name of one is the ending of that of the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
        self.early_layers = nn.ModuleList(copy.deepcopy(block) for _ in range(2))
        self.layers = nn.ModuleList(copy.deepcopy(block) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.early_layers, *self.layers):
            x = block(x)
        return x


def test_dense_targets_whose_names_are_endings_of_others_stay_as_they_are() -> None:
    batches = [{"x": torch.randn(8, 12, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    small = by_block(Twice(), batches, WAYS["both"], keep=0.6, dense_modules=["layers.0.0", "layers.1.2"])
    assert torch.equal(small.get_base_model().layers[0][0].weight, Twice().layers[0][0].weight)
    assert not layers(small).keys() & {"layers.0.0", "layers.1.2"}


def test_padding_changes_nothing() -> None:
    """The same sequences, longer padded."""

    def padded(batch: Batch) -> Batch:
        return {key: torch.nn.functional.pad(value, (0, 5)) for key, value in batch.items()}

    config = {"allocation": "uniform", "output_metric": "none"}
    short = by_block(llama(), TEXT, WAYS["sequential"], **config)
    longer = by_block(llama(), [padded(batch) for batch in TEXT], WAYS["sequential"], **config)
    for name, layer in layers(short).items():
        assert_close(layers(longer)[name].dense_matrix("default"), layer.dense_matrix("default"), torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    small = by_block(llama().to(dtype), TEXT, {**WAYS["both"], "run_folder": tmp_path / "run"})
    assert any(entry["after"] < entry["before"] for entry in log_of(tmp_path / "run"))
    small.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(llama().to(dtype), tmp_path / "saved").eval()
    for got, expected in zip(outputs(loaded, TEXT), outputs(small, TEXT), strict=True):  # whose factors are float32, to train
        assert_close(got, expected)


def test_it_trains_on_afterwards() -> None:
    small = by_block(llama(), TEXT, WAYS["both"])
    small.train()
    small.get_base_model().gradient_checkpointing_enable()
    small.enable_input_require_grads()
    loss = small(**TEXT[0], labels=TEXT[0]["input_ids"]).loss
    loss.backward()
    trained = {name for name, parameter in small.named_parameters() if parameter.grad is not None}
    assert any("norm" in name for name in trained)
    assert any("reparam_factors" in name for name in trained)


# Killed and resumed


class Killed(BaseException):
    """As a kill: nobody catches it."""


@pytest.mark.parametrize(("finished", "way"), [(1, "both"), (2, "sequential"), (3, "both")])
def test_a_run_that_was_killed_ends_with_the_same_bits(
    finished: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build: Callable[[], nn.Module] = lambda: llama(num_hidden_layers=3)  # noqa: E731
    arguments = {**WAYS[way], "run_folder": tmp_path / "run"}
    expected = by_block(build(), TEXT, {**WAYS[way], "run_folder": tmp_path / "whole"})
    real = RunFolder.finish

    def finish(self: RunFolder, entry: dict[str, Any], tensors: Any) -> None:
        real(self, entry, tensors)
        if len(self.finished) == finished:
            raise Killed

    model = build()
    before = state_of(model)
    with monkeypatch.context() as context:
        context.setattr(RunFolder, "finish", finish)
        with pytest.raises(Killed):
            by_block(model, TEXT, arguments)
    assert state_of(model) == before
    blocks = sorted((tmp_path / "run").glob("block-*"))
    assert len(blocks) == finished
    times = [path.stat().st_mtime_ns for path in blocks]
    resumed = by_block(build(), TEXT, arguments)
    assert_same_model(resumed, expected)
    assert resumed.peft_config["default"].to_dict() == expected.peft_config["default"].to_dict()
    assert times == [path.stat().st_mtime_ns for path in blocks], "finished blocks are not computed again"
    log, whole = log_of(tmp_path / "run"), log_of(tmp_path / "whole")
    assert [entry | {"seconds": 0} for entry in log] == [entry | {"seconds": 0} for entry in whole]
    assert_same_model(by_block(build(), TEXT, arguments), expected)  # everything is finished


def run_to_be_killed(run: str, saved: str) -> None:
    by_block(llama(num_hidden_layers=4), TEXT, {**WAYS["both"], "run_folder": run}).save_pretrained(saved)


def test_a_process_that_is_killed_at_any_moment(tmp_path: Path) -> None:
    def process(name: str) -> BaseProcess:
        return started(run_to_be_killed, str(tmp_path / name), str(tmp_path / f"{name}-saved"))

    whole = process("whole")
    for blocks in (1, 2):
        killed = process("killed")
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "killed").glob("block-*.safetensors"))) < blocks and time.monotonic() < deadline:
            time.sleep(0.002)
        killed.kill()
        killed.join()
        assert not (tmp_path / "killed-saved").exists()
    resumed = process("killed")
    for finished in (whole, resumed):
        finished.join()
        assert finished.exitcode == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed-saved" / name).read_bytes() == (tmp_path / "whole-saved" / name).read_bytes()


# What is refused


@pytest.mark.parametrize(
    ("model", "batches", "options", "arguments", "error", "message"),
    [
        (convnet, [images(2, (3, 10, 9), "x")], {"target_modules": ["conv0"]}, {"refine": True}, ValueError, "has no blocks"),
        (llama, TEXT, {"method": "svd"}, {"sequential": True}, ValueError, "`sequential` needs one of the methods"),
        (llama, TEXT, {}, {"device": "cpu"}, ValueError, "`device` has an effect with"),
        (llama, TEXT, {}, {"refine": 3}, TypeError, "`refine` must be True, False or options of type Refinement, got 3"),
        (llama, TEXT, {}, {"sequential": Refinement()}, TypeError, "`sequential` must be True, False or options of type Anch"),
        (llama, [], {}, {"sequential": True}, ValueError, "`batches` must hold at least one batch"),
        (llama, [{"nonsense": torch.zeros(1)}], {}, {"sequential": True}, ValueError, "does not accept batch 0"),
    ],
)
def test_what_is_refused(model: Any, batches: Any, options: Any, arguments: Any, error: type[Exception], message: str) -> None:
    made = model()
    before = state_of(made)
    with pytest.raises(error, match=message):
        by_block(made, batches, arguments, **options)
    assert state_of(made) == before


def test_statistics_alone_are_refused() -> None:
    known = calibrate(llama(), config_of(**ALL), TEXT, progress=False)
    with pytest.raises(ValueError, match="need the data themselves; give them as `batches`"):
        by_block(llama(), known, {"sequential": True})
    with pytest.raises(ValueError, match="`statistics` has an effect with `sequential` or `refine` only"):
        by_block(llama(), TEXT, {"statistics": known})


@pytest.mark.parametrize("content", ["{", "{}", '{"format": "another"}'])
def test_a_plan_that_is_damaged_in_the_folder_is_told(content: str, tmp_path: Path) -> None:
    by_block(llama(), TEXT, {"sequential": True, "run_folder": tmp_path / "run"})
    (tmp_path / "run" / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=r"plan\.json is not as the run wrote it"):
        by_block(llama(), TEXT, {"sequential": True, "run_folder": tmp_path / "run"})


@pytest.mark.parametrize("way", ["sequential", "both"])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import reparam_peft.numerics.decompositions as module

    real, count = module.factorize, iter(range(100))

    def fails(*args: Any) -> Any:
        if next(count) == 9:
            raise ValueError("no memory left")
        return real(*args)

    monkeypatch.setattr(module, "factorize", fails)
    model = llama()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1: .*proj: no memory left"):
        by_block(model, TEXT, WAYS[way])
    assert state_of(model) == before
    assert not layers(model)
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_callers_batches_and_config_stay_as_they_are() -> None:
    batches = [{key: value.clone() for key, value in batch.items()} for batch in TEXT]
    config = config_of(**ALL)
    before = dict(vars(config))
    compress(llama(), config, batches, progress=False, **WAYS["both"])
    assert vars(config) == before
    assert all(torch.equal(a[key], b[key]) for a, b in zip(batches, TEXT, strict=True) for key in a)


# Two processes


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(rank)
    small = by_block(llama(), TEXT, {**WAYS["both"], "run_folder": f"{folder}/run"})
    small.save_pretrained(f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_end_with_one_model(tmp_path: Path) -> None:
    run_in_processes(run_process, str(tmp_path))
    one, two = (PeftModel.from_pretrained(llama(), tmp_path / str(rank)).eval() for rank in (0, 1))
    assert_same_model(one, two)
    alone = by_block(llama(), TEXT, WAYS["both"])
    for a, b in zip(outputs(one, TEXT), outputs(alone, TEXT), strict=True):
        assert_close(a, b, torch.float16)
    assert len(log_of(tmp_path / "run")) == 2


def test_what_was_refined_is_truncated_and_healed(tmp_path: Path) -> None:
    small = by_block(llama(), TEXT, WAYS["both"], keep=0.6)
    assert set(small.peft_config["default"].dense_modules) & set(small.peft_config["default"].modules_to_save)
    for keep, batches in ((0.5, TEXT), (0.4, None)):
        retruncate(small, keep, batches, progress=False)
        small.save_pretrained(tmp_path / str(keep))
        loaded = PeftModel.from_pretrained(llama(), tmp_path / str(keep)).eval()
        assert loaded.size_report().keep <= keep
        assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, TEXT), outputs(small, TEXT), strict=True))


def test_what_fits_is_gathered_by_passes_over_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "Tape", None)
    options = {"target_modules": ["model.layers.0.self_attn.q_proj"], "rank_multiple": 2}
    assert compress(llama(), ReparamConfig(**options), TEXT, sequential=True, progress=False)


@pytest.mark.parametrize("way", ["sequential", "refined"])
def test_statistics_are_forgotten_as_matrices_are_factorised(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    forget = Statistics.forget

    def noted(self: Statistics, module: str) -> None:
        forgotten.append(module)
        forget(self, module)

    monkeypatch.setattr(Statistics, "forget", noted)
    small = by_block(llama(), arguments=WAYS[way])
    assert len(forgotten) == len(set(forgotten))
    assert set(forgotten) >= set(layers(small))


def test_statistics_that_were_given_stay_whole() -> None:
    statistics = calibrate(llama(), config_of(**ALL), TEXT, progress=False)
    before = statistics.fingerprint()
    by_block(llama(), arguments={**WAYS["sequential"], "statistics": statistics})
    assert statistics.fingerprint() == before
