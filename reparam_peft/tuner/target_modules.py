"""Modules by name: the heads of tasks, and the default `target_modules` of known architectures.

The defaults are the attention and MLP projections, by transformers' `model_type`. Names are endings of module names, in the
spelling of the transformers versions that setup.cfg allows. Of an architecture that is not listed all linear layers of the
repeated blocks are taken. PEFT's tables are not read: most name two projections of attention, which are enough to be trained.
"""

from __future__ import annotations

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BART = ["q_proj", "k_proj", "v_proj", "self_attn.out_proj", "encoder_attn.out_proj", "fc1", "fc2"]
OPT = ["q_proj", "k_proj", "v_proj", "self_attn.out_proj", "fc1", "fc2"]
BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]
GPT2 = ["c_attn", "q_attn", "c_proj", "c_fc"]
NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
PHI3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
T5 = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
VIT = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
# Its second line has the names that it has up to transformers 5.17.
DINOV2 = [
    *(*VIT, "gate_proj", "up_proj", "down_proj"),
    *("query", "key", "value", "output.dense", "weights_in", "weights_out"),
]
_FAMILIES: list[tuple[list[str], list[str]]] = [
    (
        LLAMA,
        [
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
            "olmo",
            "olmo2",
            "granite",
            "cohere",
            "cohere2",
            "stablelm",
            "helium",
        ],
    ),
    (OPT, ["opt", "clip", "clip_vision_model", "clip_text_model"]),
    (BART, ["bart", "mbart", "marian", "pegasus", "m2m_100", "whisper"]),
    (BERT, ["bert", "roberta", "xlm-roberta", "camembert", "electra"]),
    (GPT2, ["gpt2", "gpt_bigcode"]),
    (NEOX, ["gpt_neox", "bloom"]),
    (PHI3, ["phi3"]),
    (T5, ["t5", "mt5", "umt5", "longt5"]),
    (VIT, ["vit", "deit"]),
    (DINOV2, ["dinov2"]),
    (["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"], ["distilbert"]),
    (["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"], ["deberta-v2"]),
    (["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"], ["gptj"]),
    (["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"], ["gpt_neo"]),
    (["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"], ["phi"]),
    (["Wqkv", "Wo", "Wi"], ["modernbert"]),
    (["Wqkv", "out_proj", "up_proj", "down_proj"], ["mpt"]),
]
# Modules that PEFT trains and saves whole for a task, whatever `modules_to_save` says; for some tasks after the injection.
SAVED_BY_TASK: dict[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
TARGET_MODULES: dict[str, list[str]] = {model_type: names for names, model_types in _FAMILIES for model_type in model_types}
