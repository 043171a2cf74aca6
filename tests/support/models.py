"""Tiny models built from configs, one per layer kind and more, their tokenizer and their inputs. No network, no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)


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


def t5(layers: int = 2) -> T5ForConditionalGeneration:
    """An encoder-decoder of so many layers each."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": layers, "vocab_size": 100}
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


class Net(nn.Module):
    """A plain model whose output is a tensor; one of its layers is not in use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(20, 30), nn.Linear(30, 16), nn.Linear(20, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def qwen_moe() -> Qwen2MoeForCausalLM:
    """A mixture whose experts are fused, gate and up split, beside a shared expert of linear layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **heads, num_hidden_layers=2, vocab_size=100)).eval()


def gpt_oss() -> GptOssForCausalLM:
    """A mixture whose experts are fused, transposed and with biases, gate and up interleaved."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 28, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, sliding_window=8)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(parameter, std=0.02)
    return model


def xlnet() -> XLNetLMHeadModel:
    """A model whose attention multiplies by parameters of three dimensions; its weights are large enough to matter."""
    torch.manual_seed(0)
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=48)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def masked_lm() -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**sizes, **quiet, max_position_embeddings=64)).eval()


def classifier() -> nn.Module:
    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Attending(nn.Module):
    """A plain model that predicts tokens, by two of torch's encoder layers and an attention whose inputs have other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cross, self.key, self.value = nn.MultiheadAttention(32, 4, kdim=16, vdim=24), nn.Linear(32, 16), nn.Linear(32, 24)
        self.head = nn.Linear(32, 50)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        padding = None if attention_mask is None else attention_mask == 0
        x = self.encoder(self.embed(input_ids), src_key_padding_mask=padding)
        positions = x.transpose(0, 1)
        y, _ = self.cross(positions, self.key(positions), self.value(positions), key_padding_mask=padding)
        return self.head(x + y.transpose(0, 1))


def attending() -> Attending:
    torch.manual_seed(0)
    model = Attending().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def siglip() -> SiglipVisionModel:
    """An encoder of images, whose head is an attention of torch's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=4)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Skipping(nn.Module):
    """Four blocks; what happens between them takes outputs of two blocks earlier, too, and changes its input in place."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Residual() for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for index, stage in enumerate(self.stages):
            x = stage(x)
            x.mul_(0.5)
            if index == 2:
                x = x + outputs[1]
            outputs.append(x)
        return x


def skipping() -> Skipping:
    torch.manual_seed(0)
    return Skipping().eval()


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return type(llama())(llama().config)
