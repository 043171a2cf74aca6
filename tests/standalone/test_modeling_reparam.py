"""Self-contained checkpoints: read by torch and transformers alone, with the code that they bring."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from support.few_bits import FEW_BITS
from support.models import bert, gpt2, llama, t5, token_inputs, vit
from support.narrow import narrowed
from support.processes import run_stock
from support.standalone import IDS, NARROW, STOCK, logits, small
from torch import nn
from transformers import PreTrainedModel

from reparam_peft.standalone.auto_classes import auto_class
from reparam_peft.standalone.modeling_reparam import Coded, check_layer, name_rope_as_before
from reparam_peft.standalone.self_contained import save_self_contained

READER = """
import sys
import torch
import transformers
auto, folder, inputs, outputs = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
assert not [name for name in sys.modules if name.split(".")[0] in ("reparam_peft", "peft")]
with torch.no_grad():
    result = model(**torch.load(inputs, weights_only=True))
torch.save(result[0], outputs)
model.save_pretrained(folder + "/again")
again = getattr(transformers, auto).from_pretrained(folder + "/again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(**torch.load(inputs, weights_only=True))[0], result[0])
"""


def read(auto: str, folder: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model computes in a process of its own, without this package."""
    torch.save(batch, folder / "inputs.pt")
    paths = [folder, folder / "inputs.pt", folder / "outputs.pt"]
    done = run_stock(READER, auto, *paths)
    assert done.returncode == 0, done.output
    return torch.load(folder / "outputs.pt", weights_only=True)


CASES: dict[str, tuple[Callable[[], PreTrainedModel], str, dict[str, object]]] = {
    "linear": (llama, "AutoModelForCausalLM", {}),
    "bias": (bert, "AutoModelForSequenceClassification", {}),
    "Conv1D": (gpt2, "AutoModelForCausalLM", {}),
    "encoder-decoder": (t5, "AutoModelForSeq2SeqLM", {}),
    "convolution": (vit, "AutoModelForImageClassification", {"target_modules": ["projection", "up_proj"]}),
    "embedding": (llama, "AutoModelForCausalLM", {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize(("name", "form"), [("linear", "factors"), *((name, "pivot") for name in CASES)])
def test_the_reader_computes_the_same(name: str, form: str, tmp_path: Path) -> None:
    make, auto, options = CASES[name]
    batch = {"pixel_values": torch.rand(2, 3, 16, 16)} if make is vit else token_inputs()
    if make is t5:
        batch["decoder_input_ids"] = IDS
    plain = small(form, make(), **options).to_standalone()
    with torch.no_grad():
        expected = plain(**batch).logits
    save_self_contained(plain, tmp_path)
    torch.testing.assert_close(read(auto, tmp_path, batch), expected)
    assert plain.config.quantization_config is plain.hf_quantizer.quantization_config, "the model stays as it was"


@pytest.mark.parametrize(("make", "form"), [(llama, "pivot"), (gpt2, "factors"), (bert, "pivot")])
def test_the_reader_computes_with_fewer_neurons(make: Callable[[], PreTrainedModel], form: str, tmp_path: Path) -> None:
    plain = narrowed(make(), form=form).to_standalone()
    save_self_contained(plain, tmp_path)
    read_here = getattr(transformers, auto_class(plain)).from_pretrained(tmp_path, trust_remote_code=True)
    assert type(read_here).__module__.startswith("transformers_modules."), "the code that came along"
    with torch.no_grad():
        torch.testing.assert_close(read_here(**token_inputs())[0], plain(**token_inputs())[0])
    read_here.save_pretrained(tmp_path / "again")
    tensors, again = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert {key: tensor.tolist() for key, tensor in tensors.items()} == {key: one.tolist() for key, one in again.items()}


def test_the_base_model_from_the_same_checkpoint(tmp_path: Path) -> None:
    plain = small("pivot").to_standalone()
    with torch.no_grad():
        expected = plain.model(IDS).last_hidden_state
    save_self_contained(plain, tmp_path)
    torch.testing.assert_close(read("AutoModel", tmp_path, {"input_ids": IDS}), expected)
    described = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in described
    assert described["auto_map"]["AutoModelForCausalLM"] == "modeling_reparam.ReparamLlamaForCausalLM"


def built_as_servers_do(folder: Path) -> PreTrainedModel:
    """What vLLM and SGLang build: parameters on meta, then made anew and filled in by name; buffers are not."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in load_file(folder / "model.safetensors").items():
            places[name].copy_(tensor)
    return model.eval()


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_built_as_servers_do(form: str, tmp_path: Path) -> None:
    plain = small(form).to_standalone()
    save_self_contained(plain, tmp_path)
    model = built_as_servers_do(tmp_path)
    assert not any(buffer.is_meta for buffer in model.buffers())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    described = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert described["architectures"] == ["ReparamLlamaForCausalLM"], "else they take their own class of the name"
    assert plain.config.architectures != described["architectures"], "the model stays as it was"


class Split(nn.Module):
    """A linear layer in one of two processes, of which threads take the places, as vLLM makes it of a whole one."""

    def __init__(self, whole: nn.Linear, style: str, rank: int, sums: list[torch.Tensor], barrier: Barrier) -> None:
        super().__init__()
        self.tp_size, self.tp_rank, self.sums, self.barrier, self.is_summed = 2, rank, sums, barrier, style == "rowwise"
        dim = {"colwise": 0, "rowwise": 1}.get(style)
        self.weight = whole.weight if dim is None else nn.Parameter(whole.weight.chunk(2, dim)[rank].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight)
        if self.is_summed:
            self.sums[self.tp_rank] = y
            self.barrier.wait()
            y = self.sums[0] + self.sums[1]
            self.barrier.wait()
        return y


@pytest.mark.parametrize("form", ["factors", "pivot", NARROW])
def test_split_among_two_processes(form: str, tmp_path: Path) -> None:
    plain = small(form, llama(attention_bias=True)).to_standalone()
    save_self_contained(plain, tmp_path)
    barrier, sums = Barrier(2), [torch.empty(0)] * 2

    def of_process(rank: int) -> torch.Tensor:
        model = built[rank]
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                style = next((how for pattern, how in model.tp_plan.items() if re.match(pattern, name)), "replicate")
                model.set_submodule(name, Split(module, style, rank, sums, barrier))
        with torch.no_grad():
            return model(IDS).logits

    built = [built_as_servers_do(tmp_path) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(of_process, range(2)))
    sizes = {name: parameter.numel() for name, parameter in built[0].named_parameters()}
    assert sum(sizes.values()) < sum(parameter.numel() for parameter in plain.parameters()), "something was split"
    with torch.no_grad():
        for logits in both:
            torch.testing.assert_close(logits, plain(IDS).logits)


def test_without_trust_it_fails(tmp_path: Path) -> None:
    save_self_contained(small("pivot").to_standalone(), tmp_path)
    done = run_stock(STOCK, "AutoModelForCausalLM", tmp_path)
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.output.splitlines()[-1]


def test_the_reader_needs_torch_and_transformers_only() -> None:
    from reparam_peft.standalone import modeling_reparam

    assert isinstance(modeling_reparam.Factorized(nn.Linear(4, 3), 2, "factors", False), nn.Module)
    lines = Path(modeling_reparam.__file__).read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"__future__", "inspect", "json", "os", "re", "shutil", "typing", "torch", "transformers"}


@pytest.mark.filterwarnings("ignore:.*reads this weight itself")
def test_a_model_that_reads_weights_itself(tmp_path: Path) -> None:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=100)
    plain = small(model=transformers.MambaForCausalLM(config).eval()).to_standalone()
    save_self_contained(plain, tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, plain(IDS).logits)
        weight = read.backbone.layers[0].mixer.dt_proj.weight
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight + 0, plain.backbone.layers[0].mixer.dt_proj.weight + 0)


@pytest.mark.filterwarnings("ignore:.*reads this weight itself")
@pytest.mark.parametrize(("form", "quantize"), [(FEW_BITS, None), (FEW_BITS, "int8"), ("pivot", "int4")])
def test_few_bits_are_decoded_to_the_same_numbers(form: str, quantize: str | None, tmp_path: Path) -> None:
    plain = small(form).to_standalone(quantize=quantize)
    save_self_contained(plain, tmp_path)
    plain.save_pretrained(tmp_path / "standalone")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in (".", "standalone")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(read), logits(plain))
    for (name, weight), expected in zip(_products(read), _products(plain), strict=True):
        torch.testing.assert_close(weight + 0, expected[1] + 0, msg=name)
    read.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(again.half().float()), logits(read.half().float()))  # scales are not rounded
    assert torch.equal(again.model.layers[0].self_attn.q_proj.B.scales, read.model.layers[0].self_attn.q_proj.B.scales)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float16)
    assert (logits(half).float() - logits(plain)).abs().max() < 2e-3


def _products(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The matrices of its linear layers, as a model that reads them gets them."""
    return [(name, module.weight) for name, module in model.named_modules() if name.endswith("_proj")]


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_in_few_bits_are_the_same_whatever_new_tensors_are(bits: int) -> None:
    coded = Coded(32, 4, bits)
    coded.weight.random_(0, 127)
    coded.scales.fill_(0.3)
    expected, default = coded.matrix(torch.float32), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as some servers do
        assert torch.equal(coded.matrix(torch.float32), expected)
    finally:
        torch.set_default_dtype(default)


def test_damaged_numbers_in_few_bits_are_refused(tmp_path: Path) -> None:
    save_self_contained(small(FEW_BITS).to_standalone(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    scale = next(name for name in state if name.endswith("weight_absmax"))
    negative, as_floats = torch.full_like(state[scale], -1), state[scale].view(torch.float32)
    for message, changed in (("scales that are", negative), ("numbers in F32", as_floats), ("lacks this tensor", None)):
        kept = {name: tensor for name, tensor in (state | {scale: changed}).items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("pivot", lambda state: {"A.mask": torch.zeros_like(state["A.mask"])}, r"q_proj\.A: .* a mask of other rows"),
        ("pivot", lambda state: {"A.weight": torch.zeros(64, 16)}, r"q_proj\.A\.weight: config\.json has this layer without"),
        (
            "factors",
            lambda state: {"B.weight_scale": torch.ones(16, 1)},
            r"q_proj\.B\.weight_scale: config\.json has this layer",
        ),
    ],
)
def test_masks_and_tensors_that_do_not_fit_the_layers_are_refused(
    form: str, changes: Callable[..., dict[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    save_self_contained(small(form).to_standalone(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.0.self_attn.q_proj."
    own = {name.removeprefix(layer): tensor for name, tensor in state.items() if name.startswith(layer)}
    state |= {layer + name: tensor for name, tensor in changes(own).items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": None}, "q_proj: `reparam_layers` in config.json lacks 'rank' of this layer"),
        ({"bias": 0}, "q_proj: `reparam_layers` in config.json says 'bias': 0"),
        ({"form": "full"}, "q_proj: .* says 'form': 'full'"),
        ({"rank": 0}, "q_proj: .* says 'rank': 0"),
        ({"bits": 5}, "q_proj: .* says 'bits': 5"),
        ({"in": 64}, "q_proj: .* lacks 'out'"),
        (None, r"q_proj: `reparam_layers` in config.json must say what it is, got \[\]"),
    ],
)
def test_fields_of_a_layer_that_are_missing_or_wrong_are_told(changes: dict[str, object] | None, message: str) -> None:
    layer = {"rank": 4, "form": "factors", "bias": False}
    changed = {name: value for name, value in (layer | (changes or {})).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        check_layer("layers.0.q_proj", [] if changes is None else changed)


def test_a_config_without_layers_and_whole_numbers_of_another_dtype_are_told(tmp_path: Path) -> None:
    save_self_contained(small(FEW_BITS).to_standalone(), tmp_path)
    tensors, path = load_file(tmp_path / "model.safetensors"), tmp_path / "config.json"
    codes = next(name for name, tensor in tensors.items() if tensor.dtype == torch.int8)
    wide = tensors | {codes: tensors[codes].to(torch.int16)}
    save_file(wide, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{re.escape(codes)}: the checkpoint holds numbers in I16, and .* torch\.int8"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_file(wide, tmp_path / "another.safetensors")  # which is no part of the model
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    described = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(described | {"reparam_layers": []}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"`reparam_layers` in config.json must name the factorised layers, got \[\]"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_a_tensor_of_the_base_model_that_is_missing_is_told(tmp_path: Path) -> None:
    save_self_contained(small("pivot").to_standalone(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight: the checkpoint lacks this tensor; transformers .* other names"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_rotary_embeddings_get_the_names_of_transformers_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/hosts/self_contained.py loads checkpoints in an environment with transformers 4."""
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
    text = SimpleNamespace(rope_parameters={"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5})
    config = SimpleNamespace(rope_parameters=scaled, text_config=text)
    name_rope_as_before(config)
    assert not hasattr(config, "rope_theta")
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    name_rope_as_before(config)
    assert (config.rope_theta, config.rope_scaling) == (5e5, {"rope_type": "llama3", "factor": 8.0})
    assert (text.rope_theta, text.partial_rotary_factor) == (1e5, 0.5)
    assert not hasattr(text, "rope_scaling")
    text.rope_parameters = {"full_attention": scaled, "sliding_attention": scaled}
    with pytest.raises(ValueError, match="by kinds of layers, need transformers 5"):
        name_rope_as_before(config)
