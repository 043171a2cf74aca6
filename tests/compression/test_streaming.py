"""Checkpoints compressed block by block: the same as in memory, whole or absent, and taken up where they were killed."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft import get_peft_model
from support.models import bert, byte_tokenizer, gpt2, llama
from support.processes import started
from support.standalone import logits
from support.tolerances import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from reparam_peft import ReparamConfig, compress, compress_checkpoint
from reparam_peft.blockwise.gathering import BlockwiseGatherer
from reparam_peft.compression import streaming
from reparam_peft.runtime.blocks import block_of

CONFIG: dict[str, Any] = {"target_modules": "all-linear", "keep": 0.6}
BATCHES = [{"input_ids": torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(i))} for i in range(4)]


def source(folder: Path, model: PreTrainedModel | None = None, **options: Any) -> Path:
    (model or llama(**options)).save_pretrained(folder / "dense", max_shard_size="100KB")
    byte_tokenizer().save_pretrained(folder / "dense")
    return folder / "dense"


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("make", [llama, gpt2, bert], ids=lambda make: make.__name__)
def test_the_same_bytes_as_in_memory(make: Any, form: str, tmp_path: Path) -> None:
    dense = source(tmp_path, make())
    config = ReparamConfig(**CONFIG, form=form)
    report = compress_checkpoint(dense, tmp_path / "small", config, progress=False)
    assert report.keep <= 0.6
    get_peft_model(make(), config).to_standalone().save_pretrained(tmp_path / "memory")
    assert (tmp_path / "small/model.safetensors").read_bytes() == (tmp_path / "memory/model.safetensors").read_bytes()
    auto = AutoModelForSequenceClassification if make is bert else AutoModelForCausalLM
    assert_close(logits(auto.from_pretrained(tmp_path / "small")), logits(auto.from_pretrained(tmp_path / "memory")))
    assert (tmp_path / "small/tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert f"from transformers import {auto.__name__}" in (tmp_path / "small/README.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "memory", "small"]


@pytest.mark.parametrize(
    "options",
    [{"sequential": False}, {"sequential": True}, {"sequential": True, "refine": True}],
    ids=["one-shot", "sequential", "refined"],
)
def test_calibrated(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    gather = BlockwiseGatherer.gather
    monkeypatch.setattr(BlockwiseGatherer, "gather", lambda *args, **kw: gathered.append([*args[2]]) or gather(*args, **kw))
    compress_checkpoint(source(tmp_path), tmp_path / "small", ReparamConfig(**CONFIG), BATCHES, progress=False, **options)
    assert all(len({block_of(name, ["model.layers.0", "model.layers.1"]) for name in names}) == 1 for names in gathered)
    assert len(gathered) == 3, "to plan from the last block to the first, whose statistics are at hand then; the last again"
    expected = compress(llama(), ReparamConfig(**CONFIG), BATCHES, progress=False, **options).eval()
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small")), logits(expected))


def test_half_precision_stays(tmp_path: Path) -> None:
    compress_checkpoint(source(tmp_path, llama().bfloat16()), tmp_path / "small", ReparamConfig(**CONFIG), progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("batches", [None, BATCHES], ids=["data-free", "calibrated"])
def test_half_precision_is_never_widened(
    batches: list[dict[str, torch.Tensor]] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors of a checkpoint larger than memory stay in their files: PEFT would copy them to float32, to be trained."""
    dense = source(tmp_path, llama().bfloat16())
    widened = []
    made = streaming.PeftModel.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        widened.extend(name for name, p in self.named_parameters() if p.dtype != torch.bfloat16)

    monkeypatch.setattr(streaming.PeftModel, "__init__", counted)
    compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG), batches, progress=False)
    assert not widened


def fill_disk(dense: Path, small: Path, limit: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for printed in (1, 2):  # the limit holds for the files of a test's output, too
        os.dup2(nowhere, printed)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"cannot be written.*call again"):
        compress_checkpoint(dense, small, ReparamConfig(**CONFIG), progress=False)


@pytest.mark.parametrize("limit", [100, 20_000, 150_000], ids=["settings", "block", "checkpoint"])
def test_a_full_disk_loses_nothing(limit: int, tmp_path: Path) -> None:
    dense = source(tmp_path)
    before = {path.name: path.read_bytes() for path in dense.iterdir()}
    full = started(fill_disk, dense, tmp_path / "small", limit)
    full.join()
    assert full.exitcode == 0
    assert not (tmp_path / "small").exists()
    assert {path.name: path.read_bytes() for path in dense.iterdir()} == before
    compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG), progress=False)
    compress_checkpoint(dense, tmp_path / "other", ReparamConfig(**CONFIG), progress=False)
    for path in (tmp_path / "other").iterdir():
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "other", "small"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OSError, match="file cannot be written"):
        compress_checkpoint(source(tmp_path), tmp_path / "file/small", ReparamConfig(**CONFIG), progress=False)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize("batches", [None, BATCHES], ids=["data-free", "calibrated"])
def test_nan_in_a_weight_is_named_and_nothing_is_written(batches: list[dict[str, torch.Tensor]] | None, tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN"):
        compress_checkpoint(source(tmp_path, model), tmp_path / "small", ReparamConfig(**CONFIG), batches, progress=False)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("options", [{"keep_base": True}, {"modules_to_save": ["lm_head"]}])
def test_what_only_adapters_have_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has an effect on adapters only"):
        compress_checkpoint(source(tmp_path), tmp_path / "small", ReparamConfig(**CONFIG, **options), progress=False)


def test_an_error_in_the_middle_leaves_nothing_and_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = source(tmp_path)
    compress_checkpoint(dense, tmp_path / "whole", ReparamConfig(**CONFIG), progress=False)
    done = []
    original = streaming.factorize_targets

    def fails(targets: Any, *args: Any, **kwargs: Any) -> Any:
        if len(done) == 1:
            raise OSError(28, "No space left on device")
        done.append([*targets])
        return original(targets, *args, **kwargs)

    monkeypatch.setattr(streaming, "factorize_targets", fails)
    with pytest.raises(OSError, match="No space left"):
        compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG), progress=False)
    assert not (tmp_path / "small").exists()
    with pytest.raises(ValueError, match="another `config`"):
        compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**{**CONFIG, "keep": 0.5}), progress=False)
    first = done.pop()
    monkeypatch.setattr(streaming, "factorize_targets", lambda t, *a, **k: done.append([*t]) or original(t, *a, **k))
    compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG), progress=False)
    assert first not in done
    assert (tmp_path / "small/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def compress_to_be_killed(dense: Path, small: Path) -> None:
    compress_checkpoint(dense, small, ReparamConfig(**CONFIG), progress=False)


KILLS = 8


def test_killed_at_random_moments(tmp_path: Path) -> None:
    dense, whole, small = source(tmp_path, num_hidden_layers=4), tmp_path / "whole", tmp_path / "small"
    start = time.perf_counter()
    running = started(compress_to_be_killed, dense, whole)
    running.join()
    seconds = time.perf_counter() - start
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    moments, kills, finished = random.Random(0), 0, 0
    while kills < KILLS or not finished:
        running = started(compress_to_be_killed, dense, small)
        running.join(moments.uniform(0, seconds) if kills < KILLS else None)
        if running.exitcode is None:
            running.kill()
            running.join()
            kills += 1
        else:
            assert running.exitcode == 0
        if small.exists():
            assert {path.name: path.read_bytes() for path in small.iterdir()} == files
            if not (tmp_path / ".small.run").exists():
                shutil.rmtree(small)
                finished += 1


def test_killed_before_the_last_clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = source(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "remove_whole", lambda folder: None)
        compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG), progress=False)
    assert (tmp_path / ".small.run").exists()
    before = (tmp_path / "small/model.safetensors").stat().st_mtime_ns
    assert compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG), progress=False).keep <= 0.6
    assert not (tmp_path / ".small.run").exists()
    assert (tmp_path / "small/model.safetensors").stat().st_mtime_ns == before


def test_what_is_refused(tmp_path: Path) -> None:
    dense = source(tmp_path)
    before = {path.name: path.read_bytes() for path in dense.iterdir()}
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match=r"`destination` .*there exists"):
        compress_checkpoint(dense, tmp_path / "there", ReparamConfig(**CONFIG))
    with (
        FileLock(tmp_path / ".small.lock"),
        pytest.raises(ValueError, match=r"run is under way in .*small, by a process"),
    ):
        compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG))
    with pytest.raises(ValueError, match="`max_memory` has an effect with `batches` only"):
        compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG), max_memory=1)
    with pytest.raises(ValueError, match="needs calibration data"):
        compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG, method="whitened"))
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors"):
        compress_checkpoint(tmp_path / "there", tmp_path / "small", ReparamConfig(**CONFIG))
    compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG), progress=False)
    with pytest.raises(ValueError, match="is a checkpoint of LlamaForCausalLM, not of a plain model"):
        compress_checkpoint(tmp_path / "small", tmp_path / "smaller", ReparamConfig(**CONFIG))
    assert {path.name: path.read_bytes() for path in dense.iterdir()} == before
    assert not (tmp_path / "smaller").exists()


def test_a_destination_inside_of_its_source_is_refused_before_any_work(tmp_path: Path) -> None:
    dense = source(tmp_path)
    before = sorted(dense.rglob("*"))
    (tmp_path / "link").symlink_to(dense)
    for inside in (dense / "small", dense / "a" / "small", tmp_path / "link" / "small"):
        with pytest.raises(ValueError, match=r"`destination` .* is inside of `source`"):
            compress_checkpoint(dense, inside, ReparamConfig(**CONFIG), progress=False)
    assert sorted(dense.rglob("*")) == before


def test_code_of_the_source_is_neither_run_nor_published(tmp_path: Path) -> None:
    dense = source(tmp_path)
    config = json.loads((dense / "config.json").read_text())
    names_code = {"auto_map": {"AutoConfig": "code.A", "AutoModelForCausalLM": "code.B"}}
    (dense / "config.json").write_text(json.dumps({**config, **names_code}))
    (dense / "code.py").write_text("raise SystemExit")
    compress_checkpoint(dense, tmp_path / "small", ReparamConfig(**CONFIG), progress=False)
    assert not list((tmp_path / "small").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "small" / "config.json").read_text())


@pytest.mark.parametrize("holds", [[], ["precious.txt"]])
def test_a_destination_that_appears_meanwhile_is_left_and_finished_work_kept(
    holds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small = source(tmp_path), tmp_path / "small"
    with monkeypatch.context() as patch:
        copy_files = streaming.copy_files

        def meanwhile(*args: Any) -> None:
            copy_files(*args)
            small.mkdir()
            for name in holds:
                (small / name).write_text(name)

        patch.setattr(streaming, "copy_files", meanwhile)
        with pytest.raises(FileExistsError, match=r"the run into it has not made it. Its finished work is in .*\.small\.run"):
            compress_checkpoint(dense, small, ReparamConfig(**CONFIG), progress=False)
    with pytest.raises(FileExistsError, match="the run into it has not made it"):
        compress_checkpoint(dense, small, ReparamConfig(**CONFIG), progress=False)
    assert [path.name for path in small.iterdir()] == holds
    small.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(streaming, "factorize_targets", None)  # all blocks are finished
    assert compress_checkpoint(dense, small, ReparamConfig(**CONFIG), progress=False).keep <= 0.6
    assert (small / "config.json").exists()
    assert not (tmp_path / ".small.run").exists()
