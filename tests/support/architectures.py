"""Tiny models of many architectures, each with an MLP of 48 neurons unless it is said otherwise, and a batch for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from reparam_peft.calibration.neuron_groups import is_linear

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SHAPE, "vocab_size": 100}
GROUPED = {**TEXT, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8, "pad_token_id": 0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100, "n_inner": 48}
T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "vocab_size": 100, "decoder_start_token_id": 0}
ENCODER_DECODER = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "decoder_start_token_id": 1},
}
IMAGE = {**SHAPE, "image_size": 16, "patch_size": 4}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 40}
DELTA = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4},
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    **{"moe_intermediate_size": 24, "num_experts_per_tok": 2},
}
SMALL_EMBEDDING = {**TEXT, "embedding_size": 16}
MOBILE = {**SMALL_EMBEDDING, "intra_bottleneck_size": 16, "num_hidden_layers": 1}
CLIP = {
    "text_config": {**TEXT, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1},
    **{"vision_config": IMAGE, "projection_dim": 16},
}
WAVES = {
    **{"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}


class Architecture(NamedTuple):
    """How to make a model, and what is in it.

    Attributes:
        model: class of transformers, whose config class it names.
        options: of its config.
        inputs: of which kind: text, labelled text, images, both, spectra or waves.
        mlps: how many pairs of linear layers have only something elementwise between them.
        layout: of the producers.
    """

    model: str
    options: dict[str, Any]
    mlps: int = 2
    inputs: str = "text"
    layout: str = "rows"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model_class = getattr(transformers, self.model)
        model = model_class(model_class.config_class(**self.options)).eval()
        with torch.no_grad():
            for module in model.modules():
                if is_linear(module):
                    module.weight.mul_(5)  # whose standard deviation of 0.02 leaves next to nothing of a neuron
        return model

    def batch(self) -> dict[str, Tensor]:
        ids = torch.arange(24).view(2, 12) * 7 % 90 + 5
        images = torch.sin(torch.arange(2 * 3 * 16 * 16).float()).view(2, 3, 16, 16)
        return {
            "text": {"input_ids": ids},
            "labelled": {"input_ids": ids, "labels": ids},
            "images": {"pixel_values": images},
            "both": {"input_ids": ids, "pixel_values": images},
            "spectra": {"input_features": images.flatten()[:640].view(2, 8, 40), "labels": ids},
            "waves": {"input_values": images.flatten()[:800].view(2, 400)},
        }[self.inputs]


ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", GROUPED),
    "Llama, as wide as the model": Architecture("LlamaForCausalLM", {**GROUPED, "intermediate_size": 32}),
    "Qwen2": Architecture("Qwen2ForCausalLM", GROUPED),
    "Qwen3": Architecture("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "Phi": Architecture("PhiForCausalLM", TEXT),
    "Phi3": Architecture("Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}, layout="split"),
    "GLM": Architecture("GlmForCausalLM", GEMMA, layout="split"),
    "Gemma": Architecture("GemmaForCausalLM", GEMMA),
    "Gemma2": Architecture("Gemma2ForCausalLM", GEMMA),
    "Gemma3": Architecture("Gemma3ForCausalLM", GEMMA),
    "LFM2": Architecture(
        "Lfm2ForCausalLM", {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    ),
    "GPT-2": Architecture("GPT2LMHeadModel", GPT),
    "GPT-J": Architecture("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", TEXT),
    "OPT": Architecture(
        "OPTForCausalLM",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
        | {"word_embed_proj_dim": 32},
    ),
    "BLOOM": Architecture("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100}),
    # Its linear layers are a class that multiplies by itself, which is no target.
    "Falcon": Architecture(
        "FalconForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}, mlps=0
    ),
    "RWKV": Architecture("RwkvForCausalLM", {**SHAPE, "vocab_size": 100, "attention_hidden_size": 32}),
    "Mamba": Architecture("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100}, mlps=0),
    "Mamba2": Architecture(
        "Mamba2ForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "num_heads": 8, "head_dim": 8, "n_groups": 2},
        mlps=0,
    ),
    "Mixtral": Architecture("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, mlps=0),  # fused experts
    "gpt-oss": Architecture("GptOssForCausalLM", {**GROUPED, "num_local_experts": 4, "head_dim": 8}, mlps=0),
    "Qwen2-MoE": Architecture("Qwen2MoeForCausalLM", {**GROUPED, **EXPERTS}),  # shared experts
    "Qwen3-Next": Architecture("Qwen3NextForCausalLM", {**GROUPED, "head_dim": 8, **EXPERTS, **DELTA}),
    "DeepSeek-V3": Architecture("DeepseekV3ForCausalLM", {**TEXT, **LATENT}),
    "BERT": Architecture("BertForMaskedLM", TEXT),
    "BERT, as wide as the model": Architecture("BertForMaskedLM", {**TEXT, "intermediate_size": 32}),
    "BERT, classifier": Architecture("BertForSequenceClassification", TEXT, mlps=3),  # its pooler is one
    "BERT, in chunks": Architecture("BertForMaskedLM", {**TEXT, "chunk_size_feed_forward": 4}, mlps=0),
    "RoBERTa": Architecture("RobertaForMaskedLM", TEXT),
    "ELECTRA": Architecture("ElectraForMaskedLM", SMALL_EMBEDDING),
    "DeBERTa": Architecture("DebertaV2ForMaskedLM", TEXT),
    "ESM": Architecture("EsmForMaskedLM", {**TEXT, "pad_token_id": 1, "mask_token_id": 4}),
    "DistilBERT": Architecture(
        "DistilBertForMaskedLM", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 100}
    ),
    "MobileBERT": Architecture("MobileBertForMaskedLM", MOBILE, mlps=4),
    "MobileBERT, as wide as the model": Architecture("MobileBertForMaskedLM", {**MOBILE, "hidden_size": 48}, mlps=4),
    "ModernBERT": Architecture(
        "ModernBertForMaskedLM",
        {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        layout="split",
    ),
    "ALBERT": Architecture("AlbertModel", SMALL_EMBEDDING, mlps=0),  # one layer, run twice
    "XLNet": Architecture("XLNetLMHeadModel", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 100}),
    "Funnel": Architecture(
        "FunnelModel",
        {"d_model": 32, "d_inner": 48, "n_head": 4, "d_head": 8, "block_sizes": [1, 1], "vocab_size": 100}
        | {"num_decoder_layers": 1},
        mlps=3,
    ),
    "T5": Architecture("T5ForConditionalGeneration", T5, mlps=4, inputs="labelled"),
    "T5, gated": Architecture(
        "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, mlps=4, inputs="labelled"
    ),
    "BART": Architecture("BartForConditionalGeneration", {**ENCODER_DECODER, "max_position_embeddings": 64}, mlps=4),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32},
        mlps=4,
        inputs="spectra",
    ),
    "wav2vec2": Architecture("Wav2Vec2Model", {**TEXT, **WAVES}, inputs="waves"),
    "ViT": Architecture("ViTForImageClassification", IMAGE, inputs="images"),
    "DINOv2, gated": Architecture("Dinov2Model", {**IMAGE, "use_swiglu_ffn": True}, inputs="images"),
    "Swin": Architecture(
        "SwinModel",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        mlps=4,
        inputs="images",
    ),
    "ConvNeXt": Architecture(
        "ConvNextModel", {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2}, mlps=4, inputs="images"
    ),
    # Between the layers it normalises over all positions, with parameters of each channel.
    "ConvNeXt-V2": Architecture(
        "ConvNextV2Model", {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2}, mlps=0, inputs="images"
    ),
    "CLIP": Architecture("CLIPModel", CLIP, mlps=4, inputs="both"),
}
