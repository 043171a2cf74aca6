"""Tiny models built from configs, one per layer kind, and one table of tolerances. No network, no GPU."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import reparam_peft  # noqa: F401  registers the method

torch.set_num_threads(1)  # tests run in as many processes as CPUs, and threads of several would spin on each other


def pytest_configure(config: pytest.Config) -> None:
    """Forget what imports of other libraries print, which pytest-xdist would show after the closing line."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    if capture is not None and capture.is_globally_capturing():
        capture.read_global_capture()


# Largest relative deviation, ‖got − expected‖ / ‖expected‖, that rounding in this dtype may cause in a few operations.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal to within the tolerance of `dtype`, by default that of `got`."""
    error = relative_error(got, expected)
    assert error <= TOLERANCE[dtype or got.dtype], f"relative error {error:.3g}"


def llama(**options: object) -> LlamaForCausalLM:
    """A Llama of two layers with grouped-query attention; 86,016 parameters in linear layers of its blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "bos_token_id": 1, "eos_token_id": 2, **options})).eval()


def gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of two layers, whose linear layers are Conv1D with bias; embeddings are tied."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=64, **tokens)).eval()


def bert() -> BertForSequenceClassification:
    """A BERT classifier of two layers and three labels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    return BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=64, num_labels=3)).eval()


class ConvNet(nn.Module):
    """A plain PyTorch model: two convolutions with different strides and paddings, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(12, 16, (3, 2), padding="same", padding_mode="reflect", bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv1(self.conv0(x).relu()).relu().mean((-2, -1)))


def convnet() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet().eval()


def t5() -> T5ForConditionalGeneration:
    """An encoder-decoder of two layers each."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "vocab_size": 100}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens, feed_forward_proj="gated-gelu")).eval()


def vit() -> ViTForImageClassification:
    """An image classifier of two layers and five labels, whose first layer is a convolution."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)).eval()


class Mixture(nn.Module):
    """A mixture of experts, each of which sees the tokens that are routed to it, and the last none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(inplace=True), nn.Linear(24, 16)) for _ in range(4)
        )
        with torch.no_grad():
            self.router.bias[-1] = -1e4

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, expert(tokens[rows]) * weights[rows, None])
        return y.view_as(x)


def mixture() -> Mixture:
    torch.manual_seed(0)
    return Mixture().eval()


def byte_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token for each byte, 3 to 258; 0 to 2 are <unk>, <s> and </s>. With `bos`, a text starts with <s>, as Llama's do."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@dataclass
class Case:
    """A model that has layers of one kind, what to target, and an input."""

    kind: str
    build: Callable[[], nn.Module]
    target_modules: list[str] | str
    inputs: Callable[[], dict[str, Tensor]]

    def model(self) -> nn.Module:
        return self.build()

    def output(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            result = model(**self.inputs())
        return result if isinstance(result, Tensor) else result.logits


def token_inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(24).view(2, 12) * 7 % 100}


def image_inputs() -> dict[str, Tensor]:
    return {"x": torch.sin(torch.arange(2 * 3 * 10 * 9).float()).view(2, 3, 10, 9)}


CASES = [
    Case("Linear", llama, "all-linear", token_inputs),
    Case("Linear with bias", bert, ["query", "key", "value", "dense"], token_inputs),
    Case("Conv1D", gpt2, ["c_attn", "c_proj", "c_fc"], token_inputs),
    Case("Conv2d", convnet, ["conv0", "conv1"], image_inputs),
    Case("Embedding", llama, ["embed_tokens"], token_inputs),
]


@pytest.fixture(params=CASES, ids=lambda case: case.kind)
def case(request: pytest.FixtureRequest) -> Case:
    """One case for each layer kind."""
    return request.param
